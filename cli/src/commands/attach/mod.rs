//! `loom attach`: connects the user's terminal to a weaver's main terminal.
//!
//! Three activities run at once until one of them ends the attach: reading the keyboard ([`detach`] recognises the keys
//! that detach), maintaining the connection (a broken one is replaced for as long as the weaver lives; [`session`] knows
//! what the next one has to ask for and to send again), and watching for the process being stopped and continued. The
//! user's own terminal is restored by [`crate::terminal`]; [`alternate`] tells it which screen is shown.

mod alternate;
mod detach;
mod session;

use std::{
    cell::{Cell, RefCell},
    fmt::Write as _,
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap_complete::ArgValueCandidates;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use loom_api::{
    ErrorCode, WeaverId,
    attach::{AttachQuery, ClientControl, MAX_FRAME, SUBPROTOCOL, ServerControl},
    client::{Client, ClientError, WebSocket},
    weaver::Weaver,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Stdout},
    signal::unix::{SignalKind, signal},
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use self::{
    alternate::Alternate,
    detach::{DetachKeys, Matcher},
    session::{Frame, Session, SessionEvent},
};
use super::logs;
use crate::{
    backoff::Backoff,
    completion,
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    output,
    terminal::{self, RawMode},
};

/// Between pings on an idle connection.
const PING_INTERVAL: Duration = Duration::from_secs(8);
/// A connection on which nothing arrives for this long is dead: two pings were not answered.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the beginning of a detach sequence is held back before the program gets it.
const DETACH_KEY_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the connection may be lost before the user is told.
const NOTICE_DELAY: Duration = Duration::from_secs(2);
/// A connection that lasted this long resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(5);
/// For writing the last output to the terminal.
const FINAL_WRITE_TIMEOUT: Duration = Duration::from_millis(500);
/// For asking the server why the program ended.
const EXIT_REASON_TIMEOUT: Duration = Duration::from_secs(2);
const CTRL_C: u8 = 3;

/// Attaches to a weaver's main terminal.
///
/// Everybody who attaches shares one terminal. Detach with Ctrl+D, or Ctrl+P Ctrl+Q; the program keeps running. A broken
/// connection is replaced without losing anything. When the program ends, its exit code is returned.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom attach 0193f                          the beginning of the id is enough
  loom attach work                           or the name
  loom attach 0193f --read-only              watch; keys have no effect, Ctrl+C leaves
  loom attach 0193f --detach-keys ctrl-]     so that Ctrl+D reaches the program

Keys are characters or ctrl-X; commas make a sequence, spaces separate alternatives, `none` is none.
The default can be set by LOOM_DETACH_KEYS, or detach_keys in config.toml.")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// Only watch: send no input
    #[arg(long)]
    read_only: bool,
    /// The keys that detach [default: "ctrl-d ctrl-p,ctrl-q"]
    #[arg(long, value_name = "KEYS")]
    detach_keys: Option<DetachKeys>,
}

#[derive(Debug, Default)]
pub(super) struct Options {
    read_only: bool,
    detach_keys: Option<DetachKeys>,
    /// The weaver has just been created: if its program has ended already, that is not an error.
    just_created: bool,
}

impl Options {
    /// For `loom new`.
    pub(super) fn just_created() -> Self {
        Self { just_created: true, ..Self::default() }
    }
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let weaver: Weaver =
        client.get(&super::weaver_path(&args.id)?).await.doing(format_args!("cannot attach to {}", args.id))?;
    let options = Options { read_only: args.read_only, detach_keys: args.detach_keys.clone(), just_created: false };
    attach(context, &client, weaver.id, options).await
}

