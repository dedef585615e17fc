//! One exec: a program and a connection, and the data between them.
//!
//! Everything runs in the connection's task, as futures polled together. The client's frames are always read, so that a
//! resize, a signal or a disconnect gets through even when the program does not read its input; output is read only as
//! fast as the client takes it. The session ends when the program has ended and its output is sent, or when the client
//! disconnects: then the program gets `SIGHUP`.

use std::{
    io,
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::{
    process::{Pid, Signal},
    termios::{LocalModes, SpecialCodeIndex, tcgetattr},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    sync::mpsc,
};
use tokio_util::{
    codec::{FramedRead, FramedWrite},
    sync::CancellationToken,
};

use super::{
    Host,
    children::{Child, signal_named},
    process::{self, PipedProcess, ProcessDefaults, TerminalProcess, resize_terminal, signal_foreground},
    stream::Stream,
};
use crate::protocol::{ExecRequest, ExitStatus, Failure, Frame, FrameCodec, FrameKind, Pty, STDIN_WINDOW, WindowSize};

/// How long to wait for output after the program has ended, while other processes keep its pipes open: enough for a
/// `tee` to finish, without waiting for a daemon that it started.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);
/// Frames waiting to be written to the connection.
const OUTPUT_QUEUE: usize = 4;

/// A program started for a client.
pub(super) struct Session {
    child: Child,
    descriptors: Descriptors,
}

enum Descriptors {
    Pipes { stdin: Option<Stream>, stdout: Stream, stderr: Stream },
    Terminal(Stream),
}

impl Session {
    pub(super) fn start(host: &Host, defaults: &ProcessDefaults, request: &ExecRequest) -> Result<Self, Failure> {
        let term = request.pty.as_ref().map(|pty| pty.term.as_str());
        let command = defaults.command(&request.program, &request.env, request.cwd.as_deref(), term)?;
        Ok(match &request.pty {
            None => {
                let PipedProcess { child, stdin, stdout, stderr } = process::spawn_piped(&host.children, command)?;
                Self { child, descriptors: Descriptors::Pipes { stdin: Some(stdin), stdout, stderr } }
            }
            Some(Pty { rows, cols, .. }) => {
                let or = |given: u16, default| if given == 0 { default } else { given };
                let (rows, cols) = (or(*rows, 24), or(*cols, 80));
                let TerminalProcess { child, terminal } =
                    process::spawn_on_terminal(&host.children, command, rows, cols)?;
                Self { child, descriptors: Descriptors::Terminal(terminal) }
            }
        })
    }

    /// Runs the session until the program has ended or the client has disconnected.
    pub(super) async fn run(self, host: &Host, stream: UnixStream) -> io::Result<()> {
        let Self { mut child, mut descriptors } = self;
        let stdin = descriptors.take_stdin();
        let target = Target { host, leader: child.pid, terminal: descriptors.terminal() };
        let (read, write) = stream.into_split();
        let (frames, queue) = mpsc::channel(OUTPUT_QUEUE);
        let (typed, typing) = mpsc::unbounded_channel();
        let window = AtomicUsize::new(0);
        let conversation = async {
            let output = deliver(&mut child, &descriptors, &frames);
            let ((), result) = tokio::join!(output, send(queue, FramedWrite::new(write, FrameCodec::stream())));
            result
        };
        let input = async {
            feed(typing, stdin, target.terminal, &window, &frames).await;
            std::future::pending().await
        };
        let shutdown = async {
            host.ending.cancelled().await;
            target.hang_up();
            std::future::pending().await
        };
        let result = tokio::select! {
            result = conversation => return result,
            result = target.listen(FramedRead::new(read, FrameCodec::stream()), &typed, &window) => result,
            result = input => result,
            result = shutdown => result,
        };
        target.hang_up();
        result
    }
}

impl Descriptors {
    fn take_stdin(&mut self) -> Option<Stream> {
        match self {
            Self::Pipes { stdin, .. } => stdin.take(),
            Self::Terminal(_) => None,
        }
    }

    const fn terminal(&self) -> Option<&Stream> {
        match self {
            Self::Pipes { .. } => None,
            Self::Terminal(terminal) => Some(terminal),
        }
    }
}

/// The program that a client's frames act on.
struct Target<'a> {
    host: &'a Host,
    leader: Pid,
    terminal: Option<&'a Stream>,
}

