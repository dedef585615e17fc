//! The daemon: it listens on its socket until nobody has needed it for a while.

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
    node::Node,
    protocol::{self, Greeting, Operation, Reply, Request},
    runtime_directory,
    weaver::Weaver,
};
use crate::error::{CliError, Exit, Result};

/// The daemon ends when it was not used for so long.
const IDLE: Duration = Duration::from_secs(300);
/// The same after the last tunnel was taken down.
const IDLE_AFTER_DOWN: Duration = Duration::from_secs(2);
/// How often it looks whether it is needed, and whether the clock has jumped.
const TICK: Duration = Duration::from_secs(1);
/// A wall clock that moves so much more than ours was stopped: the machine slept.
const JUMP: Duration = Duration::from_secs(3);
/// How long a server may take to be told that this device ends.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the daemon before may take to end.
const PREDECESSOR: Duration = Duration::from_secs(8);
/// How long a command may take to say what it wants.
const REQUEST: Duration = Duration::from_secs(10);
/// Commands served at once; more wait to be accepted.
const MOST_CONNECTIONS: usize = 1024;
/// Threads that carry the tunnels' data.
const THREADS: usize = 2;

/// The daemon's state.
struct Daemon {
    nodes: Mutex<HashMap<String, Arc<Node>>>,
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    taken_down: AtomicBool,
    stop: CancellationToken,
}