/// Attaches to the weaver's main terminal until the user detaches or the program ends.
pub(super) async fn attach(context: &Context, client: &Client, weaver: WeaverId, options: Options) -> Result<Exit> {
    let keys = match (options.detach_keys, &context.settings.detach_keys) {
        (Some(keys), _) => keys,
        (None, setting) => {
            let text = setting.as_deref().unwrap_or(detach::DEFAULT);
            text.parse().map_err(|error| CliError::usage(format!("cannot use the setting detach_keys: {error}")))?
        }
    };
    let mut attachment = Attachment {
        client,
        weaver,
        read_only: options.read_only,
        session: RefCell::new(Session::new(Uuid::new_v4(), options.read_only)),
        typed: Notify::new(),
        room: Notify::new(),
        reopen: Notify::new(),
        raw: None,
        on_terminal: io::stdout().is_terminal(),
        alternate: RefCell::default(),
        drawn: Cell::new(false),
        line_is_open: Cell::new(false),
    };
    let mut stdout = tokio::io::stdout();
    // Connects before entering raw mode, so that errors print normally.
    let outcome = match attachment.connect().await {
        Ok(socket) => {
            if io::stdin().is_terminal() {
                let raw = RawMode::enter().map_err(|error| {
                    CliError::failure(format!("cannot attach: the terminal cannot enter raw mode: {error}"))
                })?;
                attachment.raw = Some(raw);
            }
            let matcher = attachment.raw.is_some().then(|| Matcher::new(keys));
            tokio::select! {
                outcome = attachment.keyboard(matcher) => Ok(outcome),
                outcome = attachment.network(socket, &mut stdout) => outcome,
                never = attachment.watch_for_stops() => match never {},
            }
        }
        Err(error) if options.just_created => attachment.ended(error).await.map(Outcome::Exited),
        Err(error) => return Err(CliError::from(error).doing("cannot attach")),
    };
    if matches!(outcome, Ok(Outcome::Exited(_))) && !attachment.drawn.get() {
        // The program ended before anything was shown.
        let _ = timeout(FINAL_WRITE_TIMEOUT, stdout.write_all(&logs::final_output(client, weaver).await)).await;
    }
    let _ = timeout(FINAL_WRITE_TIMEOUT, stdout.flush()).await;
    attachment.raw = None;
    attachment.begin_line()?;
    attachment.report(outcome?)
}

/// How an attach ended, other than by an error.
enum Outcome {
    Detached,
    /// The program's exit code.
    Exited(i32),
}

/// Why a connection ended.
enum ConnectionEnd {
    /// The connection was lost, and is to be replaced.
    Lost,
    /// The attach has ended.
    Final(Outcome),
}

/// The state that the activities share; they run on one thread.
struct Attachment<'a> {
    client: &'a Client,
    weaver: WeaverId,
    read_only: bool,
    session: RefCell<Session>,
    /// There may be input to send.
    typed: Notify,
    /// There may be room for input.
    room: Notify,
    /// The connection is to be replaced, to get the screen redrawn.
    reopen: Notify,
    raw: Option<RawMode>,
    on_terminal: bool,
    alternate: RefCell<Alternate>,
    /// The first snapshot has been drawn.
    drawn: Cell<bool>,
    /// The cursor may not be at the beginning of a line.
    line_is_open: Cell<bool>,
}

