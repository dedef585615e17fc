//! The main program's terminal, shared by everybody who attaches.
//!
//! [`state`] is all that it is and knows, [`screen`] the model behind its snapshots, [`scan`] the grammar beside the
//! model, [`ring`] the end of the output. This module puts them on descriptors and sockets: one task moves the
//! program's output into the state and wakes the clients; each client's connection pulls from the state what it is to
//! be sent, and pushes input into one bounded queue, which another task writes to the program.

mod ring;
mod scan;
mod screen;
mod state;

use std::io;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use loom_api::attach::{AttachQuery, ClientControl};
use parking_lot::{Mutex, MutexGuard};
use rustix::process::{Pid, Signal};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
};
use tokio_util::codec::{FramedRead, FramedWrite};
use uuid::Uuid;

use self::state::{ClientId, Next, Output, TerminalState};
use super::{children::Child, process::resize_terminal, stream::Stream};
use crate::protocol::{ExitStatus, Frame, FrameCodec, FrameKind, MAX_FRAME};

/// How much of the output's end is kept for the report of the exit, in bytes.
const TAIL: usize = 64 << 10;
/// How many pieces of input may wait for the program, each at most [`INPUT_PIECE`].
const INPUT_QUEUE: usize = 16;
/// The largest piece of input, in bytes.
const INPUT_PIECE: usize = 16 << 10;

/// A terminal's rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: u16,
    pub(super) cols: u16,
}

impl Size {
    /// The largest size that fits into both.
    fn min(self, other: Self) -> Self {
        Self { rows: self.rows.min(other.rows), cols: self.cols.min(other.cols) }
    }
}

/// The main program's terminal.
pub(super) struct Terminal {
    state: Mutex<TerminalState>,
    /// Says that the state has changed.
    changed: watch::Sender<()>,
    input: mpsc::Sender<Bytes>,
    leader: Pid,
    login_shell: bool,
}

/// The program's side of a [`Terminal`], for [`Terminal::run`].
pub(super) struct Program {
    child: Child,
    terminal: Stream,
    input: mpsc::Receiver<Bytes>,
}

impl Terminal {
    /// The size that the program starts with.
    pub(super) fn initial_size() -> Size {
        TerminalState::new(Uuid::nil()).size()
    }

    /// A terminal for a program that was just started on one.
    pub(super) fn new(child: Child, terminal: Stream, login_shell: bool) -> (Self, Program) {
        let leader = child.pid;
        let (input, queue) = mpsc::channel(INPUT_QUEUE);
        let state = Mutex::new(TerminalState::new(Uuid::new_v4()));
        let (changed, _) = watch::channel(());
        (Self { state, changed, input, leader, login_shell }, Program { child, terminal, input: queue })
    }