/// Runs until it is not needed any more, or told to stop. Says so on standard output when it serves.
///
/// # Errors
///
/// When its place or its threads cannot be had.
pub(crate) async fn run() -> Result<Exit> {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("LOOM_LOG").unwrap_or_else(|_| "info,boringtun=off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    // Our session ends with the terminal that we were started from; a session of our own does not.
    let _ = rustix::process::setsid();
    let directory = runtime_directory()?;
    let failed = |error: std::io::Error| CliError::failure(format!("cannot start the loom daemon: {error}"));
    // Commands have one thread, to start fast; data has more.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build().map_err(failed)?;
    let (sender, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("daemon".to_owned()).spawn(move || {
        // Who waits for the result is this process's main thread.
        let _ = sender.send(runtime.block_on(serve_from(&directory)));
        runtime.shutdown_background();
    });
    thread.map_err(failed)?;
    ended.await.map_err(|_| CliError::failure("the loom daemon failed; its log says why"))?
}

async fn serve_from(directory: &Path) -> Result<Exit> {
    let lock = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("daemon.lock"))?;
    // Commands start one daemon at a time, so the lock's holder is mostly one that is about to end.
    let began = Instant::now();
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        if began.elapsed() > PREDECESSOR {
            return Err(CliError::failure(format!(
                "another loom daemon runs and does not end: it locks {}",
                directory.display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let path = directory.join(SOCKET);
    let temporary = directory.join("daemon.sock.new");
    // What is there is from a daemon that has died: the lock is ours.
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, &path)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "the daemon serves");
    say_ready();

    let daemon = Arc::new(Daemon {
        nodes: Mutex::default(),
        streams: AtomicUsize::new(0),
        last_used: Mutex::new(Instant::now()),
        taken_down: AtomicBool::new(false),
        stop: CancellationToken::new(),
    });
    let mut connections = JoinSet::new();
    let served = serve(&daemon, &listener, &mut connections).await;
    // First the socket: who comes now starts another daemon, which waits for the lock until our listeners are closed.
    let _ = fs::remove_file(&path);
    drop(listener);
    connections.shutdown().await;
    let nodes: Vec<_> = daemon.nodes.lock().drain().map(|(_, node)| node).collect();
    futures_util::future::join_all(nodes.iter().map(|node| end(node))).await;
    tracing::info!("the daemon ends");
    drop(lock);
    served.map(|()| Exit::OK)
}

async fn end(node: &Node) {
    if tokio::time::timeout(FAREWELL, node.end()).await.is_err() {
        tracing::info!("a server was not told that this device ends: timed out");
    }
}

/// Tells the command that started us, which waits at the other end of our standard output, and lets go of that.
fn say_ready() {
    let told = std::io::stdout().write_all(b"ready\n").and_then(|()| std::io::stdout().flush());
    let null = fs::OpenOptions::new().write(true).open("/dev/null");
    if let Err(error) = told.and(null).and_then(|null| Ok(rustix::stdio::dup2_stdout(&null)?)) {
        tracing::debug!("nobody waits for the daemon: {error}");
    }
}

async fn serve(daemon: &Arc<Daemon>, listener: &UnixListener, connections: &mut JoinSet<()>) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut tick = interval(TICK);
    let mut clocks = (Instant::now(), SystemTime::now());
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => {
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Out of descriptors, for one. The tunnels that are there go on.
                        tracing::warn!("cannot accept a command's connection: {error}");
                        tokio::time::sleep(TICK).await;
                        continue;
                    }
                };
                let daemon = Arc::clone(daemon);
                connections.spawn(async move {
                    if let Err(error) = daemon.answer(stream).await {
                        tracing::debug!("a command's connection ended: {error}");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
            _ = tick.tick() => {
                if daemon.is_idle() {
                    return Ok(());
                }
                if slept(&mut clocks) {
                    tracing::info!("the machine slept; all paths are tried again");
                    daemon.nodes().iter().for_each(|node| node.network_changed());
                }
            }
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = daemon.stop.cancelled() => return Ok(()),
        }
    }
}

/// Whether the wall clock has gone further than ours, which stands still while the machine sleeps.
fn slept((then, wall_then): &mut (Instant, SystemTime)) -> bool {
    let (now, wall_now) = (Instant::now(), SystemTime::now());
    let wall = wall_now.duration_since(*wall_then).unwrap_or_default();
    let slept = wall > now.duration_since(*then) + JUMP;
    (*then, *wall_then) = (now, wall_now);
    slept
}

impl Daemon {
    fn nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.lock().values().cloned().collect()
    }

    fn is_busy(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0 || self.nodes().iter().any(|node| node.has_up())
    }

    fn is_idle(&self) -> bool {
        let limit = if self.taken_down.load(Ordering::Relaxed) { IDLE_AFTER_DOWN } else { IDLE };
        let mut last_used = self.last_used.lock();
        if self.is_busy() {
            *last_used = Instant::now();
        }
        last_used.elapsed() > limit
    }

    /// Serves one command.
    async fn answer(&self, mut stream: UnixStream) -> std::io::Result<()> {
        let uid = rustix::process::geteuid().as_raw();
        if stream.peer_cred()?.uid() != uid {
            return Err(std::io::Error::other("another user's process"));
        }
        protocol::write(&mut stream, &Greeting { version: env!("CARGO_PKG_VERSION").to_owned(), busy: self.is_busy() })
            .await?;
        let request: Request = tokio::time::timeout(REQUEST, protocol::read(&mut stream)).await??;
        *self.last_used.lock() = Instant::now();
        let operation = request.operation.clone();
        self.taken_down.store(matches!(operation, Operation::Down { .. }), Ordering::Relaxed);
        let reply = match operation {
            Operation::Connect { weaver, port } => {
                let connected = tokio::select! {
                    connected = self.connect(&request, &weaver, port) => connected,
                    () = hung_up(&stream) => return Ok(()),
                };
                match connected {
                    Ok((weaver, connection)) => {
                        let _used = weaver.begin_use();
                        let _open = Open::new(&self.streams);
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
                // Who asked for it hears that it is done when the connection ends, after the socket is gone.
                return std::future::pending().await;
            }
        };
        let reply = reply.unwrap_or_else(|error| {
            let hint = error.advice().map(ToOwned::to_owned);
            Reply::Failed { exit: error.exit().0, message: error.to_string(), hint }
        });
        protocol::write(&mut stream, &reply).await
    }

    /// The node for the request's server; it is made at the first request.
    fn node(&self, request: &Request) -> Result<Arc<Node>> {
        let mut nodes = self.nodes.lock();
        if let Some(node) = nodes.get(&request.server_url) {
            node.renew_client(&request.token, &request.authorities)?;
            return Ok(Arc::clone(node));
        }
        let node = Arc::new(Node::new(&request.server_url, &request.token, &request.authorities)?);
        nodes.insert(request.server_url.clone(), Arc::clone(&node));
        Ok(node)
    }

    /// Another node in place of one that the server refuses, because another of its users had it or it is not the
    /// server that it was.
    async fn instead_of(&self, foreign: &Arc<Node>, request: &Request) -> Result<Arc<Node>> {
        tracing::info!(server = request.server_url, "the server or the user has changed: another device begins");
        {
            let mut nodes = self.nodes.lock();
            if nodes.get(&request.server_url).is_some_and(|node| Arc::ptr_eq(node, foreign)) {
                nodes.remove(&request.server_url);
            }
        }
        end(foreign).await;
        self.node(request)
    }

    async fn connect(
        &self,
        request: &Request,
        weaver: &str,
        port: u16,
    ) -> Result<(Arc<Weaver>, loom_tunnel::TunnelStream)> {
        let node = self.node(request)?;
        match node.connect(weaver, port).await {
            Err(_) if node.is_foreign() => self.instead_of(&node, request).await?.connect(weaver, port).await,
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
        let mut node = self.node(request)?;
        let mut result = node.up(weaver, forwards, socks).await;
        if result.is_err() && node.is_foreign() {
            node = self.instead_of(&node, request).await?;
            result = node.up(weaver, forwards, socks).await;
        }
        Ok(Reply::Tunnels { tunnels: vec![result?.status(&node)] })
    }

    async fn down(&self, reference: Option<&str>) -> Result<Reply> {
        for (node, weaver) in self.chosen(reference)? {
            node.down(&weaver).await;
        }
        for node in self.nodes() {
            node.ended(true);
        }
        Ok(Reply::Done)
    }

    fn status(&self, reference: Option<&str>) -> Result<Reply> {
        let mut tunnels: Vec<_> = self.chosen(reference)?.iter().map(|(node, weaver)| weaver.status(node)).collect();
        if reference.is_none() {
            tunnels.extend(self.nodes().iter().flat_map(|node| node.ended(false)));
        }
        Ok(Reply::Tunnels { tunnels })
    }

    /// The one weaver that is meant, or all that have a tunnel.
    fn chosen(&self, reference: Option<&str>) -> Result<Vec<(Arc<Node>, Arc<Weaver>)>> {
        let nodes = self.nodes();
        let Some(reference) = reference else {
            let of = |node: &Arc<Node>| {
                node.weavers().into_iter().map(|weaver| (Arc::clone(node), weaver)).collect::<Vec<_>>()
            };
            return Ok(nodes.iter().flat_map(of).collect());
        };
        let known = nodes.into_iter().find_map(|node| node.known(reference).map(|weaver| (node, weaver)));
        known.map(|known| vec![known]).ok_or_else(|| {
            CliError::failure(format!("there is no tunnel to {reference}"))
                .hint(format!("bring it up: loom tunnel up {reference}"))
        })
    }
}

/// Ends when a command has closed its connection: it says nothing more before it gets its reply.
async fn hung_up(stream: &UnixStream) {
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

/// Counts a stream as long as it is open.
struct Open<'a>(&'a AtomicUsize);

impl<'a> Open<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