impl Attachment<'_> {
    /// Reads the keyboard until the user detaches. The end of the input does not end the attach.
    async fn keyboard(&self, mut matcher: Option<Matcher>) -> Outcome {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 16 << 10];
        loop {
            while !self.session.borrow().has_room() {
                self.room.notified().await;
            }
            let holds = matcher.as_ref().is_some_and(Matcher::holds);
            let read = if holds {
                timeout(DETACH_KEY_TIMEOUT, stdin.read(&mut buffer)).await
            } else {
                Ok(stdin.read(&mut buffer).await)
            };
            let typed = match read {
                Ok(Ok(length @ 1..)) => &buffer[..length],
                Ok(Ok(0) | Err(_)) => {
                    self.push(&matcher.as_mut().map(Matcher::flush).unwrap_or_default());
                    return std::future::pending().await;
                }
                Err(_) => {
                    self.push(&matcher.as_mut().map(Matcher::flush).unwrap_or_default());
                    continue;
                }
            };
            let Some(matcher) = &mut matcher else {
                self.push(typed);
                continue;
            };
            if self.read_only && typed.contains(&CTRL_C) {
                return Outcome::Detached;
            }
            let matched = matcher.feed(typed);
            self.push(&matched.input);
            if matched.detach {
                return Outcome::Detached;
            }
        }
    }

    fn push(&self, input: &[u8]) {
        self.session.borrow_mut().push_input(input);
        self.typed.notify_one();
    }

    /// Maintains the connection until the program has ended or attaching is no longer possible.
    async fn network(&self, mut socket: WebSocket, stdout: &mut Stdout) -> Result<Outcome> {
        let mut backoff = Backoff::default();
        loop {
            let opened = Instant::now();
            self.session.borrow_mut().reconnected();
            let (mut sink, mut stream) = socket.split();
            let end = tokio::select! {
                end = self.downstream(&mut stream, stdout) => end?,
                () = self.upstream(&mut sink) => ConnectionEnd::Lost,
                () = self.reopen.notified() => ConnectionEnd::Lost,
            };
            if let ConnectionEnd::Final(outcome) = end {
                return Ok(outcome);
            }
            if opened.elapsed() >= STABLE_AFTER {
                backoff.reset();
            }
            socket = match self.reconnect(&mut backoff, stdout).await? {
                Ok(socket) => socket,
                Err(error) => return self.ended(error).await.map(Outcome::Exited),
            };
        }
    }

    /// Retries until there is a connection. The inner error means that there will be none.
    async fn reconnect(&self, backoff: &mut Backoff, stdout: &mut Stdout) -> Result<Result<WebSocket, ClientError>> {
        let since = Instant::now();
        let mut notified = false;
        loop {
            backoff.wait().await;
            match self.connect().await {
                Ok(socket) => return Ok(Ok(socket)),
                Err(error) if error.code().is_some_and(ends_the_attach) => return Ok(Err(error)),
                Err(_) if !notified && since.elapsed() >= NOTICE_DELAY => {
                    notified = true;
                    self.show_notice("connection lost; reconnecting", stdout).await?;
                }
                Err(_) => {}
            }
        }
    }

    async fn connect(&self) -> Result<WebSocket, ClientError> {
        let query = self.session.borrow().query(self.window());
        self.client.websocket(&path(self.weaver, &query), Some(SUBPROTOCOL), MAX_FRAME).await
    }

    fn window(&self) -> Option<(u16, u16)> {
        self.on_terminal.then(terminal::window_size).flatten()
    }

    /// Sends input, changes of the window's size, and pings until the connection breaks.
    async fn upstream(&self, sink: &mut SplitSink<WebSocket, Message>) {
        let Ok(mut resized) = signal(SignalKind::window_change()) else { return };
        let mut ping = interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let piece = self.session.borrow_mut().next_input();
            let message = match piece {
                Some(piece) => Message::Binary(piece),
                None => tokio::select! {
                    () = self.typed.notified() => continue,
                    _ = ping.tick() => Message::Ping(bytes::Bytes::new()),
                    _ = resized.recv() => match self.resize() {
                        Some(message) => message,
                        None => continue,
                    },
                },
            };
            if sink.send(message).await.is_err() {
                return;
            }
        }
    }

    fn resize(&self) -> Option<Message> {
        let (rows, cols) = self.window()?;
        let json = serde_json::to_string(&ClientControl::Resize { rows, cols }).ok()?;
        Some(Message::Text(json.into()))
    }

    /// Shows output until the connection breaks or the program ends.
    async fn downstream(&self, stream: &mut SplitStream<WebSocket>, stdout: &mut Stdout) -> Result<ConnectionEnd> {
        loop {
            let Ok(Some(Ok(message))) = timeout(SILENCE_TIMEOUT, stream.next()).await else {
                return Ok(ConnectionEnd::Lost);
            };
            match message {
                Message::Binary(bytes) => {
                    let frame = self.session.borrow_mut().output(bytes.len());
                    // Before writing, so that if we are interrupted here the terminal is restored completely.
                    if let Some(raw) = &self.raw {
                        raw.alternate_screen(self.alternate.borrow_mut().feed(&bytes));
                    }
                    if frame == Frame::Snapshot && !self.drawn.replace(true) {
                        self.scroll_content_away(stdout).await?;
                    }
                    self.write(&bytes, stdout).await?;
                    self.line_is_open.set(frame == Frame::Snapshot || bytes.last().is_some_and(|byte| *byte != b'\n'));
                }
                Message::Text(text) => {
                    // Ignore messages of a newer server.
                    let Ok(control) = serde_json::from_str::<ServerControl>(&text) else { continue };
                    let event = self.session.borrow_mut().control(control);
                    self.typed.notify_one();
                    self.room.notify_one();
                    match event {
                        SessionEvent::Nothing | SessionEvent::Attached => {}
                        SessionEvent::Expiring(seconds) => self.show_notice(&expiring(seconds), stdout).await?,
                        SessionEvent::Exited(code) => {
                            return self.exited(code).await.map(|code| ConnectionEnd::Final(Outcome::Exited(code)));
                        }
                        SessionEvent::Refused(error) if ends_the_attach(error.code) => {
                            return self
                                .ended(error.into())
                                .await
                                .map(|code| ConnectionEnd::Final(Outcome::Exited(code)));
                        }
                        SessionEvent::Refused(_) => return Ok(ConnectionEnd::Lost),
                    }
                }
                Message::Close(_) => return Ok(ConnectionEnd::Lost),
                _ => {}
            }
        }
    }

    /// Scrolls the terminal's content away before the first snapshot, which clears the window.
    async fn scroll_content_away(&self, stdout: &mut Stdout) -> Result<()> {
        match self.window().filter(|_| self.raw.is_some()) {
            Some((rows, _)) => self.write("\n".repeat(usize::from(rows) - 1).as_bytes(), stdout).await,
            None => Ok(()),
        }
    }

    async fn write(&self, bytes: &[u8], stdout: &mut Stdout) -> Result<()> {
        let written = async {
            stdout.write_all(bytes).await?;
            stdout.flush().await
        };
        written.await.map_err(|error| CliError::output(&error))
    }

    /// Shows a message: in raw mode on the last row of the terminal, which the program may soon draw over, else on
    /// standard error.
    async fn show_notice(&self, text: &str, stdout: &mut Stdout) -> Result<()> {
        let Some((rows, cols)) = self.window().filter(|_| self.raw.is_some()) else {
            output::note(&format!("loom: {text}"));
            return Ok(());
        };
        self.session.borrow_mut().drawn_over();
        self.write(notice(text, rows, cols).as_bytes(), stdout).await
    }

    /// Restores raw mode and the screen whenever the process is continued after being stopped.
    async fn watch_for_stops(&self) -> std::convert::Infallible {
        let Ok(mut continued) = signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw())) else {
            return std::future::pending().await;
        };
        loop {
            continued.recv().await;
            if let Some(raw) = &self.raw {
                // If the terminal is no longer ours, a signal or a read error will end the process.
                let _ = raw.reenter();
                self.session.borrow_mut().drawn_over();
                self.reopen.notify_one();
            }
        }
    }

    /// The program has ended: returns its exit code, or the server's error if the weaver was deleted or has expired.
    async fn exited(&self, code: i32) -> Result<i32> {
        let weaver = format!("/api/weavers/{}", self.weaver);
        match timeout(EXIT_REASON_TIMEOUT, self.client.get::<Weaver>(&weaver)).await {
            Ok(Err(error)) if error.code() == Some(ErrorCode::WeaverGone) => Err(error.into()),
            _ => Ok(code),
        }
    }

    /// Attaching is no longer possible: returns the program's exit code if it has ended, or else the error.
    async fn ended(&self, error: ClientError) -> Result<i32> {
        if error.code() == Some(ErrorCode::WeaverGone)
            && let Ok(weaver) = self.client.get::<Weaver>(&format!("/api/weavers/{}", self.weaver)).await
            && let Some(code) = weaver.exit_code
        {
            return Ok(code);
        }
        Err(CliError::from(error).doing(if self.drawn.get() { "the attach has ended" } else { "cannot attach" }))
    }

    /// Starts a new line for the final message, if necessary.
    fn begin_line(&self) -> Result<()> {
        if self.on_terminal && self.line_is_open.get() {
            // Also clears what the program drew below the cursor.
            output::bytes(b"\r\n\x1b[J")?;
        }
        Ok(())
    }

    /// Prints how the attach ended.
    fn report(&self, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Detached => {
                output::note(&detached(self.weaver));
                Ok(Exit::OK)
            }
            Outcome::Exited(code) => {
                output::note(&format!("The program exited with code {code}."));
                Ok(Exit::of_program(code))
            }
        }
    }
}

