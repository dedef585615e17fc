//! The host's socket: accepts connections, checks who they are, and serves their requests.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc, time::Duration};

use futures_util::SinkExt as _;
use loom_api::agent::MainState;
use rustix::process::getuid;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::{codec::FramedWrite, task::TaskTracker};

use super::{Host, Main, dial, session::Session};
use crate::{
    passing,
    protocol::{
        ExecRequest, Failure, FailureKind, Frame, FrameCodec, FrameKind, Reply, Request, read_message, socket_path,
        write_message,
    },
};

/// Concurrent connections. A session is one; so is every dial, for a moment.
const MAX_CONNECTIONS: usize = 512;
/// For a client to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request waits for the main program to be started.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after accepting has failed, perhaps for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens in the run directory, accessible to the owner only.
pub(super) fn bind(run_dir: &Path) -> io::Result<UnixListener> {
    let path = socket_path(run_dir);
    match fs::remove_file(&path) {
        // May be left from a host that was killed.
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Accepts connections forever; each is a task of `connections`.
pub(super) async fn serve(host: &Arc<Host>, listener: &UnixListener, connections: &TaskTracker) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let mut stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let full = Failure::new(FailureKind::TooMany, "the weaver has too many connections");
            // Never blocks, as the socket's buffer is empty. If it fails, the client sees the connection close.
            let _ = timeout(ACCEPT_PAUSE, write_message(&mut stream, &Reply::Failed(full))).await;
            continue;
        };
        let host = Arc::clone(host);
        connections.spawn(async move {
            if let Err(error) = Box::pin(connection(&host, stream)).await {
                tracing::debug!(%error, "a connection broke");
            }
            drop(place);
        });
    }
}

async fn connection(host: &Host, mut stream: UnixStream) -> io::Result<()> {
    if stream.peer_cred()?.uid() != getuid().as_raw() {
        tracing::warn!("a connection from another user was closed");
        return Ok(());
    }
    let request = match timeout(REQUEST_TIMEOUT, read_message(&mut stream)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            let failure = Failure::new(FailureKind::InvalidRequest, error.to_string());
            return write_message(&mut stream, &Reply::Failed(failure)).await;
        }
        Ok(request) => request?,
        Err(_) => return Ok(()),
    };
    match request {
        Request::Start(request) => answer(&mut stream, host.start(&request)).await.map(drop),
        Request::Watch => watch(host, stream).await,
        Request::Exec(request) => exec(host, stream, &request).await,
        Request::Attach(query) => match answer(&mut stream, main_program(host).await).await? {
            Some(main) => main.terminal.attach(stream, &query).await,
            None => Ok(()),
        },
        Request::Logs { follow } => match answer(&mut stream, main_program(host).await).await? {
            Some(main) => main.terminal.logs(stream, follow).await,
            None => Ok(()),
        },
        Request::Dial { port } => match dial::dial(port).await {
            Ok(connected) => passing::send(&stream, &Reply::Ok, Some(std::os::fd::AsFd::as_fd(&connected))).await,
            Err(failure) => passing::send(&stream, &Reply::Failed(failure), None).await,
        },
        Request::Expiring { seconds } => {
            if let Some(main) = host.main.borrow().as_deref() {
                main.terminal.announce_expiry(seconds);
            }
            answer(&mut stream, Ok(())).await.map(drop)
        }
    }
}

/// Sends the reply for a result; returns the value if there is one.
async fn answer<T>(stream: &mut UnixStream, result: Result<T, Failure>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => write_message(stream, &Reply::Ok).await.map(|()| Some(value)),
        Err(failure) => write_message(stream, &Reply::Failed(failure)).await.map(|()| None),
    }
}

/// The main program; waits until it is started.
async fn main_program(host: &Host) -> Result<Arc<Main>, Failure> {
    let mut main = host.main.subscribe();
    let started = timeout(START_TIMEOUT, main.wait_for(Option::is_some)).await;
    let started = started.ok().and_then(Result::ok).and_then(|main| main.clone());
    started.ok_or_else(|| Failure::new(FailureKind::NotStarted, "the weaver has not started yet"))
}

async fn exec(host: &Host, mut stream: UnixStream, request: &ExecRequest) -> io::Result<()> {
    let started = match main_program(host).await {
        Ok(_) if host.ending.is_cancelled() => {
            Err(Failure::new(FailureKind::ShuttingDown, "the weaver's main program has ended"))
        }
        Ok(main) => Session::start(host, &main.defaults, request),
        Err(failure) => Err(failure),
    };
    match answer(&mut stream, started).await? {
        Some(session) => session.run(host, stream).await,
        None => Ok(()),
    }
}

async fn watch(host: &Host, mut stream: UnixStream) -> io::Result<()> {
    let mut state = host.state.subscribe();
    host.refresh_ports();
    answer(&mut stream, Ok(())).await?;
    let (read, write) = stream.into_split();
    let mut frames = FramedWrite::new(write, FrameCodec::large());
    let tell = async {
        loop {
            let now = state.borrow_and_update().clone();
            frames.send(Frame::json(FrameKind::State, &now)).await?;
            if matches!(now.main, MainState::Exited { .. }) {
                host.reported.cancel();
            }
            if state.changed().await.is_err() {
                return Ok(());
            }
        }
    };
    tokio::select! {
        result = tell => result,
        result = closed(read) => result,
    }
}

/// Waits until the other side closes the connection; ignores what it sends.
pub(super) async fn closed(mut read: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut ignored = [0; 256];
    while read.read(&mut ignored).await? > 0 {}
    Ok(())
}
