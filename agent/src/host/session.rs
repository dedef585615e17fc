//! One exec: a program and a connection, and what flows between them.
//!
//! Everything runs in the connection's own task, as futures that are polled together: the client's frames are always
//! read, so that a resize, a signal or the end of the connection gets through even when the program does not read its
//! input; output is read only as fast as the client takes it. The session ends when the program has ended and its
//! output is sent, or when the client has gone: then the program is hung up on.

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
    process::{self, OnTerminal, Piped, Surroundings, resize_terminal, signal_foreground},
    stream::Stream,
};
use crate::protocol::{ExecRequest, ExitStatus, Failure, Frame, FrameCodec, FrameKind, Pty, STDIN_WINDOW, WindowSize};

/// How long output is waited for after the program has ended, while others of its processes keep the pipes open: enough
/// for the `tee` at its end, and not for the daemon that it started.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);
/// How many frames may wait for the connection.
const OUTPUT_QUEUE: usize = 4;

/// A program that was started for a client.
pub(super) struct Session {
    child: Child,
    descriptors: Descriptors,
}

enum Descriptors {
    Pipes { stdin: Option<Stream>, stdout: Stream, stderr: Stream },
    Terminal(Stream),
}

impl Session {
    /// Starts the program.
    ///
    /// # Errors
    ///
    /// When it cannot be run.
    pub(super) fn start(host: &Host, surroundings: &Surroundings, request: &ExecRequest) -> Result<Self, Failure> {
        let term = request.pty.as_ref().map(|pty| pty.term.as_str());
        let command = surroundings.command(&request.program, &request.env, request.cwd.as_deref(), term)?;
        Ok(match &request.pty {
            None => {
                let Piped { child, stdin, stdout, stderr } = process::spawn_piped(&host.children, command)?;
                Self { child, descriptors: Descriptors::Pipes { stdin: Some(stdin), stdout, stderr } }
            }
            Some(Pty { rows, cols, .. }) => {
                let or = |given: u16, default| if given == 0 { default } else { given };
                let (rows, cols) = (or(*rows, 24), or(*cols, 80));
                let OnTerminal { child, terminal } = process::spawn_on_terminal(&host.children, command, rows, cols)?;
                Self { child, descriptors: Descriptors::Terminal(terminal) }
            }
        })
    }

    /// Carries bytes until the program has ended or the client has gone.
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

/// What a client's frames act on.
struct Target<'a> {
    host: &'a Host,
    leader: Pid,
    terminal: Option<&'a Stream>,
}

impl Target<'_> {
    /// Acts on the client's frames until it has gone. Input is handed over; a client that sends more than its window is
    /// cut off, so the queue behind `typed` is bounded by that.
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
                    // Fails only after the program has closed its input: then nobody wants it.
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
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that a client does not send")),
            }
        }
        Ok(())
    }

    /// Signals who is in the foreground of the terminal, or the program's process group when there is none.
    fn signal(&self, signal: Signal) {
        match self.terminal {
            Some(terminal) => signal_foreground(terminal, signal),
            None => self.host.children.signal_group(self.leader, signal),
        }
    }

    /// What a terminal does when its line drops: everybody in it is told, and may end or go on without.
    fn hang_up(&self) {
        self.signal(Signal::HUP);
        if self.terminal.is_some() {
            self.host.children.signal_group(self.leader, Signal::HUP);
        }
    }
}

/// Writes input to the program and gives the window back, until the input ends.
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
            // The program has closed its input, which is no error; what still comes is dropped.
            stdin = None;
        }
        window.fetch_sub(bytes.len(), Ordering::Relaxed);
        let taken = u32::try_from(bytes.len()).expect("a frame's length fits");
        if frames.send(Frame::new(FrameKind::Window, taken.to_be_bytes().to_vec())).await.is_err() {
            return;
        }
    }
}

/// A terminal has no end of input but the character that means it, for programs that read lines.
async fn end_input(terminal: &Stream) {
    if let Ok(attributes) = tcgetattr(terminal)
        && attributes.local_modes.contains(LocalModes::ICANON)
    {
        // The program may be gone.
        let _ = terminal.write_all(&[attributes.special_codes[SpecialCodeIndex::VEOF]]).await;
    }
}

/// Sends all output, and then the exit.
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
    // Fails only when the connection has gone.
    let _ = frames.send(Frame::json(FrameKind::Exit, &status)).await;
}

/// Sends one stream to its end, or, once `drain` says so, what is in it at that moment.
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

/// Writes the frames, until the exit is written.
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