/// Errors that a retry cannot fix.
const fn ends_the_attach(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::Unauthorized
            | ErrorCode::Forbidden
            | ErrorCode::WeaverNotFound
            | ErrorCode::NotFound
            | ErrorCode::WeaverGone
            | ErrorCode::InvalidRequest
    )
}

fn path(weaver: WeaverId, query: &AttachQuery) -> String {
    let AttachQuery { rows, cols, read_only, client, offset, terminal } = query;
    let mut path = format!("/api/weavers/{weaver}/attach?rows={rows}&cols={cols}&read_only={read_only}");
    let mut push = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = write!(path, "&{name}={value}");
        }
    };
    push("client", client.map(|client| client.to_string()));
    push("offset", offset.map(|offset| offset.to_string()));
    push("terminal", terminal.map(|terminal| terminal.to_string()));
    path
}

fn detached(weaver: WeaverId) -> String {
    format!("Detached. The weaver is still running. To come back: loom attach {weaver}")
}

fn expiring(seconds: u64) -> String {
    match seconds {
        0..=90 => format!("the weaver ends in {seconds} s; save your work"),
        _ => format!("the weaver ends in {} min; to extend it: loom extend", seconds.div_ceil(60)),
    }
}

/// Draws a text on the last row and puts the cursor back.
fn notice(text: &str, rows: u16, cols: u16) -> String {
    let text: String = format!(" loom: {text} ").chars().take(usize::from(cols.saturating_sub(1))).collect();
    format!("\x1b7\x1b[{rows};1H\x1b[0;7m{text}\x1b[0m\x1b[K\x1b8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reconnection_says_where_to_continue() {
        let weaver = WeaverId::from(Uuid::nil());
        let client = Some(Uuid::from_u128(1));
        let first = AttachQuery { rows: 24, cols: 80, read_only: false, client, offset: None, terminal: None };
        assert_eq!(
            path(weaver, &first),
            "/api/weavers/W-00000000-0000-0000-0000-000000000000/attach?rows=24&cols=80&read_only=false\
             &client=00000000-0000-0000-0000-000000000001"
        );
        let again = AttachQuery { offset: Some(7), terminal: Some(Uuid::from_u128(2)), read_only: true, ..first };
        assert!(path(weaver, &again).ends_with("&offset=7&terminal=00000000-0000-0000-0000-000000000002"));
    }

    #[test]
    fn detaching_says_how_to_reattach() {
        assert_eq!(
            detached(WeaverId::from(Uuid::nil())),
            "Detached. The weaver is still running. To come back: loom attach W-00000000-0000-0000-0000-000000000000"
        );
    }

    #[test]
    fn the_end_is_announced_in_minutes_and_then_in_seconds() {
        assert!(expiring(900).contains("15 min") && expiring(299).contains("5 min") && expiring(60).contains("60 s"));
    }

    #[test]
    fn a_notice_fits_into_the_window_and_puts_the_cursor_back() {
        let notice = notice("connection lost", 24, 10);
        assert!(notice.starts_with("\x1b7\x1b[24;1H") && notice.ends_with("\x1b8"), "{notice:?}");
        assert!(notice.contains(" loom: co\x1b["), "{notice:?}");
    }
}
