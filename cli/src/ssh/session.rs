//! A shell or a command over SSH (RFC 4254 §6), connected to our standard input and output.
//!
//! The terminal never blocks the connection: a thread of its own reads input and tokio's threads write output, so that
//! keep-alives and the escape `~.` work even while a pager or Ctrl+S stops the output.

use std::{
    borrow::Cow,
    fmt,
    io::{self, IsTerminal as _, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

use loom_api::client::ClientError;
use russh::{
    Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Preferred, Sig,
    client::{self, AuthResult, Handle, Msg},
    keys::{Algorithm, PublicKeyOrCertificate},
};
use rustix::process::Signal;
use tokio::{
    io::AsyncWriteExt as _,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

use super::verify::{HostKeyError, verify};
use crate::{
    context::Context,
    daemon::client::Connected,
    error::{CliError, Exit, Result},
    output,
    terminal::{self, RawMode},
};

/// The channel's receive window, in bytes: enough for a fast network with a long round trip.
const WINDOW: u32 = 16 << 20;
/// If the host sends nothing for this long, it is probed; after three unanswered probes the connection is dead.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// For the SSH handshake and the start of the command, over a tunnel that works already.
const SETUP_TIMEOUT: Duration = Duration::from_secs(30);
/// For sending the disconnect message. Without it the host sees the connection close.
const DISCONNECT_TIMEOUT: Duration = Duration::from_millis(200);
/// For asking the server why the connection was lost.
const REASON_TIMEOUT: Duration = Duration::from_secs(5);
/// The size of one read from standard input.
const CHUNK_SIZE: usize = 32 << 10;
/// Reads that may wait to be sent.
const CHUNK_QUEUE: usize = 4;
const HELP: &[u8] =
    b"\r\nEscapes, at the beginning of a line:\r\n  ~.  ends the connection\r\n  ~~  types ~\r\n  ~?  this\r\n";

/// What to run in the weaver.
pub(crate) struct Remote {
    /// A command line for the shell; without one, a login shell is started.
    pub(crate) command: Option<String>,
    /// Whether to request a terminal.
    pub(crate) terminal: bool,
    pub(crate) env: Vec<(String, String)>,
}

/// Accepts only the weaver's host certificate.
struct HostVerifier {
    authority: String,
    weaver: String,
}

#[derive(Debug, thiserror::Error)]
enum HandlerError {
    #[error("the host is not trusted: {0}")]
    HostKey(#[from] HostKeyError),
    #[error("{0}")]
    Ssh(#[from] russh::Error),
}

impl client::Handler for HostVerifier {
    type Error = HandlerError;

    async fn check_server_key(&mut self, offered: &PublicKeyOrCertificate) -> std::result::Result<bool, HandlerError> {
        Ok(verify(offered, &self.authority, &self.weaver).map(|()| true)?)
    }
}

/// How the session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The command's exit code, or 128 plus the number of the signal that ended it.
    Code(u8),
    /// The weaver refused to run the command.
    Refused,
    /// The connection ended before the command did.
    Lost,
    /// The user typed `~.`.
    Escaped,
    /// Our standard output was closed.
    OutputClosed,
}

/// Runs a command or shell in a weaver; returns its exit code, or 128 plus the number of the signal that ended it.
///
/// # Errors
///
/// With exit code 255 when the connection itself fails.
pub(crate) async fn run(context: &Context, connected: Connected, remote: Remote) -> Result<Exit> {
    let weaver = connected.weaver.clone();
    let setup = timeout(SETUP_TIMEOUT, Box::pin(set_up(connected, &remote))).await;
    let (session, channel) = setup.map_err(|_| failed("the weaver does not answer"))??;
    let end = Box::pin(copy(channel, remote.terminal)).await;
    // The host also notices when the connection closes.
    let _ = timeout(DISCONNECT_TIMEOUT, session.disconnect(russh::Disconnect::ByApplication, "", "")).await;
    match end {
        Outcome::Code(code) => Ok(Exit(code)),
        Outcome::Refused => Err(failed("the weaver refused to run it")),
        Outcome::Lost => Err(lost(context, &weaver).await),
        Outcome::Escaped => {
            output::note("connection closed");
            Ok(Exit::CONNECTION)
        }
        Outcome::OutputClosed => Err(CliError::silent(Exit::OUTPUT_CLOSED)),
    }
}

/// Why the connection was lost, if the server can say it: the weaver has ended, or the user may not reach it any more.
async fn lost(context: &Context, weaver: &str) -> CliError {
    let error = failed("the connection was lost").hint("loom events ID shows what happened to the weaver");
    let Ok(client) = context.client() else { return error };
    let path = format!("/api/weavers/{weaver}");
    match timeout(REASON_TIMEOUT, client.get::<serde_json::Value>(&path)).await {
        Ok(Err(ClientError::Api(reason))) => {
            let error = failed(format_args!("the connection was lost: {reason}"));
            match reason.hint {
                Some(hint) => error.hint(hint),
                None => error,
            }
        }
        _ => error,
    }
}

fn failed(why: impl fmt::Display) -> CliError {
    CliError::new(Exit::CONNECTION, format!("ssh: {why}"))
}

fn configuration() -> client::Config {
    client::Config {
        window_size: WINDOW,
        keepalive_interval: Some(KEEPALIVE_INTERVAL),
        preferred: Preferred {
            host_key_certificates: Cow::Borrowed(&[Algorithm::Ed25519]),
            key: Cow::Borrowed(&[Algorithm::Ed25519]),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}

/// Verifies the host and requests the command. The reply to the request arrives with the output: waiting for it here
/// would cost a round trip.
async fn set_up(connected: Connected, remote: &Remote) -> Result<(Handle<HostVerifier>, Channel<Msg>)> {
    let host = HostVerifier { authority: connected.ssh_ca, weaver: connected.weaver };
    let mut session =
        client::connect_stream(Arc::new(configuration()), connected.stream, host).await.map_err(failed)?;
    if !matches!(session.authenticate_none("loom").await.map_err(failed)?, AuthResult::Success) {
        return Err(failed("the weaver does not admit this device")
            .hint("bring the tunnel up again: loom tunnel down; loom tunnel up ID"));
    }
    let channel = session.channel_open_session().await.map_err(failed)?;
    request(&channel, remote).await.map_err(failed)?;
    Ok((session, channel))
}

async fn request(channel: &Channel<Msg>, remote: &Remote) -> Result<(), russh::Error> {
    for (name, value) in &remote.env {
        channel.set_env(false, name.as_str(), value.as_str()).await?;
    }
    if remote.terminal {
        if let Ok(colours) = std::env::var("COLORTERM") {
            channel.set_env(false, "COLORTERM", colours).await?;
        }
        let (rows, cols) = terminal::window_size().unwrap_or((24, 80));
        let term = std::env::var("TERM").unwrap_or_else(|_| "xterm-256color".to_owned());
        channel.request_pty(false, &term, cols.into(), rows.into(), 0, 0, &[]).await?;
    }
    match &remote.command {
        Some(command) => channel.exec(true, command.as_str()).await,
        None => channel.request_shell(true).await,
    }
}

/// Copies between the channel and our standard input and output until the channel closes.
async fn copy(channel: Channel<Msg>, terminal: bool) -> Outcome {
    // Restored when this function returns, for whatever reason.
    let raw = if terminal && io::stdin().is_terminal() { RawMode::enter().ok() } else { None };
    let (mut from_host, to_host) = channel.split();
    let input = copy_input(&to_host, terminal, raw.as_ref());
    let output = copy_output(&mut from_host);
    tokio::pin!(input);
    tokio::pin!(output);
    let mut input_open = true;
    loop {
        tokio::select! {
            end = &mut output => return end,
            ended = &mut input, if input_open => match ended {
                Input::Eof => input_open = false,
                Input::Escaped => return Outcome::Escaped,
            },
        }
    }
}

/// Writes all output from the host until the channel closes.
async fn copy_output(from_host: &mut ChannelReadHalf) -> Outcome {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut end = Outcome::Lost;
    while let Some(message) = from_host.wait().await {
        match message {
            ChannelMsg::Data { data } => {
                let written = async {
                    stdout.write_all(&data).await?;
                    stdout.flush().await
                };
                if written.await.is_err() {
                    return Outcome::OutputClosed; // as in `loom exec ID -- yes | head -1`
                }
            }
            ChannelMsg::ExtendedData { data, ext: 1 } => {
                // There is no way to report that standard error is closed.
                let _ = stderr.write_all(&data).await;
                let _ = stderr.flush().await;
            }
            ChannelMsg::ExitStatus { exit_status } => end = Outcome::Code((exit_status & 0xff) as u8),
            ChannelMsg::ExitSignal { signal_name, .. } => end = Outcome::Code(signal_code(&signal_name)),
            // Only the request for the command or shell asks for a reply.
            ChannelMsg::Failure => return Outcome::Refused,
            _ => {}
        }
    }
    end
}

/// How the input ended.
enum Input {
    /// Standard input ended; output continues.
    Eof,
    /// The user typed `~.`.
    Escaped,
}

/// Sends our standard input, and the size of the window whenever it changes.
async fn copy_input(to_host: &ChannelWriteHalf<Msg>, terminal: bool, raw: Option<&RawMode>) -> Input {
    let (Ok(mut resized), Ok(mut continued)) =
        (signal(SignalKind::window_change()), signal(SignalKind::from_raw(Signal::CONT.as_raw())))
    else {
        return Input::Eof;
    };
    let mut typed = read_input();
    let mut escape = Escape::default();
    let mut open = true;
    loop {
        tokio::select! {
            bytes = typed.recv(), if open => {
                let Some(bytes) = bytes else {
                    // The host may have closed the channel already.
                    let _ = to_host.eof().await;
                    if !terminal {
                        return Input::Eof;
                    }
                    open = false;
                    continue;
                };
                let typed = if raw.is_some() { escape.feed(&bytes) } else { Typed::plain(bytes) };
                if typed.help {
                    // A closed standard error needs no help text.
                    let _ = io::stderr().lock().write_all(HELP);
                }
                if typed.end {
                    return Input::Escaped;
                }
                if !typed.send.is_empty() && to_host.data_bytes(typed.send).await.is_err() {
                    return Input::Eof;
                }
            }
            _ = resized.recv(), if terminal => {
                if !send_window_size(to_host).await {
                    return Input::Eof;
                }
            }
            // The process was stopped and continued; the shell has changed the terminal meanwhile.
            _ = continued.recv(), if raw.is_some() => {
                let _ = raw.map(RawMode::reenter);
                if !send_window_size(to_host).await {
                    return Input::Eof;
                }
            }
        }
    }
}

/// Sends the terminal's size to the host; returns whether that worked.
async fn send_window_size(to_host: &ChannelWriteHalf<Msg>) -> bool {
    let Some((rows, cols)) = terminal::window_size() else { return true };
    to_host.window_change(cols.into(), rows.into(), 0, 0).await.is_ok()
}

/// Reads standard input in a thread, because reading a terminal cannot be cancelled; the thread ends with the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, typed) = mpsc::channel(CHUNK_QUEUE);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK_SIZE];
        loop {
            match stdin.read(&mut buffer) {
                Ok(count @ 1..) => {
                    if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    });
    typed
}

/// What to do with typed bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Typed {
    send: Vec<u8>,
    /// The user typed `~?`.
    help: bool,
    /// The user typed `~.`.
    end: bool,
}

impl Typed {
    const fn plain(send: Vec<u8>) -> Self {
        Self { send, help: false, end: false }
    }
}

/// Detects escapes at the beginning of a line, as OpenSSH does. `~.` ends the session even when the weaver is gone.
struct Escape {
    line_start: bool,
    tilde: bool,
}

impl Default for Escape {
    fn default() -> Self {
        Self { line_start: true, tilde: false }
    }
}

impl Escape {
    fn feed(&mut self, bytes: &[u8]) -> Typed {
        let mut typed = Typed::plain(Vec::with_capacity(bytes.len() + 1));
        for byte in bytes {
            if std::mem::take(&mut self.tilde) {
                match byte {
                    b'.' => {
                        typed.end = true;
                        return typed;
                    }
                    b'?' => {
                        typed.help = true;
                        continue; // still at the beginning of the line
                    }
                    b'~' => {}
                    _ => typed.send.push(b'~'),
                }
            } else if self.line_start && *byte == b'~' {
                self.tilde = true;
                continue;
            }
            self.line_start = matches!(byte, b'\r' | b'\n');
            typed.send.push(*byte);
        }
        typed
    }
}

/// 128 plus the signal's number.
fn signal_code(signal: &Sig) -> u8 {
    let number = match signal {
        Sig::HUP => 1,
        Sig::INT => 2,
        Sig::QUIT => 3,
        Sig::ILL => 4,
        Sig::ABRT => 6,
        Sig::FPE => 8,
        Sig::KILL => 9,
        Sig::USR1 => 10,
        Sig::SEGV => 11,
        Sig::PIPE => 13,
        Sig::ALRM => 14,
        Sig::TERM => 15,
        Sig::Custom(name) => match name.as_str() {
            "TRAP" => 5,
            "BUS" => 7,
            "USR2" => 12,
            "XCPU" => 24,
            "XFSZ" => 25,
            "SYS" => 31,
            _ => 127,
        },
    };
    128 + number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_counts_only_at_the_beginning_of_a_line() {
        let sent = |text: &[u8]| Typed::plain(text.to_vec());
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"ls ~.\r"), sent(b"ls ~.\r"));
        assert_eq!(escape.feed(b"~"), sent(b""), "nothing is sent until the next key");
        assert_eq!(escape.feed(b"x"), sent(b"~x"));
        assert_eq!(escape.feed(b"\r~~."), sent(b"\r~."));
        let ended = escape.feed(b"\r~.gone");
        assert!(ended.end && ended.send == b"\r", "{ended:?}");
    }

    #[test]
    fn the_help_escape_swallows_only_itself() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"a\r~?ls\r"), Typed { send: b"a\rls\r".to_vec(), help: true, end: false });
        assert!(escape.feed(b"~?~.").end, "after the help it is still the beginning of the line");
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        assert_eq!(signal_code(&Sig::TERM), 143);
        assert_eq!(signal_code(&Sig::KILL), 137);
        assert_eq!(signal_code(&Sig::Custom("BUS".to_owned())), 135);
    }
}
