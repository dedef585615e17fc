//! `loom attach`: a person at a weaver's main terminal.
//!
//! Three things go on at once until one of them ends the attach: the keyboard is read ([`detach`] finds the keys that
//! leave), the connection is kept (a broken one is replaced for as long as the weaver lives; [`session`] knows what the
//! next one has to ask for and to send again), and the process may have been stopped for a while. The user's own
//! terminal is put back by [`crate::terminal`]; [`alternate`] tells it which screen is shown.

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
    session::{Frame, Session, Told},
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

/// Between two signs of life on a quiet connection.
const PING: Duration = Duration::from_secs(8);
/// A connection on which nothing came for so long is dead: two pings were not answered.
const DEAD: Duration = Duration::from_secs(20);
/// How long the beginning of the detach keys waits for its rest before the program gets it.
const HOLD: Duration = Duration::from_millis(500);
/// How long a connection may be away before the person is told.
const TELL_AFTER: Duration = Duration::from_secs(2);
/// A connection that lived for so long was a good one.
const GOOD: Duration = Duration::from_secs(5);
/// How long the last output may take on its way to the terminal.
const LAST_WRITE: Duration = Duration::from_millis(500);
/// How long the server may take to say why the program ended.
const WHY: Duration = Duration::from_secs(2);
/// Ctrl+C.
const INTERRUPT: u8 = 3;

/// Joins a weaver's main terminal.
///
/// Never a new session: everybody who attaches sees and types into the same one. Leave it with Ctrl+D, or Ctrl+P
/// Ctrl+Q; the program goes on. A connection that breaks is replaced, and nothing is lost. Returns the program's exit
/// code when it ends.
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
    /// The weaver: its id, the beginning of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// Watch only
    #[arg(long)]
    read_only: bool,
    /// The keys that leave [default: "ctrl-d ctrl-p,ctrl-q"]
    #[arg(long, value_name = "KEYS")]
    detach_keys: Option<DetachKeys>,
}

#[derive(Debug, Default)]
pub(super) struct Options {
    read_only: bool,
    detach_keys: Option<DetachKeys>,
    /// The weaver has just been made: that its program has ended already is an outcome, not a mistake.
    just_made: bool,
}

impl Options {
    /// How `loom new` attaches.
    pub(super) fn just_made() -> Self {
        Self { just_made: true, ..Self::default() }
    }
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let weaver: Weaver =
        client.get(&super::weaver_path(&args.id)?).await.doing(format_args!("cannot attach to {}", args.id))?;
    let options = Options { read_only: args.read_only, detach_keys: args.detach_keys.clone(), just_made: false };
    attach(context, &client, weaver.id, options).await
}