impl Target<'_> {
    /// Handles the client's frames until it disconnects. Input goes to `typed`, which the window bounds: a client that
    /// sends more is disconnected.
    async fn listen(
        &self,
        mut frames: FramedRead<impl AsyncRead + Unpin, FrameCodec>,
        typed: &mpsc::UnboundedSender<Option<Bytes>>,
        window: &AtomicUsize,
    ) -> io::Result<()> {
        while let Some(Frame { kind, payload }) = frames.next().await.transpose()? {
            match kind {
                FrameKind::Stdin => {
                    let ahead = window.fetch_add(payload.len(), Ordering::Relaxed) + payload.len();
                    if ahead > STDIN_WINDOW {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "more input than the window allows"));
                    }
                    // Fails only after the program has closed its input.
                    let _ = typed.send(Some(payload));
                }
                FrameKind::StdinEof => {
                    let _ = typed.send(None);
                }
                FrameKind::Resize => {
                    if let (Some(terminal), Ok(WindowSize { rows, cols })) =
                        (self.terminal, serde_json::from_slice(&payload))
                    {
                        resize_terminal(terminal, rows, cols)?;
                    }
                }
                FrameKind::Signal => {
                    if let Some(signal) = std::str::from_utf8(&payload).ok().and_then(signal_named) {
                        self.signal(signal);
                    }
                }
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that only the host sends")),
            }
        }
        Ok(())
    }

    /// Signals the foreground group of the terminal, or without a terminal the program's process group.
    fn signal(&self, signal: Signal) {
        match self.terminal {
            Some(terminal) => signal_foreground(terminal, signal),
            None => self.host.children.signal_group(self.leader, signal),
        }
    }

    /// Sends `SIGHUP`, as a terminal does when its line drops. Processes may end or continue without it.
    fn hang_up(&self) {
        self.signal(Signal::HUP);
        if self.terminal.is_some() {
            self.host.children.signal_group(self.leader, Signal::HUP);
        }
    }
}

/// Writes input to the program and reopens the window by as much, until the input ends.
async fn feed(
    mut typing: mpsc::UnboundedReceiver<Option<Bytes>>,
    mut stdin: Option<Stream>,
    terminal: Option<&Stream>,
    window: &AtomicUsize,
    frames: &mpsc::Sender<Frame>,
) {
    while let Some(typed) = typing.recv().await {
        let Some(bytes) = typed else {
            if let Some(terminal) = terminal {
                end_input(terminal).await;
            }
            return;
        };
        let written = match terminal.or(stdin.as_ref()) {
            Some(stream) => stream.write_all(&bytes).await,
            None => Ok(()),
        };
        if written.is_err() {
            // The program has closed its input, which is not an error; further input is dropped.
            stdin = None;
        }
        window.fetch_sub(bytes.len(), Ordering::Relaxed);
        let taken = u32::try_from(bytes.len()).expect("a frame's length fits");
        if frames.send(Frame::new(FrameKind::Window, taken.to_be_bytes().to_vec())).await.is_err() {
            return;
        }
    }
}

/// Types the end-of-file character: a terminal has no other end of input.
async fn end_input(terminal: &Stream) {
    if let Ok(attributes) = tcgetattr(terminal)
        && attributes.local_modes.contains(LocalModes::ICANON)
    {
        // The program may have ended.
        let _ = terminal.write_all(&[attributes.special_codes[SpecialCodeIndex::VEOF]]).await;
    }
}

/// Sends all output, then the exit status.
async fn deliver(child: &mut Child, descriptors: &Descriptors, frames: &mpsc::Sender<Frame>) {
    let drain = CancellationToken::new();
    let output = async {
        match descriptors {
            Descriptors::Terminal(terminal) => pump(terminal, FrameKind::Stdout, frames, &drain).await,
            Descriptors::Pipes { stdout, stderr, .. } => {
                tokio::join!(
                    pump(stdout, FrameKind::Stdout, frames, &drain),
                    pump(stderr, FrameKind::Stderr, frames, &drain)
                );
            }
        }
    };
    let mut output = pin!(output);
    let mut sent = false;
    let status = loop {
        tokio::select! {
            status = &mut child.exit => break status,
            () = &mut output, if !sent => sent = true,
        }
    };
    if !sent && descriptors.terminal().is_none() {
        sent = tokio::time::timeout(OUTPUT_GRACE, &mut output).await.is_ok();
    }
    if !sent {
        drain.cancel();
        output.await;
    }
    let status = status.unwrap_or(ExitStatus { code: 255, signal: None, core_dumped: false });
    // Fails only when the connection is closed.
    let _ = frames.send(Frame::json(FrameKind::Exit, &status)).await;
}

/// Sends one stream until its end. Once `drain` is cancelled, only sends what is available at that moment.
async fn pump(stream: &Stream, kind: FrameKind, frames: &mpsc::Sender<Frame>, drain: &CancellationToken) {
    loop {
        let bytes = tokio::select! {
            biased;
            () = drain.cancelled() => stream.read_now().ok().flatten().unwrap_or_default(),
            bytes = stream.read() => bytes.unwrap_or_default(),
        };
        if bytes.is_empty() || frames.send(Frame::new(kind, bytes)).await.is_err() {
            return;
        }
    }
}

/// Writes frames to the connection, up to and including the exit status.
async fn send(
    mut queue: mpsc::Receiver<Frame>,
    mut connection: FramedWrite<impl AsyncWrite + Unpin, FrameCodec>,
) -> io::Result<()> {
    while let Some(frame) = queue.recv().await {
        let last = frame.kind == FrameKind::Exit;
        connection.send(frame).await?;
        if last {
            break;
        }
    }
    Ok(())
}
