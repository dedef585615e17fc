//! The main program's terminal, shared by all attached clients.
//!
//! [`state`] is the state machine, [`screen`] the screen model behind its snapshots, [`scan`] the parser for sequences
//! that the model ignores, [`ring`] the last part of the output. This module connects them to descriptors and sockets:
//! one task moves the program's output into the state and wakes the clients; each client's connection pulls from the
//! state what to send, and pushes input into one bounded queue, which another task writes to the program.

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

/// How much of the last output is in the report of the exit, in bytes.
const TAIL: usize = 64 << 10;
/// Pieces of input that may wait for the program, each at most [`MAX_PIECE`].
const INPUT_QUEUE: usize = 16;
/// In bytes.
const MAX_PIECE: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) rows: u16,
    pub(super) cols: u16,
}

impl Size {
    /// The smaller of both in each dimension.
    fn min(self, other: Self) -> Self {
        Self { rows: self.rows.min(other.rows), cols: self.cols.min(other.cols) }
    }
}

pub(super) struct Terminal {
    state: Mutex<TerminalState>,
    /// Notifies the clients' connections that the state has changed.
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
    /// The size of the terminal before a client has attached.
    pub(super) fn initial_size() -> Size {
        TerminalState::new(Uuid::nil()).size()
    }

    /// A terminal for a program that was just started on it.
    pub(super) fn new(child: Child, terminal: Stream, login_shell: bool) -> (Self, Program) {
        let leader = child.pid;
        let (input, queue) = mpsc::channel(INPUT_QUEUE);
        let state = Mutex::new(TerminalState::new(Uuid::new_v4()));
        let (changed, _) = watch::channel(());
        (Self { state, changed, input, leader, login_shell }, Program { child, terminal, input: queue })
    }

    /// Moves bytes between the program and the state until the program has ended and all its output was read.
    pub(super) async fn run(&self, program: Program) -> ExitStatus {
        let Program { mut child, terminal, mut input } = program;
        let output = async {
            while let Ok(bytes) = terminal.read().await {
                if bytes.is_empty() {
                    break;
                }
                self.change(|state| state.feed(&bytes));
            }
            // All processes have closed the terminal; the program itself may go on without it.
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
            () = output => unreachable!("never returns"),
            () = typing => unreachable!("never returns"),
            () = sizing => unreachable!("the state outlives this"),
        };
        // All that the program wrote is available now: the kernel flushes a terminal before a read would block.
        while let Ok(Some(bytes)) = terminal.read_now() {
            if bytes.is_empty() {
                break;
            }
            self.change(|state| state.feed(&bytes));
        }
        self.change(|state| state.end(status.code));
        status
    }

    pub(super) const fn leader(&self) -> Pid {
        self.leader
    }

    /// The signals to forward to the program for one to the host. A shell at its prompt ignores `SIGTERM`, so it also
    /// gets `SIGHUP`.
    pub(super) fn signals_for(&self, signal: Signal) -> Vec<Signal> {
        if self.login_shell && signal == Signal::TERM { vec![signal, Signal::HUP, Signal::CONT] } else { vec![signal] }
    }

    /// The last output, at most [`TAIL`] bytes.
    pub(super) fn tail(&self) -> Bytes {
        self.lock().output().tail(TAIL)
    }

    /// Tells all attached clients that the weaver ends in so many seconds.
    pub(super) fn announce_expiry(&self, seconds: u64) {
        self.change(|state| state.announce_expiry(seconds));
    }

    /// Serves a client until it disconnects or has received the exit status.
    pub(super) async fn attach(&self, stream: UnixStream, query: &AttachQuery) -> io::Result<()> {
        let changed = self.changed.subscribe();
        let id = self.change(|state| state.join(query, Uuid::new_v4()));
        let _leaves = DetachGuard { terminal: self, id };
        let (read, write) = stream.into_split();
        tokio::select! {
            result = self.send_output(id, changed, FramedWrite::new(write, FrameCodec::large())) => result,
            result = self.receive_input(id, FramedRead::new(read, FrameCodec::large())) => result,
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
            // In a statement of its own, so that the lock is released before sending.
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

    async fn receive_input(
        &self,
        id: ClientId,
        mut frames: FramedRead<impl tokio::io::AsyncRead + Unpin, FrameCodec>,
    ) -> io::Result<()> {
        while let Some(frame) = frames.next().await.transpose()? {
            match frame.kind {
                FrameKind::Binary => self.queue_input(id, frame.payload).await,
                FrameKind::Text => {
                    // Ignore messages of a newer client.
                    if let Ok(ClientControl::Resize { rows, cols }) = serde_json::from_slice(&frame.payload) {
                        self.change(|state| state.resize(id, rows, cols));
                    }
                }
                _ => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a frame that does not belong to an attach",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Queues input for the program, waiting while the queue is full.
    async fn queue_input(&self, id: ClientId, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(MAX_PIECE));
            // Reserve first, then count: input counted as arrived must be in the queue.
            let Ok(permit) = self.input.reserve().await else { return };
            if !self.change(|state| state.accept_input(id, piece.len())) {
                return;
            }
            permit.send(piece);
        }
    }

    /// Sends the output from the oldest byte kept, and with `follow` until the program ends. Skips output that was
    /// dropped from the ring before it could be sent.
    pub(super) async fn logs(&self, stream: UnixStream, follow: bool) -> io::Result<()> {
        let mut changed = self.changed.subscribe();
        let (read, write) = stream.into_split();
        let mut frames = FramedWrite::new(write, FrameCodec::stream());
        let send = async {
            let mut offset = self.lock().output().start();
            let last = self.lock().output().end();
            loop {
                changed.mark_unchanged();
                let (bytes, ended) = {
                    let state = self.lock();
                    offset = offset.max(state.output().start());
                    (state.output().get(offset, MAX_FRAME).unwrap_or_default(), state.exit().is_some())
                };
                if !bytes.is_empty() {
                    offset += bytes.len() as u64;
                    frames.send(Frame::new(FrameKind::Stdout, bytes)).await?;
                } else if ended || !follow || changed.changed().await.is_err() {
                    return Ok(());
                }
                if !follow && offset >= last {
                    return Ok(());
                }
            }
        };
        tokio::select! {
            result = send => result,
            // Otherwise a closed connection would be noticed only at the next output.
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

/// Removes a client from the state when its connection ends, for whatever reason.
struct DetachGuard<'a> {
    terminal: &'a Terminal,
    id: ClientId,
}

impl Drop for DetachGuard<'_> {
    fn drop(&mut self) {
        self.terminal.change(|state| state.leave(self.id));
    }
}