/// Attaches to the weaver's main terminal until the person leaves or the program ends.
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
    // Before the terminal is raw: an error here is an ordinary one.
    let outcome = match attachment.connect().await {
        Ok(socket) => {
            if io::stdin().is_terminal() {
                let raw = RawMode::enter().map_err(|error| {
                    CliError::failure(format!("cannot attach: the terminal cannot be made raw: {error}"))
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
        Err(error) if options.just_made => attachment.ended(error).await.map(Outcome::Exited),
        Err(error) => return Err(CliError::from(error).doing("cannot attach")),
    };
    if matches!(outcome, Ok(Outcome::Exited(_))) && !attachment.drawn.get() {
        // It was over before there was anything to see.
        let _ = timeout(LAST_WRITE, stdout.write_all(&logs::of_ended(client, weaver).await)).await;
    }
    let _ = timeout(LAST_WRITE, stdout.flush()).await;
    attachment.raw = None;
    attachment.begin_line()?;
    attachment.report(outcome?)
}

/// How an attach ends well.
enum Outcome {
    /// The user detached.
    Detached,
    /// The program ended with this code.
    Exited(i32),
}

/// What ended one connection.
enum End {
    /// The connection was lost; the next one follows.
    Broken,
    /// The attach has ended.
    Final(Outcome),
}

/// The parts that the activities share. They run on one thread, one at a time.
struct Attachment<'a> {
    client: &'a Client,
    weaver: WeaverId,
    read_only: bool,
    session: RefCell<Session>,
    /// There may be input to send.
    typed: Notify,
    /// There may be room for input.
    room: Notify,
    /// The connection is to be replaced, for a redrawn screen.
    reopen: Notify,
    raw: Option<RawMode>,
    on_terminal: bool,
    alternate: RefCell<Alternate>,
    /// The first snapshot has come.
    drawn: Cell<bool>,
    /// The cursor may stand behind something on its line.
    line_is_open: Cell<bool>,
}

impl Attachment<'_> {
    /// Reads the keyboard until the person leaves. The end of the input is not the end of the attach.
    async fn keyboard(&self, mut matcher: Option<Matcher>) -> Outcome {
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; 16 << 10];
        loop {
            while !self.session.borrow().has_room() {
                self.room.notified().await;
            }
            let holds = matcher.as_ref().is_some_and(Matcher::holds);
            let read =
                if holds { timeout(HOLD, stdin.read(&mut buffer)).await } else { Ok(stdin.read(&mut buffer).await) };
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
            if self.read_only && typed.contains(&INTERRUPT) {
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

    /// Keeps a connection until the program has ended or nobody can attach any more.
    async fn network(&self, mut socket: WebSocket, stdout: &mut Stdout) -> Result<Outcome> {
        let mut backoff = Backoff::default();
        loop {
            let opened = Instant::now();
            self.session.borrow_mut().reconnected();
            let (mut sink, mut stream) = socket.split();
            let end = tokio::select! {
                end = self.downstream(&mut stream, stdout) => end?,
                () = self.upstream(&mut sink) => End::Broken,
                () = self.reopen.notified() => End::Broken,
            };
            if let End::Final(outcome) = end {
                return Ok(outcome);
            }
            if opened.elapsed() >= GOOD {
                backoff.reset();
            }
            socket = match self.reconnect(&mut backoff, stdout).await? {
                Ok(socket) => socket,
                Err(error) => return self.ended(error).await.map(Outcome::Exited),
            };
        }
    }

    /// Tries until there is a connection; the inner error says that there will be none.
    async fn reconnect(&self, backoff: &mut Backoff, stdout: &mut Stdout) -> Result<Result<WebSocket, ClientError>> {
        let since = Instant::now();
        let mut told = false;
        loop {
            backoff.wait().await;
            match self.connect().await {
                Ok(socket) => return Ok(Ok(socket)),
                Err(error) if error.code().is_some_and(ends_the_attach) => return Ok(Err(error)),
                Err(_) if !told && since.elapsed() >= TELL_AFTER => {
                    told = true;
                    self.tell("connection lost; trying again", stdout).await?;
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

    /// Sends input, the window's size and signs of life, until the connection breaks.
    async fn upstream(&self, sink: &mut SplitSink<WebSocket, Message>) {
        let Ok(mut resized) = signal(SignalKind::window_change()) else { return };
        let mut ping = interval(PING);
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
    async fn downstream(&self, stream: &mut SplitStream<WebSocket>, stdout: &mut Stdout) -> Result<End> {
        loop {
            let Ok(Some(Ok(message))) = timeout(DEAD, stream.next()).await else { return Ok(End::Broken) };
            match message {
                Message::Binary(bytes) => {
                    let frame = self.session.borrow_mut().output(bytes.len());
                    // Told before it is shown, so that whatever ends us here puts back too much rather than too little.
                    if let Some(raw) = &self.raw {
                        raw.alternate_screen(self.alternate.borrow_mut().feed(&bytes));
                    }
                    if frame == Frame::Snapshot && !self.drawn.replace(true) {
                        self.keep_what_is_shown(stdout).await?;
                    }
                    self.write(&bytes, stdout).await?;
                    self.line_is_open.set(frame == Frame::Snapshot || bytes.last().is_some_and(|byte| *byte != b'\n'));
                }
                Message::Text(text) => {
                    // What this build does not know is a newer server's, and no reason to part.
                    let Ok(control) = serde_json::from_str::<ServerControl>(&text) else { continue };
                    let told = self.session.borrow_mut().control(control);
                    self.typed.notify_one();
                    self.room.notify_one();
                    match told {
                        Told::Nothing | Told::Attached => {}
                        Told::Expiring(seconds) => self.tell(&expiring(seconds), stdout).await?,
                        Told::Exited(code) => {
                            return self.exited(code).await.map(|code| End::Final(Outcome::Exited(code)));
                        }
                        Told::Refused(error) if ends_the_attach(error.code) => {
                            return self.ended(error.into()).await.map(|code| End::Final(Outcome::Exited(code)));
                        }
                        Told::Refused(_) => return Ok(End::Broken),
                    }
                }
                Message::Close(_) => return Ok(End::Broken),
                _ => {}
            }
        }
    }

    /// Scrolls what the person's terminal shows out of the way of the first drawing, which clears the window.
    async fn keep_what_is_shown(&self, stdout: &mut Stdout) -> Result<()> {
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

    /// Tells the person something: on the last row of the terminal, which the program may soon draw over; else on
    /// standard error.
    async fn tell(&self, text: &str, stdout: &mut Stdout) -> Result<()> {
        let Some((rows, cols)) = self.window().filter(|_| self.raw.is_some()) else {
            output::note(&format!("loom: {text}"));
            return Ok(());
        };
        self.session.borrow_mut().drawn_over();
        self.write(notice(text, rows, cols).as_bytes(), stdout).await
    }

    /// The terminal must be made raw and drawn again when the process was stopped and goes on.
    async fn watch_for_stops(&self) -> std::convert::Infallible {
        let Ok(mut continued) = signal(SignalKind::from_raw(rustix::process::Signal::CONT.as_raw())) else {
            return std::future::pending().await;
        };
        loop {
            continued.recv().await;
            if let Some(raw) = &self.raw {
                // A terminal that is no longer ours will end us by other means.
                let _ = raw.again();
                self.session.borrow_mut().drawn_over();
                self.reopen.notify_one();
            }
        }
    }

    /// The program has ended. If that is because the weaver was deleted or its time was up, the server says so.
    async fn exited(&self, code: i32) -> Result<i32> {
        let weaver = format!("/api/weavers/{}", self.weaver);
        match timeout(WHY, self.client.get::<Weaver>(&weaver)).await {
            Ok(Err(error)) if error.code() == Some(ErrorCode::WeaverGone) => Err(error.into()),
            _ => Ok(code),
        }
    }

    /// Nobody can attach any more. If that is because the program has ended, its code.
    async fn ended(&self, error: ClientError) -> Result<i32> {
        if error.code() == Some(ErrorCode::WeaverGone)
            && let Ok(weaver) = self.client.get::<Weaver>(&format!("/api/weavers/{}", self.weaver)).await
            && let Some(code) = weaver.exit_code
        {
            return Ok(code);
        }
        Err(CliError::from(error).doing("cannot attach"))
    }

    /// What is said at the end stands on a line of its own.
    fn begin_line(&self) -> Result<()> {
        if self.on_terminal && self.line_is_open.get() {
            // What the program drew below the cursor is not to stand beside the message.
            output::bytes(b"\r\n\x1b[J")?;
        }
        Ok(())
    }

    /// Says how the attach ended.
    fn report(&self, outcome: Outcome) -> Result<Exit> {
        match outcome {
            Outcome::Detached => {
                output::note(&detached(self.weaver));
                Ok(Exit::OK)
            }
            Outcome::Exited(code) => {
                output::note(&format!("The program has ended with code {code}."));
                Ok(Exit::of_program(code))
            }
        }
    }
}

/// Errors after which another try would end the same.
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

/// The address to connect to.
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
        _ => format!("the weaver ends in {} min; loom extend moves that", seconds.div_ceil(60)),
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
    fn a_connection_names_what_it_goes_on_from() {
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
    fn who_leaves_learns_how_to_come_back() {
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
