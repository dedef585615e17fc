//! The client's side of the protocol, used by the sidecar.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use loom_api::attach::AttachQuery;
use tokio::{
    io::AsyncRead,
    net::{
        TcpStream, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Semaphore,
    time::Instant,
};
use tokio_util::codec::{FramedRead, FramedWrite};

use super::{
    ExecRequest, ExitStatus, Failure, Frame, FrameCodec, FrameKind, HostState, MAX_FRAME, MAX_LARGE_FRAME, Reply,
    Request, STDIN_WINDOW, StartRequest, WindowSize, connect, read_message, socket_path, write_message,
};
use crate::passing;

/// For the host's socket to appear: the two containers start together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts.
const CONNECT_RETRY: Duration = Duration::from_millis(20);

/// Why an operation on the host failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The host has not started yet or is gone, or something else listens in its place.
    #[error("the process host does not answer at {}: {source}", path.display())]
    Unreachable {
        path: PathBuf,
        /// The last attempt's error.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the process host broke: {0}")]
    Connection(#[from] io::Error),
    /// The host, or the session, is gone.
    #[error("the process host ended the session without a result")]
    Gone,
    /// The host does not speak this protocol.
    #[error("unexpected answer from the process host: {0}")]
    Protocol(&'static str),
    /// The host answered with a failure.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// A client for the host in one run directory. Cheap to clone; each call opens a connection.
#[derive(Debug, Clone)]
pub struct HostClient {
    run_dir: Arc<Path>,
    host_pid: Option<i32>,
}

impl HostClient {
    /// A client for the host whose socket is in `run_dir`. Does not connect yet.
    #[must_use]
    pub fn new(run_dir: impl AsRef<Path>) -> Self {
        Self { run_dir: run_dir.as_ref().into(), host_pid: None }
    }

    /// Accepts only this process, as seen from the client's PID namespace, as the host. By default any process of the
    /// client's user is accepted.
    #[must_use]
    pub fn expecting(self, host_pid: Option<i32>) -> Self {
        Self { host_pid, ..self }
    }

    /// Starts the main program, unless it was started before.
    ///
    /// # Errors
    ///
    /// [`HostError::Refused`] when the program cannot be started.
    pub async fn start(&self, request: StartRequest) -> Result<(), HostError> {
        self.open(&Request::Start(request)).await.map(drop)
    }

    /// The current state of the main program and the listening ports.
    pub async fn state(&self) -> Result<HostState, HostError> {
        self.watch().await?.next().await?.ok_or(HostError::Gone)
    }

    /// The state of the main program and the listening ports, now and at every change.
    pub async fn watch(&self) -> Result<StateStream, HostError> {
        let stream = self.open(&Request::Watch).await?;
        Ok(StateStream { frames: FramedRead::new(stream, FrameCodec::large()) })
    }

    /// Runs a program. It gets `SIGHUP` if both halves of the session are dropped before it has ended.
    ///
    /// # Errors
    ///
    /// [`HostError::Refused`] when it cannot be run ([`Failure::exit_code`] is the shell's code for that).
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecSession, HostError> {
        let (read, write) = self.open(&Request::Exec(request)).await?.into_split();
        let window = Arc::new(Semaphore::new(STDIN_WINDOW));
        Ok(ExecSession {
            input: ExecInput { frames: SendHalf::new(write, FrameCodec::stream()), window: Arc::clone(&window) },
            output: ExecOutput { frames: FramedRead::new(read, FrameCodec::stream()), window, ended: false },
        })
    }

    /// Attaches to the main terminal; the session carries the frames of [`loom_api::attach`].
    pub async fn attach(&self, query: AttachQuery) -> Result<AttachSession, HostError> {
        let (read, write) = self.open(&Request::Attach(query)).await?.into_split();
        Ok(AttachSession {
            input: AttachInput { frames: SendHalf::new(write, FrameCodec::large()) },
            output: AttachOutput { frames: FramedRead::new(read, FrameCodec::large()) },
        })
    }

    /// The main program's output from the oldest byte kept, with `follow` until the program ends.
    pub async fn logs(&self, follow: bool) -> Result<LogStream, HostError> {
        let stream = self.open(&Request::Logs { follow }).await?;
        Ok(LogStream { frames: FramedRead::new(stream, FrameCodec::stream()) })
    }

    /// Connects to a TCP port in the weaver: `127.0.0.1`, `::1`, then the addresses that listen on it. The host connects
    /// the socket in the weaver's network and passes it to us.
    ///
    /// # Errors
    ///
    /// [`HostError::Refused`] with [`super::FailureKind::PortRefused`] when nothing accepts there.
    pub async fn dial(&self, port: u16) -> Result<TcpStream, HostError> {
        let mut stream = self.connect().await?;
        write_message(&mut stream, &Request::Dial { port }).await?;
        let (reply, descriptor) = passing::receive(&stream).await?;
        let reply: Reply = serde_json::from_slice(&reply).map_err(|_| HostError::Protocol("a malformed reply"))?;
        accepted(reply)?;
        let descriptor = descriptor.ok_or(HostError::Protocol("a reply to a dial without a socket"))?;
        let socket = std::net::TcpStream::from(descriptor);
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(TcpStream::from_std(socket)?)
    }

    /// Tells all attached clients that the weaver ends in so many seconds.
    pub async fn expiring(&self, seconds: u64) -> Result<(), HostError> {
        self.open(&Request::Expiring { seconds }).await.map(drop)
    }

    /// Connects, sends the request, and reads the reply.
    async fn open(&self, request: &Request) -> Result<UnixStream, HostError> {
        let mut stream = self.connect().await?;
        write_message(&mut stream, request).await?;
        let reply = match read_message(&mut stream).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(HostError::Gone),
            reply => reply?,
        };
        accepted(reply)?;
        Ok(stream)
    }

    async fn connect(&self) -> Result<UnixStream, HostError> {
        let give_up = Instant::now() + CONNECT_TIMEOUT;
        loop {
            let source = match connect::connect(&self.run_dir, self.host_pid).await {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            let absent = matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            if !absent || Instant::now() >= give_up {
                return Err(HostError::Unreachable { path: socket_path(&self.run_dir), source });
            }
            tokio::time::sleep(CONNECT_RETRY).await;
        }
    }
}

fn accepted(reply: Reply) -> Result<(), HostError> {
    match reply {
        Reply::Ok => Ok(()),
        Reply::Failed(failure) => Err(failure.into()),
    }
}

/// The result of [`HostClient::watch`].
#[derive(Debug)]
pub struct StateStream {
    frames: FramedRead<UnixStream, FrameCodec>,
}

impl StateStream {
    /// The next state; `None` when the host has ended. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<HostState>, HostError> {
        let Some(frame) = next(&mut self.frames).await? else {
            return Ok(None);
        };
        json(&frame, FrameKind::State).map(Some)
    }
}

/// A running program. The two halves may be used in different tasks.
#[derive(Debug)]
pub struct ExecSession {
    pub input: ExecInput,
    pub output: ExecOutput,
}

/// The sending half. Dropping it does not end the input; call [`ExecInput::eof`].
///
/// When the program has ended, all methods fail with [`HostError::Gone`]. That is not a failure of the session: the
/// remaining output and the exit status still come from [`ExecOutput::next`].
#[derive(Debug)]
pub struct ExecInput {
    frames: SendHalf,
    window: Arc<Semaphore>,
}

impl ExecInput {
    /// Sends standard input of any length. Waits until the program has read earlier input, which needs another task to
    /// keep calling [`ExecOutput::next`]. When cancelled, a part may have been sent.
    pub async fn data(&mut self, mut bytes: Bytes) -> Result<(), HostError> {
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(MAX_FRAME));
            let credit = u32::try_from(part.len()).expect("a frame's length fits");
            self.window.acquire_many(credit).await.map_err(|_| HostError::Gone)?.forget();
            self.frames.send(Frame::new(FrameKind::Stdin, part)).await?;
        }
        Ok(())
    }

    /// Ends the input.
    pub async fn eof(&mut self) -> Result<(), HostError> {
        self.frames.send(Frame::new(FrameKind::StdinEof, Bytes::new())).await
    }

    /// Sets the terminal's size.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), HostError> {
        self.frames.send(Frame::json(FrameKind::Resize, &WindowSize { rows, cols })).await
    }

    /// Signals the program's process group, by the signal's SSH name (`INT`, `TERM`, …). Unknown names are ignored.
    pub async fn signal(&mut self, name: &str) -> Result<(), HostError> {
        self.frames.send(Frame::new(FrameKind::Signal, name.as_bytes().to_vec())).await
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct ExecOutput {
    frames: FramedRead<OwnedReadHalf, FrameCodec>,
    window: Arc<Semaphore>,
    ended: bool,
}

/// What a program sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// Standard output, or the terminal's output.
    Stdout(Bytes),
    Stderr(Bytes),
    /// Comes after all output.
    Exit(ExitStatus),
}

impl ExecOutput {
    /// The next event; `None` after [`ExecEvent::Exit`]. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`HostError::Gone`] when the host ended the session without an exit.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, HostError> {
        if self.ended {
            return Ok(None);
        }
        loop {
            let frame = next(&mut self.frames).await?.ok_or(HostError::Gone)?;
            return Ok(Some(match frame.kind {
                FrameKind::Stdout => ExecEvent::Stdout(frame.payload),
                FrameKind::Stderr => ExecEvent::Stderr(frame.payload),
                FrameKind::Exit => {
                    self.ended = true;
                    self.window.close();
                    ExecEvent::Exit(json(&frame, FrameKind::Exit)?)
                }
                FrameKind::Window => {
                    self.open_window(&frame.payload)?;
                    continue;
                }
                _ => return Err(HostError::Protocol("a frame that does not belong to an exec")),
            }));
        }
    }

    fn open_window(&self, payload: &[u8]) -> Result<(), HostError> {
        let taken =
            payload.try_into().map(u32::from_be_bytes).map_err(|_| HostError::Protocol("a malformed window"))?;
        let taken = taken as usize;
        if self.window.available_permits() + taken > STDIN_WINDOW {
            return Err(HostError::Protocol("a window beyond its maximum"));
        }
        self.window.add_permits(taken);
        Ok(())
    }
}

