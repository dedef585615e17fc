//! A session channel: a program in the weaver and its client (RFC 4254 §6).

use russh::{
    ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};

use super::inbox::{Input, Inputs};
use crate::protocol::{ExecEvent, ExecInput, ExecOutput, ExecRequest, ExecSession, ExitStatus, HostClient, HostError};

/// The extended data type of standard error (RFC 4254 §5.2).
const STDERR: u32 = 1;
/// The exit code if the program could not be run for a reason other than itself.
const NOT_RUN: i32 = 255;

/// The client's side of the channel.
pub(super) struct Client {
    /// Sends output, within the client's window.
    pub(super) write: ChannelWriteHalf<Msg>,
    /// For a message that [`ChannelWriteHalf`] has no method for.
    pub(super) handle: Handle,
}

/// Runs a program until it ends or the client closes the channel. After all output come the exit status, the EOF and the
/// close.
pub(super) async fn run(host: HostClient, request: ExecRequest, client: Client, inputs: Inputs) {
    let status = match host.exec(request).await {
        Ok(ExecSession { input, output }) => {
            tokio::select! {
                status = send_output(output, &client) => status,
                // Dropping the session sends `SIGHUP` to the program.
                () = forward_input(inputs, input) => return,
            }
        }
        Err(error) => report_failure(&error, &client, inputs).await,
    };
    // An error here means that the client has disconnected.
    if let Some(status) = status {
        let _ = finish(&client, status).await;
    } else {
        let _ = client.write.close().await;
    }
}

/// Sends output until the program has ended; `None` if the client has disconnected.
async fn send_output(mut output: ExecOutput, client: &Client) -> Option<ExitStatus> {
    loop {
        let sent = match output.next().await {
            Ok(Some(ExecEvent::Stdout(bytes))) => client.write.data_bytes(bytes).await,
            Ok(Some(ExecEvent::Stderr(bytes))) => client.write.extended_data_bytes(STDERR, bytes).await,
            Ok(Some(ExecEvent::Exit(status))) => return Some(status),
            Ok(None) => return None,
            Err(error) => {
                tracing::debug!("a session ended without a status: {error}");
                return None;
            }
        };
        sent.ok()?;
    }
}

/// Forwards the client's input until it closes the channel.
async fn forward_input(mut inputs: Inputs, mut program: ExecInput) {
    while let Some(input) = inputs.next().await {
        let taken = match input {
            Input::Data(bytes) => program.data(bytes).await,
            Input::Eof => program.eof().await,
            Input::Resize { rows, cols } => program.resize(rows, cols).await,
            Input::Signal(name) => program.signal(&name).await,
        };
        if taken.is_err() {
            // The program or the connection to it has ended; the output tells which. Just wait for the close.
            while inputs.next().await.is_some() {}
            return;
        }
    }
}

/// Prints why a program was not run, as a shell would; returns the exit status.
async fn report_failure(error: &HostError, client: &Client, mut inputs: Inputs) -> Option<ExitStatus> {
    let code = match error {
        HostError::Refused(failure) => failure.exit_code(),
        _ => NOT_RUN,
    };
    let words = format!("loom: {error}\r\n");
    let closed = async { while inputs.next().await.is_some() {} };
    tokio::select! {
        sent = client.write.extended_data_bytes(STDERR, words) => sent.ok()?,
        () = closed => return None,
    }
    Some(ExitStatus { code, signal: None, core_dumped: false })
}

async fn finish(client: &Client, status: ExitStatus) -> Result<(), russh::Error> {
    let Client { write, handle } = client;
    match status.signal {
        Some(signal) => {
            let signal = Sig::Custom(signal);
            let sent = handle.exit_signal_request(write.id(), signal, status.core_dumped, String::new(), String::new());
            sent.await.map_err(|()| russh::Error::SendError)?;
        }
        None => write.exit_status(status.code.cast_unsigned()).await?,
    }
    write.eof().await?;
    write.close().await
}