    /// Moves bytes between the program and the state until the program has ended and all its output was taken.
    pub(super) async fn run(&self, program: Program) -> ExitStatus {
        let Program { mut child, terminal, mut input } = program;
        let output = async {
            while let Ok(bytes) = terminal.read().await {
                if bytes.is_empty() {
                    break;
                }
                self.change(|state| state.feed(&bytes));
            }
            // Everybody has closed the other side; the program itself may go on without a terminal.
            std::future::pending::<()>().await;
        };
        let typing = async {
            while let Some(bytes) = input.recv().await {
                if terminal.write_all(&bytes).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let sizing = async {
            let mut changed = self.changed.subscribe();
            let mut size = Self::initial_size();
            loop {
                let wanted = self.lock().size();
                if wanted != size && resize_terminal(&terminal, wanted.rows, wanted.cols).is_ok() {
                    size = wanted;
                }
                if changed.changed().await.is_err() {
                    break;
                }
            }
        };
        let status = tokio::select! {
            status = &mut child.exit => status.unwrap_or(ExitStatus { code: 255, signal: None, core_dumped: false }),
            () = output => unreachable!("it waits for ever"),
            () = typing => unreachable!("it waits for ever"),
            () = sizing => unreachable!("the state is ours"),
        };
        // Whatever the program wrote before it ended is there now: the kernel flushes a terminal before it says
        // "nothing".
        while let Ok(Some(bytes)) = terminal.read_now() {
            if bytes.is_empty() {
                break;
            }
            self.change(|state| state.feed(&bytes));
        }
        self.change(|state| state.end(status.code));
        status
    }

    /// The program's process group.
    pub(super) const fn leader(&self) -> Pid {
        self.leader
    }

    /// What the program is sent for a signal to the host: that signal. A shell at its prompt ignores `SIGTERM`, so
    /// it is hung up on too.
    pub(super) fn signals_for(&self, signal: Signal) -> Vec<Signal> {
        if self.login_shell && signal == Signal::TERM { vec![signal, Signal::HUP, Signal::CONT] } else { vec![signal] }
    }

    /// The end of the output.
    pub(super) fn tail(&self) -> Bytes {
        self.lock().output().tail(TAIL)
    }

    /// Tells everybody who is attached that the weaver ends soon.
    pub(super) fn announce_expiry(&self, seconds: u64) {
        self.change(|state| state.announce_expiry(seconds));
    }

    /// Serves a client until it leaves or has heard the end.
    pub(super) async fn attach(&self, stream: UnixStream, query: &AttachQuery) -> io::Result<()> {
        let changed = self.changed.subscribe();
        let id = self.change(|state| state.join(query, Uuid::new_v4()));
        let _leaves = Leaves { terminal: self, id };
        let (read, write) = stream.into_split();
        tokio::select! {
            result = self.send_output(id, changed, FramedWrite::new(write, FrameCodec::large())) => result,
            result = self.take_input(id, FramedRead::new(read, FrameCodec::large())) => result,
        }
    }

    async fn send_output(
        &self,
        id: ClientId,
        mut changed: watch::Receiver<()>,
        mut frames: FramedWrite<impl tokio::io::AsyncWrite + Unpin, FrameCodec>,
    ) -> io::Result<()> {
        loop {
            changed.mark_unchanged();
            // Taken out of the lock before it is sent.
            let next = self.lock().poll(id);
            match next {
                Next::Send(Output::Control(control)) => frames.send(Frame::json(FrameKind::Text, &control)).await?,
                Next::Send(Output::Bytes(bytes)) => frames.send(Frame::new(FrameKind::Binary, bytes)).await?,
                Next::Done => return Ok(()),
                Next::Wait => {
                    if changed.changed().await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn take_input(
        &self,
        id: ClientId,
        mut frames: FramedRead<impl tokio::io::AsyncRead + Unpin, FrameCodec>,
    ) -> io::Result<()> {
        while let Some(frame) = frames.next().await.transpose()? {
            match frame.kind {
                FrameKind::Binary => self.type_in(id, frame.payload).await,
                FrameKind::Text => {
                    // What this build does not know is a newer client's, and no reason to part.
                    if let Ok(ClientControl::Resize { rows, cols }) = serde_json::from_slice(&frame.payload) {
                        self.change(|state| state.resize(id, rows, cols));
                    }
                }
                _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that an attach does not have")),
            }
        }
        Ok(())
    }

    /// Queues input for the program, waiting while the queue is full.
    async fn type_in(&self, id: ClientId, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(INPUT_PIECE));
            // First a place, then the count: what is counted as arrived is surely in the queue.
            let Ok(place) = self.input.reserve().await else { return };
            if !self.change(|state| state.accept_input(id, piece.len())) {
                return;
            }
            place.send(piece);
        }
    }

    /// Sends the output from the oldest byte kept, and with `follow` on to the end. What is overtaken meanwhile is left
    /// out.
    pub(super) async fn logs(&self, stream: UnixStream, follow: bool) -> io::Result<()> {
        let mut changed = self.changed.subscribe();
        let (read, write) = stream.into_split();
        let mut frames = FramedWrite::new(write, FrameCodec::stream());
        let send = async {
            let mut place = self.lock().output().start();
            let last = self.lock().output().end();
            loop {
                changed.mark_unchanged();
                let (bytes, ended) = {
                    let state = self.lock();
                    place = place.max(state.output().start());
                    (state.output().get(place, MAX_FRAME).unwrap_or_default(), state.exit().is_some())
                };
                if !bytes.is_empty() {
                    place += bytes.len() as u64;
                    frames.send(Frame::new(FrameKind::Stdout, bytes)).await?;
                } else if ended || !follow || changed.changed().await.is_err() {
                    return Ok(());
                }
                if !follow && place >= last {
                    return Ok(());
                }
            }
        };
        tokio::select! {
            result = send => result,
            // A reader who has gone would otherwise be noticed only at the next output.
            result = super::socket::closed(read) => result,
        }
    }

    fn change<T>(&self, act: impl FnOnce(&mut TerminalState) -> T) -> T {
        let result = act(&mut self.lock());
        self.changed.send_replace(());
        result
    }

    fn lock(&self) -> MutexGuard<'_, TerminalState> {
        self.state.lock()
    }
}

/// Takes a client out of the state, however its connection ends.
struct Leaves<'a> {
    terminal: &'a Terminal,
    id: ClientId,
}

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.terminal.change(|state| state.leave(self.id));
    }
}
