//! One session channel: a program in the weaver, and the client that speaks with it (RFC 4254 §6).

use russh::{
    ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};

use super::inbox::{Input, Inputs};
use crate::protocol::{ExecEvent, ExecInput, ExecOutput, ExecRequest, ExecSession, ExitStatus, HostClient, HostError};

/// Extended data of this type is standard error (RFC 4254 §5.2).
const STDERR: u32 = 1;
/// The exit code when the program could not be run for a reason that is not its own.
const NOT_RUN: i32 = 255;

/// The client's side of the channel.
pub(super) struct Client {
    /// Where output goes, under the client's window.
    pub(super) write: ChannelWriteHalf<Msg>,
    /// For the one message that the former has no method for.
    pub(super) handle: Handle,
}

/// Runs a program to its end, or until the client closes the channel. The exit status goes out after all output, then
/// the end of the data, then the close.
pub(super) async fn run(host: HostClient, request: ExecRequest, client: Client, inputs: Inputs) {
    let status = match host.exec(request).await {
        Ok(ExecSession { input, output }) => {
            tokio::select! {
                status = give_output(output, &client) => status,
                // The program is hung up on by what is dropped here.
                () = take_input(inputs, input) => return,
            }
        }
        Err(error) => complain(&error, &client, inputs).await,
    };
    // An error here is a client that has gone.
    if let Some(status) = status {
        let _ = finish(&client, status).await;
    } else {
        let _ = client.write.close().await;
    }
}

/// Passes output on until the program has ended; `None` when the client has gone.
async fn give_output(mut output: ExecOutput, client: &Client) -> Option<ExitStatus> {
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

/// Passes on what the client says, until it closes the channel.
async fn take_input(mut inputs: Inputs, mut program: ExecInput) {
    while let Some(input) = inputs.next().await {
        let taken = match input {
            Input::Data(bytes) => program.data(bytes).await,
            Input::Eof => program.eof().await,
            Input::Resize { rows, cols } => program.resize(rows, cols).await,
            Input::Signal(name) => program.signal(&name).await,
        };
        if taken.is_err() {
            // The program has ended, or the connection to it: its output tells which. Only the close is waited for.
            while inputs.next().await.is_some() {}
            return;
        }
    }
}

/// Says why a program was not run, as a shell would; its exit status.
async fn complain(error: &HostError, client: &Client, mut inputs: Inputs) -> Option<ExitStatus> {
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
