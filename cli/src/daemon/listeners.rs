//! A weaver's ports on this machine: under the same numbers on a loopback address of the weaver's own, plus explicit
//! forwards and SOCKS5.
//!
//! The agent reports which ports the weaver listens on, at first and at every change
//! ([`loom_api::tunnel::PORTS_PORT`]); the listeners here follow.

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

/// In bytes; a report of all 65,535 ports fits.
const MAX_REPORT: u64 = 512 << 10;
/// Ports opened for one weaver.
const MAX_PORTS: usize = 256;
const FIRST_REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the weaver to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Concurrent connections of one port; more wait to be accepted.
const MAX_CONNECTIONS: usize = 512;
/// Pause before reconnecting to the reports.
const REPORT_RETRY: Duration = Duration::from_secs(1);

/// A loopback address for each weaver, from `127.64.0.0/10`. It is derived from the weaver's id and the user's, so that
/// a weaver usually gets the same address again and two users of a machine usually get different ones. Only Linux
/// answers on all of `127.0.0.0/8`; elsewhere weavers share `127.0.0.1`, and conflicting ports get other numbers.
#[derive(Default)]
pub(crate) struct LoopbackAddresses(Mutex<HashMap<WeaverId, Ipv4Addr>>);

impl LoopbackAddresses {
    /// The weaver's address, which no other weaver has until it is released.
    pub(crate) fn allocate(&self, weaver: WeaverId) -> Ipv4Addr {
        if !cfg!(target_os = "linux") {
            return Ipv4Addr::LOCALHOST;
        }
        let mut taken = self.0.lock();
        if let Some(address) = taken.get(&weaver) {
            return *address;
        }
        let used: HashSet<Ipv4Addr> = taken.values().copied().collect();
        // The last bytes of a UUIDv7 are random.
        let bytes = weaver.uuid().into_bytes();
        let mut number = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        // Knuth's multiplicative hash: user ids are small and close to each other.
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

    pub(crate) fn release(&self, weaver: WeaverId) {
        self.0.lock().remove(&weaver);
    }
}

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
    ports: BTreeMap<u16, PortState>,
    explicit: Vec<Forward>,
    socks: Option<SocketAddr>,
}

/// The local listener of a weaver's port.
enum PortState {
    /// `note` says why `local` has another port number.
    Listening {
        local: SocketAddr,
        note: Option<String>,
        accepting: CancellationToken,
    },
    Failed(String),
}

