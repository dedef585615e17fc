//! One weaver as the daemon knows it: its grant, and its listeners once the tunnel was brought up.

use std::{
    net::Ipv6Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use loom_api::{WeaverId, tunnel::TunnelGrant};
use loom_tunnel::{PathKind, PublicKey};
use parking_lot::{Mutex, MutexGuard};

use super::{listeners::Listeners, node::Node, protocol::TunnelStatus};

/// One weaver that the node has a tunnel to.
pub(crate) struct Weaver {
    pub(crate) id: WeaverId,
    state: Mutex<State>,
}

struct State {
    grant: TunnelGrant,
    listeners: Option<Arc<Listeners>>,
    problem: Option<String>,
    /// How many streams of commands there are, those that are being opened included.
    streams: usize,
    /// Since when; the last of them ended then, or it was admitted.
    used: Instant,
    since: Instant,
    /// When the server was last asked, and how long to wait before the next question of our own.
    asked: Instant,
    pause: Option<Duration>,
}

/// A stream of a command, as long as it lives.
pub(crate) struct Use<'a>(&'a Weaver);

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.streams -= 1;
        state.used = Instant::now();
    }
}

impl Weaver {
    /// A weaver by its first grant.
    pub(crate) fn new(grant: &TunnelGrant) -> Self {
        let now = Instant::now();
        let state = State {
            grant: grant.clone(),
            listeners: None,
            problem: None,
            streams: 0,
            used: now,
            since: now,
            asked: now,
            pause: None,
        };
        Self { id: grant.weaver_id, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Its address inside the tunnel.
    pub(crate) fn address(&self) -> Ipv6Addr {
        self.state().grant.peer_address
    }

    /// The WireGuard public key of the weaver's agent.
    pub(crate) fn peer_key(&self) -> PublicKey {
        PublicKey::from(self.state().grant.peer_key.0)
    }

    /// The authority that signs its SSH host key.
    pub(crate) fn ssh_ca(&self) -> String {
        self.state().grant.ssh_ca.clone()
    }

    /// Takes a newer grant; the key that its agent had before.
    pub(crate) fn renew(&self, grant: TunnelGrant) -> Option<PublicKey> {
        let mut state = self.state();
        let old = PublicKey::from(state.grant.peer_key.0);
        state.grant = grant;
        state.problem = None;
        state.asked = Instant::now();
        Some(old)
    }

    pub(crate) fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    /// A command uses it until the guard is dropped.
    pub(crate) fn begin_use(&self) -> Use<'_> {
        self.state().streams += 1;
        Use(self)
    }

    /// Sets what `loom tunnel status` shows as the tunnel's problem.
    pub(crate) fn set_problem(&self, problem: Option<String>) {
        self.state().problem = problem;
    }

    /// Whether its tunnel was brought up.
    pub(crate) fn is_up(&self) -> bool {
        self.state().listeners.is_some()
    }

    /// Whether anything depends on it now: listeners, or a stream.
    pub(crate) fn is_in_use(&self) -> bool {
        let state = self.state();
        state.listeners.is_some() || state.streams > 0
    }

    /// The time since the last stream ended.
    pub(crate) fn unused_for(&self) -> Duration {
        self.state().used.elapsed()
    }

    /// Since the server last answered, or was last asked in vain.
    pub(crate) fn unasked_for(&self) -> Duration {
        self.state().asked.elapsed()
    }

    /// Whether its grant ends within that time.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        let left = self.state().grant.expires_at.duration_since(Timestamp::now());
        SignedDuration::try_from(time).is_ok_and(|time| left < time)
    }

    /// It was heard: the next time it is silent, the server is asked soon.
    pub(crate) fn trust(&self) {
        self.state().pause = None;
    }

    /// Whether to ask the server now. The time between two questions doubles, from `first` to `longest`.
    pub(crate) fn may_ask(&self, first: Duration, longest: Duration) -> bool {
        let mut state = self.state();
        let pause = state.pause.unwrap_or(Duration::ZERO);
        let may = state.asked.elapsed() >= pause;
        if may {
            state.asked = Instant::now();
            state.pause = Some((pause * 2).clamp(first, longest));
        }
        may
    }

    /// Its listeners; made for its address when there are none. `make` may not ask anything of the weaver, which is
    /// locked.
    pub(crate) fn listeners(&self, make: impl FnOnce(Ipv6Addr) -> Listeners) -> Arc<Listeners> {
        let mut state = self.state();
        let remote = state.grant.peer_address;
        Arc::clone(state.listeners.get_or_insert_with(|| Arc::new(make(remote))))
    }

    /// Closes its listeners, and returns when they are.
    pub(crate) async fn close_listeners(&self) {
        let listeners = self.state().listeners.take();
        if let Some(listeners) = listeners {
            listeners.close().await;
        }
    }

    /// How its tunnel is, judged by what was last authenticated.
    pub(crate) fn status(&self, node: &Node) -> TunnelStatus {
        let peer = node.peer(self.address());
        let state = self.state();
        let active = peer.as_ref().and_then(|peer| peer.paths.iter().find(|path| path.active));
        let (path, endpoint) = match active.map(|path| path.kind) {
            Some(PathKind::Direct(endpoint)) => ("direct", Some(endpoint)),
            Some(PathKind::Relay) => ("relay", None),
            None => ("none", None),
        };
        let received = peer.as_ref().and_then(|peer| peer.paths.iter().filter_map(|path| path.last_received).min());
        let listeners = state.listeners.as_ref();
        TunnelStatus {
            weaver_id: self.id.to_string(),
            up: listeners.is_some(),
            address: listeners.map(|listeners| listeners.address().to_string()),
            path: path.to_owned(),
            endpoint,
            latency_ms: active.and_then(|path| path.rtt).map(|rtt| rtt.as_secs_f64() * 1e3),
            last_handshake_secs: peer.as_ref().and_then(|peer| peer.last_handshake).map(|age| age.as_secs()),
            last_received_secs: received.map(|age| age.as_secs()),
            sent_bytes: peer.as_ref().map_or(0, |peer| peer.sent),
            received_bytes: peer.as_ref().map_or(0, |peer| peer.received),
            forwards: listeners.map(|listeners| listeners.forwards()).unwrap_or_default(),
            socks: listeners.and_then(|listeners| listeners.socks()),
            problem: state.problem.clone(),
            streams: state.streams,
            uptime_secs: state.since.elapsed().as_secs(),
            expires_at: state.grant.expires_at,
        }
    }
}
