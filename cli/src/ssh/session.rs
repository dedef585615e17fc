//! One shell or command over SSH (RFC 4254 §6), with this terminal or these pipes as its ends.
//!
//! Nothing here waits for the terminal in a way that keeps the connection waiting: input is read by a thread, output is
//! written by tokio's, so that a stopped pager or Ctrl+S costs neither keep-alives nor the way out (`~.`).

use std::{
    borrow::Cow,
    fmt,
    io::{self, IsTerminal as _, Read as _, Write as _},
    sync::Arc,
    time::Duration,
};

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

use super::verify::{Distrust, verify};
use crate::{
    daemon::client::Connected,
    error::{CliError, Exit, Result},
    output,
    terminal::{self, RawMode},
};

/// Bytes that may be under way to us in one channel: enough for a fast network with a long round trip.
const WINDOW: u32 = 16 << 20;
/// Without a word from the host for so long, it is asked; after three times without an answer the connection is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long the host may take until it runs what is wanted. The tunnel to it works already.
const SETUP: Duration = Duration::from_secs(30);
/// How long our farewell may take. The daemon tells the host anyway that we are gone.
const FAREWELL: Duration = Duration::from_millis(200);
/// One read from standard input.
const CHUNK: usize = 32 << 10;
/// Reads that wait to be sent.
const CHUNKS: usize = 4;
/// What `~?` shows.
const HELP: &[u8] =
    b"\r\nEscapes, at the beginning of a line:\r\n  ~.  ends the connection\r\n  ~~  types ~\r\n  ~?  this\r\n";

/// What is to be run.
pub(crate) struct Remote {
    /// A command line; a login shell when there is none.
    pub(crate) command: Option<String>,
    /// Whether to ask for a terminal.
    pub(crate) terminal: bool,
    pub(crate) env: Vec<(String, String)>,
}

