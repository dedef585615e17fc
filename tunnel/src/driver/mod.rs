//! The only part of the tunnel that uses tokio, sockets and the clock.
//!
//! A [`Tunnel`] is one [`Node`] and one TCP stack under one lock, and three kinds of tasks around them:
//!
//! - the *driver* (`run`) owns the UDP sockets. Woken by a socket, a timer or a stream, it takes in everything that has
//!   arrived and sends everything that is due, in batches, the lock held for one batch at a time;
//! - whoever uses a [`TunnelStream`] reads and writes the connection's buffers in place and wakes the driver;
//! - whoever runs [`Tunnel::run_relay`] carries frames between the node and the relay.
//!
//! The driver ends with [`Tunnel::shutdown`] or with the last handle; then every connection is reset.

mod interfaces;
mod run;
mod udp;

use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use x25519_dalek::{PublicKey, StaticSecret};

pub use self::udp::NO_GSO;
use self::{run::Driver, udp::UdpSockets};
use crate::{
    netstack::{Flow, Full, Netstack, OpenError},
    node::{Counters, Node, NodeConfig},
    path::PathKind,
    peer::{PeerConfig, PeerStatus},
    relay::{RelayConnector, client, queue::RelayQueue},
    stream::TunnelStream,
};

/// Connections and events that the application has not taken yet. Beyond that, connections are refused and events are
/// dropped.
const MAX_WAITING: usize = 256;

/// For a peer to complete a TCP handshake that we have accepted.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(30);

/// Batches of packets for a peer that is being removed: enough for a reset of each connection.
const MAX_FINAL_BATCHES: usize = 32;

/// A node's identity and sockets.
pub struct Config {
    /// An X25519 key.
    pub private_key: StaticSecret,
    /// The node's address inside the tunnel.
    pub address: Ipv6Addr,
    /// The local addresses to bind UDP sockets to; without any, the node uses only the relay.
    pub udp: Vec<SocketAddr>,
}

/// Why a connection into the tunnel failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No peer has that address.
    #[error("no peer has the address {0}")]
    NoPeer(Ipv6Addr),
    /// Nothing listens on the port.
    #[error("connection refused")]
    Refused,
    /// No answer in time.
    #[error("timed out")]
    TimedOut,
    /// The node has been shut down.
    #[error("the tunnel is closed")]
    Closed,
    /// The node has reached its limit of connections.
    #[error("too many connections")]
    TooMany,
}

/// Events of a node.
#[derive(Debug, Clone)]
pub enum TunnelEvent {
    /// A valid handshake came from a key that is not a peer's (reported at most a few times per second).
    UnknownPeer(PublicKey),
}

/// A handle of a running node. Cheap to clone; the node ends with [`Tunnel::shutdown`] or its last handle.
#[derive(Clone)]
pub struct Tunnel {
    handle: Arc<Handle>,
}

/// The stream of connections that peers open to this node.
pub struct Incoming {
    connections: mpsc::Receiver<IncomingConnection>,
}

/// The stream of a node's [`TunnelEvent`]s.
pub struct Events {
    events: mpsc::Receiver<TunnelEvent>,
}

/// A connection that a peer wants to open. Dropping it refuses it.
pub struct IncomingConnection {
    /// The peer that connects.
    pub peer: PublicKey,
    /// The peer's address inside the tunnel.
    pub peer_address: Ipv6Addr,
    /// The local port that it connects to.
    pub port: u16,
    shared: Arc<Shared>,
    /// Taken when the connection is accepted or refused.
    flow: Option<Flow>,
}

/// Shared by all handles; dropping it ends the driver.
struct Handle {
    shared: Arc<Shared>,
    public_key: PublicKey,
    bound: Vec<SocketAddr>,
    driver: tokio::sync::Mutex<Option<JoinHandle<()>>>,
    _cancel: DropGuard,
}

/// Shared by handles, streams, the driver and the relay client.
pub(crate) struct Shared {
    core: Mutex<Core>,
    wake: Notify,
    /// Notified when the relay queue is no longer empty.
    pub(crate) relay_ready: Notify,
    /// Counts the changes of the host's network.
    pub(crate) network: watch::Sender<u64>,
    /// Cancelled when the node ends.
    pub(crate) ended: CancellationToken,
}

