//! A weaver's ports here: the same numbers on a loopback address of the weaver's own, explicit forwards, and SOCKS5.
//!
//! The agent tells which ports are listened on in the weaver, now and at every change
//! ([`loom_api::tunnel::PORTS_PORT`]); listeners follow.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use loom_api::{
    WeaverId,
    tunnel::{PORTS_PORT, PortReport, SSH_PORT},
};
use loom_tunnel::{
    Tunnel, TunnelStream,
    forward::{serve_socks, splice},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::protocol::{Forward, ForwardStatus};
use crate::error::{CliError, Exit, Result};

/// The longest report, in bytes: all 65,535 ports fit.
const LONGEST_REPORT: u64 = 512 << 10;
/// The most ports that are opened for one weaver.
const MOST_PORTS: usize = 256;
/// How long the first report may take.
const FIRST_REPORT: Duration = Duration::from_secs(10);
/// How long the weaver may take to answer a connection.
const CONNECT: Duration = Duration::from_secs(20);
/// Connections that one port carries at once; more wait to be accepted.
const MOST_CONNECTIONS: usize = 512;
/// Before the reports are asked for again after they broke off.
const AGAIN: Duration = Duration::from_secs(1);

/// Loopback addresses, one for each weaver: `127.64.0.0/10`, chosen by the weaver's id and the user's, so that a weaver
/// mostly gets the same again and two users of a machine mostly get different ones. Only Linux answers on all of
/// `127.0.0.0/8`; elsewhere weavers share `127.0.0.1`, and ports that meet are moved.
#[derive(Default)]
pub(crate) struct LoopbackAddresses(Mutex<HashMap<WeaverId, Ipv4Addr>>);

impl LoopbackAddresses {
    /// The weaver's address; one that no other weaver has.
    pub(crate) fn take(&self, weaver: WeaverId) -> Ipv4Addr {
        if !cfg!(target_os = "linux") {
            return Ipv4Addr::LOCALHOST;
        }
        let mut taken = self.0.lock();
        if let Some(address) = taken.get(&weaver) {
            return *address;
        }
        let used: HashSet<Ipv4Addr> = taken.values().copied().collect();
        // The end of a UUIDv7 is random.
        let bytes = weaver.uuid().into_bytes();
        let mut number = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        // Knuth's multiplier spreads user ids, which are small and near each other.
        number ^= rustix::process::geteuid().as_raw().wrapping_mul(0x9e37_79b1);
        let address = loop {
            let candidate = Ipv4Addr::from(0x7f40_0000 | (number & 0x003f_ffff));
            if !used.contains(&candidate) && !matches!(candidate.octets()[3], 0 | 255) {
                break candidate;
            }
            number = number.wrapping_add(1);
        };
        taken.insert(weaver, address);
        address
    }

    /// The weaver's address is free again.
    pub(crate) fn give_back(&self, weaver: WeaverId) {
        self.0.lock().remove(&weaver);
    }
}

/// A weaver's listeners.
pub(crate) struct Listeners {
    tunnel: Tunnel,
    weaver: WeaverId,
    remote: Ipv6Addr,
    address: Ipv4Addr,
    state: Mutex<State>,
    closed: CancellationToken,
}

#[derive(Default)]
struct State {
    tasks: TaskTracker,
    following: bool,
    /// Listeners for ports that the weaver listens on.
    ports: BTreeMap<u16, Opened>,
    explicit: Vec<Forward>,
    socks: Option<SocketAddr>,
}

/// A port that was opened, or could not be.
enum Opened {
    /// Where, and why not under its own number.
    Listening {
        local: SocketAddr,
        note: Option<String>,
        accepting: CancellationToken,
    },
    Failed(String),
}

impl Listeners {
    /// No listeners yet.
    pub(crate) fn new(tunnel: Tunnel, weaver: WeaverId, remote: Ipv6Addr, address: Ipv4Addr) -> Self {
        Self { tunnel, weaver, remote, address, state: Mutex::default(), closed: CancellationToken::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The weaver's loopback address.
    pub(crate) const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Where SOCKS5 is served.
    pub(crate) fn socks(&self) -> Option<SocketAddr> {
        self.state().socks
    }

    /// All listeners, and those that could not be opened.
    pub(crate) fn forwards(&self) -> Vec<ForwardStatus> {
        let state = self.state();
        let ports = state.ports.iter().map(|(port, opened)| ForwardStatus {
            local: match opened {
                Opened::Listening { local, .. } => *local,
                Opened::Failed(_) => SocketAddr::new(IpAddr::V4(self.address), *port),
            },
            remote_port: *port,
            note: match opened {
                Opened::Listening { note, .. } => note.clone(),
                Opened::Failed(_) => None,
            },
            error: match opened {
                Opened::Listening { .. } => None,
                Opened::Failed(error) => Some(error.clone()),
            },
        });
        let explicit = state.explicit.iter();
        let explicit = explicit.map(|forward| ForwardStatus {
            local: forward.local,
            remote_port: forward.remote,
            note: None,
            error: None,
        });
        ports.chain(explicit).collect()
    }

    /// Follows the weaver's ports from now on; returns when those of now are open.
    pub(crate) async fn follow(self: &std::sync::Arc<Self>, reports: TunnelStream) -> Result<()> {
        let (first, opened) = oneshot::channel();
        {
            let mut state = self.state();
            if std::mem::replace(&mut state.following, true) {
                return Ok(());
            }
            let listeners = std::sync::Arc::clone(self);
            let closed = self.closed.clone();
            state.tasks.spawn(async move {
                _ = closed.run_until_cancelled(listeners.follow_on(reports, first)).await;
            });
        }
        timeout(FIRST_REPORT, opened).await.map(drop).map_err(|_| {
            CliError::new(Exit::TIMED_OUT, format!("{} does not say which ports it listens on", self.weaver))
        })
    }

    async fn follow_on(&self, reports: TunnelStream, first: oneshot::Sender<()>) {
        let (mut reports, mut first) = (Some(reports), Some(first));
        loop {
            if let Some(stream) = reports.take()
                && let Err(error) = self.follow_one(stream, &mut first).await
            {
                tracing::info!(weaver = %self.weaver, "the ports' reports broke off: {error}");
            }
            sleep(AGAIN).await;
            reports = self.tunnel.connect(self.remote, PORTS_PORT, Duration::from_secs(10)).await.ok();
        }
    }

    async fn follow_one(&self, stream: TunnelStream, first: &mut Option<oneshot::Sender<()>>) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if (&mut lines).take(LONGEST_REPORT).read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let report: PortReport = serde_json::from_str(&line).map_err(std::io::Error::other)?;
            self.open_exactly(&report.ports).await;
            if let Some(first) = first.take() {
                // Who waited may have gone.
                let _ = first.send(());
            }
        }
    }

    /// Opens what is new, and closes what is no longer listened on. Connections that are open go on: a program that
    /// takes one connection and listens no more still talks on that one.
    async fn open_exactly(&self, ports: &[u16]) {
        let wanted: BTreeSet<u16> = ports.iter().copied().take(MOST_PORTS).collect();
        self.state().ports.retain(|port, opened| {
            let keep = wanted.contains(port);
            if let (false, Opened::Listening { accepting, .. }) = (keep, &*opened) {
                accepting.cancel();
            }
            keep
        });
        for port in wanted {
            if self.state().ports.contains_key(&port) {
                continue;
            }
            let opened = self.open(port).await;
            self.state().ports.insert(port, opened);
        }
    }

    /// Opens a port under its own number, or under any if that cannot be had.
    async fn open(&self, port: u16) -> Opened {
        if port == SSH_PORT || port == PORTS_PORT {
            return Opened::Failed("the tunnel has this port for itself".to_owned());
        }
        let (listener, note) = match TcpListener::bind((self.address, port)).await {
            Ok(listener) => (listener, None),
            Err(error) => match TcpListener::bind((self.address, 0)).await {
                Ok(listener) => (listener, Some(format!("moved: {}", explain(port, &error)))),
                Err(_) => return Opened::Failed(explain(port, &error)),
            },
        };
        match listener.local_addr() {
            Ok(local) => Opened::Listening { local, note, accepting: self.serve(listener, port) },
            Err(error) => Opened::Failed(error.to_string()),
        }
    }

    /// Carries a listener's connections to a port of the weaver, until everything is closed; what is returned ends the
    /// accepting alone.
    fn serve(&self, listener: TcpListener, port: u16) -> CancellationToken {
        let (closed, accepting) = (self.closed.clone(), self.closed.child_token());
        let serving = serve(listener, self.tunnel.clone(), self.remote, port, accepting.clone());
        self.state().tasks.spawn(async move {
            _ = closed.run_until_cancelled(serving).await;
        });
        accepting
    }

    /// Opens an explicit forward.
    pub(crate) async fn add(&self, forward: Forward) -> Result<()> {
        if self.state().explicit.contains(&forward) {
            return Ok(());
        }
        let listener = listen(forward.local).await?;
        let local = listener.local_addr().unwrap_or(forward.local);
        self.serve(listener, forward.remote);
        self.state().explicit.push(Forward { local, ..forward });
        Ok(())
    }

    /// Serves SOCKS5.
    pub(crate) async fn add_socks(
        &self,
        at: SocketAddr,
        resolve: impl Fn(&str) -> Option<Ipv6Addr> + Send + Sync + 'static,
    ) -> Result<()> {
        if self.state().socks == Some(at) {
            return Ok(());
        }
        let listener = listen(at).await?;
        let local = listener.local_addr()?;
        let mut state = self.state();
        state.tasks.spawn(serve_socks(listener, self.tunnel.clone(), resolve, self.closed.child_token()));
        state.socks = Some(local);
        Ok(())
    }

    /// Closes everything, and returns when it is.
    pub(crate) async fn close(&self) {
        self.closed.cancel();
        let tasks = self.state().tasks.clone();
        tasks.close();
        tasks.wait().await;
    }
}

/// Accepts connections until `accepting` is cancelled, and then waits for the end of those that are open.
async fn serve(listener: TcpListener, tunnel: Tunnel, remote: Ipv6Addr, port: u16, accepting: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = accepting.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => accepted,
        };
        match accepted {
            Ok((local, _)) => drop(connections.spawn(carry(local, tunnel.clone(), remote, port))),
            Err(error) => {
                // Out of descriptors, or the client is gone already. The pause keeps the former from becoming a busy
                // loop.
                tracing::warn!(port, "cannot accept a connection to forward: {error}");
                sleep(AGAIN).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Carries one connection to its end. A failure on either side becomes a reset here: a clean end would pass for all of
/// the data.
async fn carry(mut local: TcpStream, tunnel: Tunnel, remote: Ipv6Addr, port: u16) {
    let _ = local.set_nodelay(true);
    let carried = match tunnel.connect(remote, port, CONNECT).await {
        Ok(stream) => splice(&mut local, stream).await.map_err(|error| error.to_string()).map(drop),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = carried {
        tracing::debug!(port, "a forwarded connection broke: {error}");
        let _ = local.set_zero_linger();
    }
}

async fn listen(at: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(at)
        .await
        .map_err(|error| CliError::failure(format!("listening at {at}: {}", explain(at.port(), &error))))
}

fn explain(port: u16, error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::PermissionDenied if port < 1024 => {
            format!("ports below 1024 are the administrator's; use -L {}:{port}", u32::from(port) + 10_000)
        }
        std::io::ErrorKind::AddrInUse => format!("another program listens on it; use -L OTHER:{port}"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_weaver_has_a_loopback_address_of_its_own() {
        let addresses = LoopbackAddresses::default();
        let weavers: Vec<_> = (0..500).map(|_| WeaverId::generate()).collect();
        let mut seen = HashSet::new();
        for weaver in &weavers {
            let address = addresses.take(*weaver);
            assert_eq!(address.octets()[0], 127);
            assert!((64..128).contains(&address.octets()[1]), "{address}");
            assert!(seen.insert(address), "{address} is another weaver's");
            assert_eq!(addresses.take(*weaver), address, "the same at the second time");
        }
    }
}