/// Trusts one host: the weaver.
struct Host {
    authority: String,
    weaver: String,
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the host is not trusted: {0}")]
    Distrusted(#[from] Distrust),
    #[error("{0}")]
    Ssh(#[from] russh::Error),
}

impl client::Handler for Host {
    type Error = Failure;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> std::result::Result<bool, Failure> {
        Ok(verify(shown, &self.authority, &self.weaver).map(|()| true)?)
    }
}

/// How the remote command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// With an exit code, or 128 plus a signal.
    Code(u8),
    /// The host would not run it.
    Refused,
    /// The connection ended before it did.
    Lost,
    /// The user typed `~.`.
    Escaped,
    /// Nobody reads our output any more.
    OutputClosed,
}

/// Runs something in a weaver to its end; its exit code, or 128 plus the signal.
///
/// # Errors
///
/// With exit code 255 when the connection itself fails.
pub(crate) async fn run(connected: Connected, remote: Remote) -> Result<Exit> {
    let setup = timeout(SETUP, Box::pin(set_up(connected, &remote))).await;
    let (session, channel) = setup.map_err(|_| failed("the weaver does not answer"))??;
    let end = Box::pin(attend(channel, remote.terminal)).await;
    // Whether the host hears it is of no consequence.
    let _ = timeout(FAREWELL, session.disconnect(russh::Disconnect::ByApplication, "", "")).await;
    match end {
        End::Code(code) => Ok(Exit(code)),
        End::Refused => Err(failed("the weaver refused to run it")),
        End::Lost => Err(failed("the connection was lost").hint("loom events ID shows what happened to the weaver")),
        End::Escaped => {
            output::note("connection closed");
            Ok(Exit::CONNECTION)
        }
        End::OutputClosed => Err(CliError::silent(Exit::OUTPUT_CLOSED)),
    }
}

fn failed(why: impl fmt::Display) -> CliError {
    CliError::new(Exit::CONNECTION, format!("ssh: {why}"))
}

fn configuration() -> client::Config {
    client::Config {
        window_size: WINDOW,
        keepalive_interval: Some(KEEP_ALIVE),
        preferred: Preferred {
            host_key_certificates: Cow::Borrowed(&[Algorithm::Ed25519]),
            key: Cow::Borrowed(&[Algorithm::Ed25519]),
            ..Preferred::DEFAULT
        },
        ..client::Config::default()
    }
}

/// Verifies the host, and asks it to run what is wanted. Its answer to that comes with the output: no round trip is
/// waited for that the protocol does not need.
async fn set_up(connected: Connected, remote: &Remote) -> Result<(Handle<Host>, Channel<Msg>)> {
    let host = Host { authority: connected.ssh_ca, weaver: connected.weaver };
    let mut session =
        client::connect_stream(Arc::new(configuration()), connected.stream, host).await.map_err(failed)?;
    if !matches!(session.authenticate_none("loom").await.map_err(failed)?, AuthResult::Success) {
        return Err(failed("the weaver does not admit this device")
            .hint("bring the tunnel up anew: loom tunnel down; loom tunnel up ID"));
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

/// Joins the channel with our ends until it closes.
async fn attend(channel: Channel<Msg>, terminal: bool) -> End {
    // Restored when this function ends, whatever ends it.
    let raw = if terminal && io::stdin().is_terminal() { RawMode::enter().ok() } else { None };
    let (mut from_host, to_host) = channel.split();
    let input = pump_input(&to_host, terminal, raw.as_ref());
    let output = pump_output(&mut from_host);
    tokio::pin!(input);
    tokio::pin!(output);
    let mut input_open = true;
    loop {
        tokio::select! {
            end = &mut output => return end,
            ended = &mut input, if input_open => match ended {
                Input::Over => input_open = false,
                Input::Escaped => return End::Escaped,
            },
        }
    }
}

/// Writes what the host sends, all of it, until the channel closes.
async fn pump_output(from_host: &mut ChannelReadHalf) -> End {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut end = End::Lost;
    while let Some(message) = from_host.wait().await {
        match message {
            ChannelMsg::Data { data } => {
                let written = async {
                    stdout.write_all(&data).await?;
                    stdout.flush().await
                };
                if written.await.is_err() {
                    return End::OutputClosed; // as in `loom exec ID -- yes | head -1`
                }
            }
            ChannelMsg::ExtendedData { data, ext: 1 } => {
                // Nobody can be told that the errors cannot be shown.
                let _ = stderr.write_all(&data).await;
                let _ = stderr.flush().await;
            }
            ChannelMsg::ExitStatus { exit_status } => end = End::Code((exit_status & 0xff) as u8),
            ChannelMsg::ExitSignal { signal_name, .. } => end = End::Code(signal_code(&signal_name)),
            // Only to the one request that wants an answer.
            ChannelMsg::Failure => return End::Refused,
            _ => {}
        }
    }
    end
}

/// How the input ended.
enum Input {
    /// Standard input ended; output continues.
    Over,
    /// The user typed `~.`.
    Escaped,
}

/// Sends what is typed or piped, and follows the window of a terminal.
async fn pump_input(to_host: &ChannelWriteHalf<Msg>, terminal: bool, raw: Option<&RawMode>) -> Input {
    let (Ok(mut resized), Ok(mut continued)) =
        (signal(SignalKind::window_change()), signal(SignalKind::from_raw(Signal::CONT.as_raw())))
    else {
        return Input::Over;
    };
    let mut typed = read_input();
    let mut escape = Escape::default();
    let mut open = true;
    loop {
        tokio::select! {
            bytes = typed.recv(), if open => {
                let Some(bytes) = bytes else {
                    // The host may have closed already.
                    let _ = to_host.eof().await;
                    if !terminal {
                        return Input::Over;
                    }
                    open = false;
                    continue;
                };
                let typed = if raw.is_some() { escape.feed(&bytes) } else { Typed::plain(bytes) };
                if typed.help {
                    // On a terminal that is gone nobody needs help.
                    let _ = io::stderr().lock().write_all(HELP);
                }
                if typed.end {
                    return Input::Escaped;
                }
                if !typed.send.is_empty() && to_host.data_bytes(typed.send).await.is_err() {
                    return Input::Over;
                }
            }
            _ = resized.recv(), if terminal => {
                if !tell_window(to_host).await {
                    return Input::Over;
                }
            }
            // The process was stopped, and the shell has made the terminal its own meanwhile.
            _ = continued.recv(), if raw.is_some() => {
                let _ = raw.map(RawMode::again);
                if !tell_window(to_host).await {
                    return Input::Over;
                }
            }
        }
    }
}

/// Tells the host how large the terminal is; whether that could be sent.
async fn tell_window(to_host: &ChannelWriteHalf<Msg>) -> bool {
    let Some((rows, cols)) = terminal::window_size() else { return true };
    to_host.window_change(cols.into(), rows.into(), 0, 0).await.is_ok()
}

/// Reads standard input in a thread of its own, because reading a terminal cannot be cancelled; the thread ends with
/// the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, typed) = mpsc::channel(CHUNKS);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        let mut buffer = vec![0; CHUNK];
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

/// What typed bytes mean.
#[derive(Debug, Default, PartialEq, Eq)]
struct Typed {
    /// Bytes to send to the host.
    send: Vec<u8>,
    /// The user wants to know the escapes.
    help: bool,
    /// The user wants to end the connection.
    end: bool,
}

impl Typed {
    const fn plain(send: Vec<u8>) -> Self {
        Self { send, help: false, end: false }
    }
}

/// Looks for `~.` at the beginning of a line, as OpenSSH does: the way out when the weaver is gone.
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
    fn help_swallows_nothing_but_itself() {
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