impl Listeners {
    /// Starts without listeners.
    pub(crate) fn new(tunnel: Tunnel, weaver: WeaverId, remote: Ipv6Addr, address: Ipv4Addr) -> Self {
        Self { tunnel, weaver, remote, address, state: Mutex::default(), closed: CancellationToken::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) const fn address(&self) -> Ipv4Addr {
        self.address
    }

    pub(crate) fn socks(&self) -> Option<SocketAddr> {
        self.state().socks
    }

    /// All listeners, including ports that could not be opened.
    pub(crate) fn forwards(&self) -> Vec<ForwardStatus> {
        let state = self.state();
        let ports = state.ports.iter().map(|(port, opened)| ForwardStatus {
            local: match opened {
                PortState::Listening { local, .. } => *local,
                PortState::Failed(_) => SocketAddr::new(IpAddr::V4(self.address), *port),
            },
            remote_port: *port,
            note: match opened {
                PortState::Listening { note, .. } => note.clone(),
                PortState::Failed(_) => None,
            },
            error: match opened {
                PortState::Listening { .. } => None,
                PortState::Failed(error) => Some(error.clone()),
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

    /// Follows the weaver's ports from now on; returns once the current ones are open.
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
                _ = closed.run_until_cancelled(listeners.read_reports(reports, first)).await;
            });
        }
        timeout(FIRST_REPORT_TIMEOUT, opened).await.map(drop).map_err(|_| {
            CliError::new(Exit::TIMED_OUT, format!("{} does not report which ports it listens on", self.weaver))
        })
    }

    async fn read_reports(&self, reports: TunnelStream, first: oneshot::Sender<()>) {
        let (mut reports, mut first) = (Some(reports), Some(first));
        loop {
            if let Some(stream) = reports.take()
                && let Err(error) = self.read_report_stream(stream, &mut first).await
            {
                tracing::info!(weaver = %self.weaver, "the port reports were interrupted: {error}");
            }
            sleep(REPORT_RETRY).await;
            reports = self.tunnel.connect(self.remote, PORTS_PORT, Duration::from_secs(10)).await.ok();
        }
    }

    async fn read_report_stream(
        &self,
        stream: TunnelStream,
        first: &mut Option<oneshot::Sender<()>>,
    ) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if (&mut lines).take(MAX_REPORT).read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let report: PortReport = serde_json::from_str(&line).map_err(std::io::Error::other)?;
            self.set_ports(&report.ports).await;
            if let Some(first) = first.take() {
                // The receiver may have timed out.
                let _ = first.send(());
            }
        }
    }

    /// Opens new ports, and closes those that the weaver no longer listens on. Open connections continue: a program may
    /// accept one connection, stop listening, and still use it.
    async fn set_ports(&self, ports: &[u16]) {
        let wanted: BTreeSet<u16> = ports.iter().copied().take(MAX_PORTS).collect();
        self.state().ports.retain(|port, opened| {
            let keep = wanted.contains(port);
            if let (false, PortState::Listening { accepting, .. }) = (keep, &*opened) {
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

    /// Listens under the port's own number, or under any free one if that fails.
    async fn open(&self, port: u16) -> PortState {
        if port == SSH_PORT || port == PORTS_PORT {
            return PortState::Failed("the tunnel uses this port itself".to_owned());
        }
        let (listener, note) = match TcpListener::bind((self.address, port)).await {
            Ok(listener) => (listener, None),
            Err(error) => match TcpListener::bind((self.address, 0)).await {
                Ok(listener) => (listener, Some(format!("moved: {}", explain(port, &error)))),
                Err(_) => return PortState::Failed(explain(port, &error)),
            },
        };
        match listener.local_addr() {
            Ok(local) => PortState::Listening { local, note, accepting: self.serve(listener, port) },
            Err(error) => PortState::Failed(error.to_string()),
        }
    }

    /// Forwards a listener's connections to a port of the weaver. The returned token stops accepting; open connections
    /// continue until [`Self::close`].
    fn serve(&self, listener: TcpListener, port: u16) -> CancellationToken {
        let (closed, accepting) = (self.closed.clone(), self.closed.child_token());
        let serving = serve(listener, self.tunnel.clone(), self.remote, port, accepting.clone());
        self.state().tasks.spawn(async move {
            _ = closed.run_until_cancelled(serving).await;
        });
        accepting
    }

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

    /// Closes all listeners and connections, and waits until they are closed.
    pub(crate) async fn close(&self) {
        self.closed.cancel();
        let tasks = self.state().tasks.clone();
        tasks.close();
        tasks.wait().await;
    }
}

/// Accepts connections until `accepting` is cancelled, then waits for the open ones to end.
async fn serve(listener: TcpListener, tunnel: Tunnel, remote: Ipv6Addr, port: u16, accepting: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = accepting.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
        };
        match accepted {
            Ok((local, _)) => drop(connections.spawn(forward_connection(local, tunnel.clone(), remote, port))),
            Err(error) => {
                // Out of file descriptors, or the client is gone already. The pause prevents a busy loop.
                tracing::warn!(port, "cannot accept a connection to forward: {error}");
                sleep(REPORT_RETRY).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Forwards one connection. A failure on either side resets the local one: a clean close would look like the end of the
/// data.
async fn forward_connection(mut local: TcpStream, tunnel: Tunnel, remote: Ipv6Addr, port: u16) {
    let _ = local.set_nodelay(true);
    let carried = match tunnel.connect(remote, port, CONNECT_TIMEOUT).await {
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
            format!("ports below 1024 need root; use -L {}:{port}", u32::from(port) + 10_000)
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
            let address = addresses.allocate(*weaver);
            assert_eq!(address.octets()[0], 127);
            assert!((64..128).contains(&address.octets()[1]), "{address}");
            assert!(seen.insert(address), "{address} is another weaver's");
            assert_eq!(addresses.allocate(*weaver), address, "the same at the second time");
        }
    }
}
