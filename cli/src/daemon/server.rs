//! The daemon: serves commands on its socket until it has been idle for a while.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use loom_tunnel::forward::splice;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::interval,
};
use tokio_util::sync::CancellationToken;

use super::{
    SOCKET,
    protocol::{self, Greeting, Operation, Reply, Request},
    runtime_directory,
    server_link::ServerLink,
    weaver::Weaver,
};
use crate::error::{CliError, Exit, Result};

/// The daemon exits after being unused for this long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// The same after the last tunnel was taken down.
const IDLE_TIMEOUT_AFTER_DOWN: Duration = Duration::from_secs(2);
/// Between two checks whether the daemon is idle and whether the clock has jumped.
const TICK: Duration = Duration::from_secs(1);
/// If the wall clock advances this much more than the monotonic one, the machine has slept.
const CLOCK_JUMP: Duration = Duration::from_secs(3);
/// For removing this device at a server.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// For the previous daemon to exit.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(8);
/// For a command to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Concurrent connections of commands; more wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
const WORKER_THREADS: usize = 2;

struct Daemon {
    links: Mutex<HashMap<String, Arc<ServerLink>>>,
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    taken_down: AtomicBool,
    stop: CancellationToken,
}

/// Runs until the daemon is idle or told to stop. Writes a line to standard output once it serves.
///
/// # Errors
///
/// When the socket's directory or the runtime cannot be set up.
pub(crate) async fn run() -> Result<Exit> {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("LOOM_LOG").unwrap_or_else(|_| "info,boringtun=off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    // A session of its own, so that the daemon outlives the terminal it was started from.
    let _ = rustix::process::setsid();
    let directory = runtime_directory()?;
    let failed = |error: std::io::Error| CliError::failure(format!("cannot start the loom daemon: {error}"));
    // `main`'s runtime has one thread, so that commands start fast; the tunnels' data needs more.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .map_err(failed)?;
    let (sender, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("daemon".to_owned()).spawn(move || {
        // The main thread waits for the result.
        let _ = sender.send(runtime.block_on(serve_from(&directory)));
        runtime.shutdown_background();
    });
    thread.map_err(failed)?;
    ended.await.map_err(|_| CliError::failure("the loom daemon failed; its log says why"))?
}

async fn serve_from(directory: &Path) -> Result<Exit> {
    let lock = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("daemon.lock"))?;
    // Commands start one daemon at a time, so whoever holds the lock is usually about to end.
    let began = Instant::now();
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        if began.elapsed() > PREDECESSOR_TIMEOUT {
            return Err(CliError::failure(format!(
                "another loom daemon does not exit; it holds the lock in {}",
                directory.display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let path = directory.join(SOCKET);
    let temporary = directory.join("daemon.sock.new");
    // We hold the lock, so this can only be left from a daemon that crashed.
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, &path)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the daemon is ready");
    report_ready();

    let daemon = Arc::new(Daemon {
        links: Mutex::default(),
        streams: AtomicUsize::new(0),
        last_used: Mutex::new(Instant::now()),
        taken_down: AtomicBool::new(false),
        stop: CancellationToken::new(),
    });
    let mut connections = JoinSet::new();
    let served = serve(&daemon, &listener, &mut connections).await;
    // The socket first: commands then start another daemon, which waits for the lock until our listeners are closed.
    let _ = fs::remove_file(&path);
    drop(listener);
    connections.shutdown().await;
    let links: Vec<_> = daemon.links.lock().drain().map(|(_, link)| link).collect();
    futures_util::future::join_all(links.iter().map(|link| shut_down(link))).await;
    tracing::info!("the daemon exits");
    drop(lock);
    served.map(|()| Exit::OK)
}

async fn shut_down(link: &ServerLink) {
    if tokio::time::timeout(SHUTDOWN_TIMEOUT, link.shutdown()).await.is_err() {
        tracing::info!("cannot tell a server that this device is gone: timed out");
    }
}

/// Tells the command that started this daemon, which reads our standard output, and closes that.
fn report_ready() {
    let written = std::io::stdout().write_all(b"ready\n").and_then(|()| std::io::stdout().flush());
    let null = fs::OpenOptions::new().write(true).open("/dev/null");
    if let Err(error) = written.and(null).and_then(|null| Ok(rustix::stdio::dup2_stdout(&null)?)) {
        tracing::debug!("cannot report readiness: {error}");
    }
}

async fn serve(daemon: &Arc<Daemon>, listener: &UnixListener, connections: &mut JoinSet<()>) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut tick = interval(TICK);
    let mut clocks = (Instant::now(), SystemTime::now());
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Perhaps out of file descriptors. Existing tunnels go on.
                        tracing::warn!("cannot accept a command's connection: {error}");
                        tokio::time::sleep(TICK).await;
                        continue;
                    }
                };
                let daemon = Arc::clone(daemon);
                connections.spawn(async move {
                    if let Err(error) = daemon.handle(stream).await {
                        tracing::debug!("a command's connection ended: {error}");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
            _ = tick.tick() => {
                if daemon.is_idle() {
                    return Ok(());
                }
                if has_slept(&mut clocks) {
                    tracing::info!("the machine has slept; probing all paths");
                    daemon.links().iter().for_each(|link| link.network_changed());
                }
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = daemon.stop.cancelled() => return Ok(()),
        }
    }
}

/// Whether the machine has slept since the last call: the monotonic clock stands still meanwhile, the wall clock does
/// not.
fn has_slept((then, wall_then): &mut (Instant, SystemTime)) -> bool {
    let (now, wall_now) = (Instant::now(), SystemTime::now());
    let wall = wall_now.duration_since(*wall_then).unwrap_or_default();
    let slept = wall > now.duration_since(*then) + CLOCK_JUMP;
    (*then, *wall_then) = (now, wall_now);
    slept
}

impl Daemon {
    fn links(&self) -> Vec<Arc<ServerLink>> {
        self.links.lock().values().cloned().collect()
    }

    fn is_busy(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0 || self.links().iter().any(|link| link.has_up())
    }

    fn is_idle(&self) -> bool {
        let limit = if self.taken_down.load(Ordering::Relaxed) { IDLE_TIMEOUT_AFTER_DOWN } else { IDLE_TIMEOUT };
        let mut last_used = self.last_used.lock();
        if self.is_busy() {
            *last_used = Instant::now();
        }
        last_used.elapsed() > limit
    }

    async fn handle(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let uid = rustix::process::geteuid().as_raw();
        if stream.peer_cred()?.uid() != uid {
            return Err(std::io::Error::other("another user's process"));
        }
        protocol::write(&mut stream, &Greeting { version: env!("CARGO_PKG_VERSION").to_owned(), busy: self.is_busy() })
            .await?;
        let request: Request = tokio::time::timeout(REQUEST_TIMEOUT, protocol::read(&mut stream)).await??;
        *self.last_used.lock() = Instant::now();
        let operation = request.operation.clone();
        self.taken_down.store(matches!(operation, Operation::Down { .. }), Ordering::Relaxed);
        let reply = match operation {
            Operation::Connect { weaver, port } => {
                let connected = tokio::select! {
                    connected = self.connect(&request, &weaver, port) => connected,
                    () = closed(&stream) => return Ok(()),
                };
                match connected {
                    Ok((weaver, connection)) => {
                        let _used = weaver.begin_use();
                        let _open = StreamCount::new(&self.streams);
                        let reply = Reply::Connected { weaver: weaver.id.to_string(), ssh_ca: weaver.ssh_ca() };
                        protocol::write(&mut stream, &reply).await?;
                        return splice(stream, connection).await.map(drop);
                    }
                    Err(error) => Err(error),
                }
            }
            Operation::Up { weaver, forwards, socks } => self.up(&request, &weaver, &forwards, socks).await,
            Operation::Down { weaver } => self.down(weaver.as_deref()).await,
            Operation::Status { weaver } => self.status(weaver.as_deref()),
            Operation::Stop => {
                self.stop.cancel();
                // The closed connection is the reply: it comes after the socket is removed.
                return std::future::pending().await;
            }
        };
        let reply = reply.unwrap_or_else(|error| {
            let hint = error.hint_text().map(ToOwned::to_owned);
            Reply::Failed { exit: error.exit().0, message: error.to_string(), hint }
        });
        protocol::write(&mut stream, &reply).await
    }

    /// The link to the request's server, made at the first request.
    fn link(&self, request: &Request) -> Result<Arc<ServerLink>> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(&request.server_url) {
            link.renew_client(&request.token, &request.authorities)?;
            return Ok(Arc::clone(link));
        }
        let link = Arc::new(ServerLink::new(&request.server_url, &request.token, &request.authorities)?);
        links.insert(request.server_url.clone(), Arc::clone(&link));
        Ok(link)
    }

    /// Replaces a link whose key the server rejects: the user has changed, or another server has the old one's URL.
    async fn replace(&self, rejected: &Arc<ServerLink>, request: &Request) -> Result<Arc<ServerLink>> {
        tracing::info!(server = request.server_url, "the server or the user has changed; using a new device key");
        {
            let mut links = self.links.lock();
            if links.get(&request.server_url).is_some_and(|link| Arc::ptr_eq(link, rejected)) {
                links.remove(&request.server_url);
            }
        }
        shut_down(rejected).await;
        self.link(request)
    }

    async fn connect(
        &self,
        request: &Request,
        weaver: &str,
        port: u16,
    ) -> Result<(Arc<Weaver>, loom_tunnel::TunnelStream)> {
        let link = self.link(request)?;
        match link.connect(weaver, port).await {
            Err(_) if link.is_rejected() => self.replace(&link, request).await?.connect(weaver, port).await,
            result => result,
        }
    }

    async fn up(
        &self,
        request: &Request,
        weaver: &str,
        forwards: &[protocol::Forward],
        socks: Option<std::net::SocketAddr>,
    ) -> Result<Reply> {
        let mut link = self.link(request)?;
        let mut result = link.up(weaver, forwards, socks).await;
        if result.is_err() && link.is_rejected() {
            link = self.replace(&link, request).await?;
            result = link.up(weaver, forwards, socks).await;
        }
        Ok(Reply::Tunnels { tunnels: vec![result?.status(&link)] })
    }

    async fn down(&self, reference: Option<&str>) -> Result<Reply> {
        for (link, weaver) in self.select(reference)? {
            link.down(&weaver).await;
        }
        for link in self.links() {
            link.ended(true);
        }
        Ok(Reply::Done)
    }

    fn status(&self, reference: Option<&str>) -> Result<Reply> {
        let mut tunnels: Vec<_> = self.select(reference)?.iter().map(|(link, weaver)| weaver.status(link)).collect();
        if reference.is_none() {
            tunnels.extend(self.links().iter().flat_map(|link| link.ended(false)));
        }
        Ok(Reply::Tunnels { tunnels })
    }

    /// The weaver that `reference` names, or all that have a tunnel.
    fn select(&self, reference: Option<&str>) -> Result<Vec<(Arc<ServerLink>, Arc<Weaver>)>> {
        let links = self.links();
        let Some(reference) = reference else {
            let of = |link: &Arc<ServerLink>| {
                link.weavers().into_iter().map(|weaver| (Arc::clone(link), weaver)).collect::<Vec<_>>()
            };
            return Ok(links.iter().flat_map(of).collect());
        };
        let known = links.into_iter().find_map(|link| link.find(reference).map(|weaver| (link, weaver)));
        known.map(|known| vec![known]).ok_or_else(|| {
            CliError::failure(format!("there is no tunnel to {reference}"))
                .hint(format!("bring it up: loom tunnel up {reference}"))
        })
    }
}

/// Waits until a command closes its connection; it sends nothing more before the reply.
async fn closed(stream: &UnixStream) {
    loop {
        let read = match stream.readable().await {
            Ok(()) => stream.try_read(&mut [0]),
            Err(error) => Err(error),
        };
        if !read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock) {
            return;
        }
    }
}

/// Counts an open stream until dropped.
struct StreamCount<'a>(&'a AtomicUsize);

impl<'a> StreamCount<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for StreamCount<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