impl Drop for ExecOutput {
    fn drop(&mut self) {
        // Nothing would open the window any more.
        self.window.close();
    }
}

/// An attached terminal. The two halves may be used in different tasks; dropping both detaches.
#[derive(Debug)]
pub struct AttachSession {
    pub input: AttachInput,
    pub output: AttachOutput,
}

/// A WebSocket frame of [`loom_api::attach`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachFrame {
    /// Terminal input or output.
    Binary(Bytes),
    /// A control message as JSON.
    Text(String),
}

/// The sending half.
#[derive(Debug)]
pub struct AttachInput {
    frames: SendHalf,
}

impl AttachInput {
    /// Forwards a client's frame.
    ///
    /// # Errors
    ///
    /// [`HostError::Protocol`] when it is longer than [`MAX_LARGE_FRAME`].
    pub async fn send(&mut self, frame: AttachFrame) -> Result<(), HostError> {
        let frame = match frame {
            AttachFrame::Binary(bytes) => Frame::new(FrameKind::Binary, bytes),
            AttachFrame::Text(text) => Frame::new(FrameKind::Text, text),
        };
        if frame.payload.len() > MAX_LARGE_FRAME {
            return Err(HostError::Protocol("a frame longer than allowed"));
        }
        self.frames.send(frame).await
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct AttachOutput {
    frames: FramedRead<OwnedReadHalf, FrameCodec>,
}

impl AttachOutput {
    /// The next frame for the client; `None` after the last. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<AttachFrame>, HostError> {
        let Some(frame) = next(&mut self.frames).await? else {
            return Ok(None);
        };
        match frame.kind {
            FrameKind::Binary => Ok(Some(AttachFrame::Binary(frame.payload))),
            FrameKind::Text => String::from_utf8(frame.payload.into())
                .map(|text| Some(AttachFrame::Text(text)))
                .map_err(|_| HostError::Protocol("a text frame that is not UTF-8")),
            _ => Err(HostError::Protocol("a frame that does not belong to an attach")),
        }
    }
}

/// The main program's output.
#[derive(Debug)]
pub struct LogStream {
    frames: FramedRead<UnixStream, FrameCodec>,
}

impl LogStream {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, HostError> {
        match next(&mut self.frames).await? {
            None => Ok(None),
            Some(Frame { kind: FrameKind::Stdout, payload }) => Ok(Some(payload)),
            Some(_) => Err(HostError::Protocol("a frame that does not belong to logs")),
        }
    }
}

/// The next frame; `None` at the end, also when the host closed the connection without reading all that we sent.
async fn next<R: AsyncRead + Unpin>(frames: &mut FramedRead<R, FrameCodec>) -> Result<Option<Frame>, HostError> {
    match frames.next().await.transpose() {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        frame => Ok(frame?),
    }
}

fn json<T: serde::de::DeserializeOwned>(frame: &Frame, kind: FrameKind) -> Result<T, HostError> {
    if frame.kind != kind {
        return Err(HostError::Protocol("a frame of an unexpected kind"));
    }
    serde_json::from_slice(&frame.payload).map_err(|_| HostError::Protocol("a malformed frame"))
}

/// The sending half of a session. Dropping it does not shut down the connection: the host would take that for a
/// disconnect, while the other half may still be receiving.
#[derive(Debug)]
struct SendHalf(Option<FramedWrite<OwnedWriteHalf, FrameCodec>>);

impl SendHalf {
    fn new(write: OwnedWriteHalf, codec: FrameCodec) -> Self {
        Self(Some(FramedWrite::new(write, codec)))
    }

    async fn send(&mut self, frame: Frame) -> Result<(), HostError> {
        let sink = self.0.as_mut().expect("taken only when dropped");
        sink.send(frame).await.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => HostError::Gone,
            _ => HostError::Connection(error),
        })
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if let Some(sink) = self.0.take() {
            sink.into_inner().forget();
        }
    }
}
