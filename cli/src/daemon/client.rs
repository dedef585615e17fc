//! A command's side of the daemon's socket; it starts the daemon when there is none.

use std::{
    fs,
    io::Read as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use loom_api::Secret;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
};
use tokio::{net::UnixStream, time::timeout};

use super::{
    SOCKET,
    protocol::{self, Greeting, Operation, Reply, Request, TunnelStatus},
    runtime_directory,
};
use crate::{
    context::Context,
    error::{CliError, Exit, Result},
    output,
};

/// A starting daemon may have to wait for its predecessor to end.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// For a daemon's greeting, and for its end after [`Operation::Stop`].
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to start a daemon that ends before it can be asked.
const MAX_TRIES: usize = 4;
/// In bytes; a longer log is emptied when the daemon starts.
const MAX_LOG_SIZE: u64 = 1 << 20;

/// An open stream to a port of a weaver.
pub(crate) struct Connected {
    pub(crate) stream: UnixStream,
    pub(crate) weaver: String,
    /// The public key line of the server's SSH CA.
    pub(crate) ssh_ca: String,
}

/// Opens a stream to a port of a weaver, through its tunnel.
pub(crate) async fn connect(context: &Context, weaver: &str, port: u16) -> Result<Connected> {
    let operation = Operation::Connect { weaver: weaver.to_owned(), port };
    match request(context, operation).await? {
        (stream, Reply::Connected { weaver, ssh_ca }) => Ok(Connected { stream, weaver, ssh_ca }),
        (_, other) => Err(unexpected(&other)),
    }
}

/// Brings a tunnel up, takes tunnels down, or asks about them.
pub(crate) async fn tunnels(context: &Context, operation: Operation) -> Result<Vec<TunnelStatus>> {
    match request(context, operation).await? {
        (_, Reply::Tunnels { tunnels }) => Ok(tunnels),
        (_, Reply::Done) => Ok(Vec::new()),
        (_, other) => Err(unexpected(&other)),
    }
}

/// As [`tunnels`], but starts no daemon: without one there are no tunnels.
pub(crate) async fn tunnels_if_running(context: &Context, operation: Operation) -> Result<Vec<TunnelStatus>> {
    let socket = runtime_directory()?.join(SOCKET);
    if UnixStream::connect(&socket).await.is_err() { Ok(Vec::new()) } else { tunnels(context, operation).await }
}

async fn request(context: &Context, operation: Operation) -> Result<(UnixStream, Reply)> {
    let (server_url, token, authorities) = match operation {
        Operation::Connect { .. } | Operation::Up { .. } => {
            (context.server_url()?, context.token()?, context.authorities()?)
        }
        // These need no server, so they work after a logout too.
        Operation::Down { .. } | Operation::Status { .. } | Operation::Stop => {
            (String::new(), Secret::from(String::new()), String::new())
        }
    };
    let request = Request { server_url, token, authorities, operation };
    let mut stream = daemon(&request).await?;
    protocol::write(&mut stream, &request).await?;
    match protocol::read(&mut stream).await {
        Ok(Reply::Failed { exit, message, hint }) => Err(failed(exit, message, hint)),
        Ok(reply) => Ok((stream, reply)),
        Err(error) => Err(CliError::failure(format!("the loom daemon ended unexpectedly: {error}"))
            .hint("try again; its log says why")),
    }
}