/// The state machines.
pub(crate) struct Core {
    pub(crate) node: Node,
    pub(crate) netstack: Netstack,
    pub(crate) relay: RelayQueue,
    /// The peers by their addresses, and the other way round.
    peers: HashMap<Ipv6Addr, PublicKey>,
    addresses: HashMap<PublicKey, Ipv6Addr>,
    closed: bool,
    /// Batches to send although their peer was removed.
    final_batches: VecDeque<(SocketAddr, usize, Vec<u8>)>,
    /// The packet that is just being decrypted.
    packet: Vec<u8>,
}

impl Tunnel {
    /// Binds the sockets and starts the node; must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When no UDP socket can be bound although some were asked for.
    pub fn start(config: Config) -> io::Result<(Self, Incoming, Events)> {
        let udp = UdpSockets::bind(&config.udp)?;
        let bound = udp.local_addresses();
        let now = Instant::now();
        let node = Node::new(
            NodeConfig { private_key: config.private_key, address: config.address, seed: random_seed()? },
            now,
        );
        let public_key = node.public_key();
        let ended = CancellationToken::new();
        let shared = Arc::new(Shared {
            core: Mutex::new(Core {
                node,
                netstack: Netstack::new(config.address, random_seed()?, now),
                relay: RelayQueue::default(),
                peers: HashMap::new(),
                addresses: HashMap::new(),
                closed: false,
                final_batches: VecDeque::new(),
                packet: Vec::new(),
            }),
            wake: Notify::new(),
            relay_ready: Notify::new(),
            network: watch::Sender::new(0),
            ended: ended.clone(),
        });
        let (connections_in, connections) = mpsc::channel(MAX_WAITING);
        let (events_in, events) = mpsc::channel(MAX_WAITING);
        let driver = Driver::new(Arc::clone(&shared), udp, connections_in, events_in);
        // Owned by the handles: it ends with the last of them, and `shutdown` awaits it.
        let driver = tokio::spawn(driver.run());
        let handle = Handle {
            shared,
            public_key,
            bound,
            driver: tokio::sync::Mutex::new(Some(driver)),
            _cancel: ended.drop_guard(),
        };
        Ok((Self { handle: Arc::new(handle) }, Incoming { connections }, Events { events }))
    }

    /// The node's public key.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        self.handle.public_key
    }

    /// UDP addresses of this host at which the node listens, loopback ones last.
    #[must_use]
    pub fn candidates(&self) -> Vec<SocketAddr> {
        udp::candidates(&self.handle.bound)
    }

    /// Adds or updates a peer (new candidates, new pre-shared key). Starts the handshake if `initiate`. A peer with the
    /// same address and another key is replaced, and its connections are reset.
    pub fn add_peer(&self, peer: PeerConfig, initiate: bool) {
        let now = Instant::now();
        let mut core = self.shared().lock();
        let core = &mut *core;
        let (key, address) = (peer.public_key, peer.address);
        if let Some(old) = core.addresses.insert(key, address).filter(|old| *old != address) {
            core.netstack.reset(Some(old));
            core.peers.remove(&old);
        }
        if let Some(old) = core.peers.insert(address, key).filter(|old| *old != key) {
            core.netstack.reset(Some(address));
            core.addresses.remove(&old);
        }
        core.node.upsert_peer(now, peer, initiate);
        self.shared().wake();
    }

    /// Removes a peer and resets its connections at once.
    pub fn remove_peer(&self, key: &PublicKey) {
        let now = Instant::now();
        let mut core = self.shared().lock();
        if let Some(address) = core.address_of(key) {
            core.netstack.reset(Some(address));
            core.netstack.set_blocked(address, false);
            // Encrypt the resets while there is still a session, and take them out before the node removes the peer.
            for _ in 0..MAX_FINAL_BATCHES {
                if !core.advance(now) {
                    break;
                }
            }
            core.take_final_batches();
            core.peers.remove(&address);
            core.addresses.remove(key);
        }
        core.node.remove_peer(now, key);
        self.shared().wake();
    }

    /// The status of every peer.
    #[must_use]
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.shared().lock().node.peers(Instant::now())
    }

    /// What the node has dropped so far, by reason.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared().lock().node.counters()
    }

    /// Opens a connection to a peer's port. Dropping the future cancels it.
    pub async fn connect(&self, address: Ipv6Addr, port: u16, timeout: Duration) -> Result<TunnelStream, ConnectError> {
        let shared = self.shared();
        let id = {
            let mut core = shared.lock();
            if core.closed {
                return Err(ConnectError::Closed);
            }
            if !core.peers.contains_key(&address) {
                return Err(ConnectError::NoPeer(address));
            }
            core.netstack.connect(Instant::now(), address, port).map_err(|Full| ConnectError::TooMany)?
        };
        let stream = TunnelStream::new(Arc::clone(shared), id);
        shared.wake();
        match tokio::time::timeout(timeout, stream.opened()).await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(OpenError::Refused)) if shared.lock().closed => Err(ConnectError::Closed),
            Ok(Err(OpenError::Refused)) => Err(ConnectError::Refused),
            Ok(Err(OpenError::TimedOut)) | Err(_) => Err(ConnectError::TimedOut),
        }
    }

    /// Maintains a relay connection, with backoff and jitter, until the node is shut down. Must run only once at a time.
    pub async fn run_relay(&self, connector: impl RelayConnector) {
        client::run(self.shared(), connector).await;
    }

    /// To be called when the host's network has changed or it has slept: probes every path, reconnects to the relay, and
    /// retransmits at once what is not acknowledged.
    pub fn network_changed(&self) {
        let now = Instant::now();
        let mut core = self.shared().lock();
        core.node.network_changed(now);
        core.netstack.retransmit_now(now, None);
        drop(core);
        self.shared().network.send_modify(|changes| *changes += 1);
        self.shared().wake();
    }

    /// Resets all connections and ends the node. Returns when its sockets are closed.
    pub async fn shutdown(&self) {
        self.shared().ended.cancel();
        if let Some(driver) = self.handle.driver.lock().await.take() {
            _ = driver.await;
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }
}