fn failed(exit: u8, message: String, hint: Option<String>) -> CliError {
    let error = CliError::new(Exit(exit), message);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn unexpected(reply: &Reply) -> CliError {
    CliError::failure(format!("the loom daemon gave an unexpected answer: {reply:?}"))
}

/// Connects to the daemon, and starts one if none runs or the running one is idle and of another version.
async fn daemon(request: &Request) -> Result<UnixStream> {
    let directory = runtime_directory()?;
    for _ in 0..MAX_TRIES {
        if let Some((mut stream, greeting)) = connect_to_running(&directory).await? {
            if greeting.version == env!("CARGO_PKG_VERSION") {
                return Ok(stream);
            }
            if greeting.busy {
                output::warning(&format!(
                    "the running loom daemon is version {} and busy; to replace it, run: loom tunnel down",
                    greeting.version
                ));
                return Ok(stream);
            }
            // The daemon started next waits for this one to end.
            let stop = Request { operation: Operation::Stop, ..request.clone() };
            if protocol::write(&mut stream, &stop).await.is_ok() {
                let _ = timeout(GREETING_TIMEOUT, protocol::read::<Reply>(&mut stream)).await;
            }
        }
        let directory = directory.clone();
        let started = tokio::task::spawn_blocking(move || start(&directory)).await;
        started.map_err(|error| CliError::failure(format!("starting the loom daemon: {error}")))??;
    }
    Err(CliError::failure("the loom daemon exits right after it starts").hint(log_hint()))
}

/// Connects to the running daemon, if there is one, and reads its greeting.
async fn connect_to_running(directory: &Path) -> Result<Option<(UnixStream, Greeting)>> {
    let Ok(mut stream) = UnixStream::connect(directory.join(SOCKET)).await else { return Ok(None) };
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw()) {
        return Err(CliError::failure(format!(
            "{} belongs to another user's program",
            directory.join(SOCKET).display()
        )));
    }
    match timeout(GREETING_TIMEOUT, protocol::read(&mut stream)).await {
        Ok(Ok(greeting)) => Ok(Some((stream, greeting))),
        // The daemon was about to end.
        Ok(Err(_)) => Ok(None),
        Err(_) => Err(CliError::new(Exit::TIMED_OUT, "the loom daemon does not answer").hint(log_hint())),
    }
}

fn log_hint() -> String {
    state_directory().map_or_else(
        |error| error.to_string(),
        |directory| format!("its log says why: {}", directory.join("daemon.log").display()),
    )
}

/// Starts a daemon and returns once it serves. If several commands try at once, one starts it and the others wait.
fn start(directory: &Path) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| CliError::failure(format!("cannot start the loom daemon: {error}"));
    let turn = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("start.lock"));
    let turn = turn.map_err(|error| failed(&error))?;
    // No process holds the lock for longer than `START_TIMEOUT`.
    flock(&turn, FlockOperation::LockExclusive).map_err(|error| failed(&error))?;
    if std::os::unix::net::UnixStream::connect(directory.join(SOCKET)).is_ok() {
        return Ok(());
    }
    let program = std::env::current_exe().map_err(|error| failed(&error))?;
    let mut child = std::process::Command::new(program)
        .arg("daemon")
        .env_remove("LOOM_TOKEN")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log().map_or_else(|_| Stdio::null(), Stdio::from))
        .spawn()
        .map_err(|error| failed(&error))?;
    // Not waited for: the daemon outlives this command.
    let mut ready = child.stdout.take().ok_or_else(|| failed(&"it has no standard output"))?;
    let mut polled = [PollFd::new(&ready, PollFlags::IN)];
    let patience = Timespec::try_from(START_TIMEOUT).map_err(|error| failed(&error))?;
    match poll(&mut polled, Some(&patience)) {
        Ok(0) => Err(CliError::new(Exit::TIMED_OUT, "the loom daemon did not start in time").hint(log_hint())),
        Ok(_) if matches!(ready.read(&mut [0; 16]), Ok(1..)) => Ok(()),
        Ok(_) => Err(failed(&"it exited at once").hint(log_hint())),
        Err(error) => Err(failed(&error)),
    }
}

/// Opens the daemon's log, and empties it if it is too long.
fn log() -> Result<fs::File> {
    let directory = state_directory()?;
    let open = || -> std::io::Result<fs::File> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        let log = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("daemon.log"))?;
        if log.metadata()?.len() > MAX_LOG_SIZE {
            log.set_len(0)?;
        }
        Ok(log)
    };
    open()
        .map_err(|error| CliError::failure(format!("cannot open the daemon's log in {}: {error}", directory.display())))
}

fn state_directory() -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("XDG_STATE_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("loom"))
        .ok_or_else(|| CliError::failure("no directory for the daemon's log: neither XDG_STATE_HOME nor HOME is set"))
}