impl Incoming {
    /// The next connection; `None` once the node has ended.
    pub async fn next(&mut self) -> Option<IncomingConnection> {
        self.connections.recv().await
    }
}

impl Events {
    /// The next event; `None` once the node has ended.
    pub async fn next(&mut self) -> Option<TunnelEvent> {
        self.events.recv().await
    }
}

impl IncomingConnection {
    /// Completes the TCP handshake. Fails if the peer has given up, the node has ended, or there are too many connections.
    pub async fn accept(mut self) -> io::Result<TunnelStream> {
        let gone = || io::Error::from(io::ErrorKind::ConnectionAborted);
        let flow = self.flow.take().ok_or_else(gone)?;
        let accepted = self.shared.lock().netstack.accept(Instant::now(), flow);
        self.shared.wake();
        let id = accepted.map_err(|Full| io::Error::other("too many connections"))?.ok_or_else(gone)?;
        let stream = TunnelStream::new(Arc::clone(&self.shared), id);
        match tokio::time::timeout(ACCEPT_TIMEOUT, stream.opened()).await {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(OpenError::Refused)) => Err(gone()),
            Ok(Err(OpenError::TimedOut)) | Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Answers with a reset: connection refused.
    pub fn refuse(self) {}
}

impl Drop for IncomingConnection {
    fn drop(&mut self) {
        if let Some(flow) = self.flow.take() {
            self.shared.lock().netstack.refuse(Instant::now(), flow);
            self.shared.wake();
        }
    }
}

impl fmt::Debug for IncomingConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingConnection")
            .field("peer_address", &self.peer_address)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock()
    }

    /// Wakes the driver.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }
}

impl Core {
    /// Processes one datagram and the packets in it.
    pub(crate) fn handle_datagram(
        &mut self,
        now: Instant,
        path: PathKind,
        source: Option<&PublicKey>,
        datagram: &mut [u8],
    ) {
        self.node.handle_datagram(now, path, source, datagram);
        while self.node.poll_packet(&mut self.packet).is_some() {
            self.netstack.handle_packet(now, &self.packet);
        }
    }

    /// The address of a peer.
    pub(crate) fn address_of(&self, key: &PublicKey) -> Option<Ipv6Addr> {
        self.addresses.get(key).copied()
    }
}

fn random_seed() -> io::Result<u64> {
    let mut seed = [0; 8];
    SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| io::Error::other("the operating system provides no random bytes"))?;
    Ok(u64::from_ne_bytes(seed))
}
