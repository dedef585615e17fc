//! A weaver as the daemon knows it: its grant, and its listeners once the tunnel is up.

use std::{
    net::Ipv6Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use loom_api::{WeaverId, tunnel::TunnelGrant};
use loom_tunnel::{PathKind, PublicKey};
use parking_lot::{Mutex, MutexGuard};

use super::{listeners::Listeners, protocol::TunnelStatus, server_link::ServerLink};

/// A weaver to which there is a tunnel.
pub(crate) struct Weaver {
    pub(crate) id: WeaverId,
    state: Mutex<State>,
}

struct State {
    grant: TunnelGrant,
    listeners: Option<Arc<Listeners>>,
    problem: Option<String>,
    /// Open streams of commands, including those being opened.
    streams: usize,
    /// When the last stream ended, or the weaver was added.
    last_used: Instant,
    since: Instant,
    /// When the grant was last renewed, or a renewal was last tried.
    renewed: Instant,
    /// How long to wait before the next renewal; none once the weaver has been heard.
    renew_pause: Option<Duration>,
}

/// Marks a weaver as used by a stream until dropped.
pub(crate) struct UseGuard<'a>(&'a Weaver);

impl Drop for UseGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.streams -= 1;
        state.last_used = Instant::now();
    }
}

impl Weaver {
    pub(crate) fn new(grant: &TunnelGrant) -> Self {
        let now = Instant::now();
        let state = State {
            grant: grant.clone(),
            listeners: None,
            problem: None,
            streams: 0,
            last_used: now,
            since: now,
            renewed: now,
            renew_pause: None,
        };
        Self { id: grant.weaver_id, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) fn address(&self) -> Ipv6Addr {
        self.state().grant.peer_address
    }

    pub(crate) fn peer_key(&self) -> PublicKey {
        PublicKey::from(self.state().grant.peer_key.0)
    }

    /// The CA that signs the weaver's SSH host key, as a public key line.
    pub(crate) fn ssh_ca(&self) -> String {
        self.state().grant.ssh_ca.clone()
    }

    /// Replaces the grant; returns the agent's previous key.
    pub(crate) fn renew(&self, grant: TunnelGrant) -> PublicKey {
        let mut state = self.state();
        let old = PublicKey::from(state.grant.peer_key.0);
        state.grant = grant;
        state.problem = None;
        state.renewed = Instant::now();
        old
    }

    pub(crate) fn problem(&self) -> Option<String> {
        self.state().problem.clone()
    }

    pub(crate) fn begin_use(&self) -> UseGuard<'_> {
        self.state().streams += 1;
        UseGuard(self)
    }

    /// Sets what `loom tunnel status` shows as the tunnel's problem.
    pub(crate) fn set_problem(&self, problem: Option<String>) {
        self.state().problem = problem;
    }

    /// Whether `loom tunnel up` has brought the tunnel up.
    pub(crate) fn is_up(&self) -> bool {
        self.state().listeners.is_some()
    }

    /// Whether there are listeners or open streams.
    pub(crate) fn is_in_use(&self) -> bool {
        let state = self.state();
        state.listeners.is_some() || state.streams > 0
    }

    pub(crate) fn unused_for(&self) -> Duration {
        self.state().last_used.elapsed()
    }

    /// The time since the grant was last renewed, or a renewal was tried.
    pub(crate) fn since_renewal(&self) -> Duration {
        self.state().renewed.elapsed()
    }

    /// Whether the grant expires within this time.
    pub(crate) fn expires_within(&self, time: Duration) -> bool {
        let left = self.state().grant.expires_at.duration_since(Timestamp::now());
        SignedDuration::try_from(time).is_ok_and(|time| left < time)
    }

    /// The weaver was heard, so the next renewal may come at once.
    pub(crate) fn reset_renewal(&self) {
        self.state().renew_pause = None;
    }

    /// Whether to renew the grant now. The pause between renewals doubles from `min` to `max`.
    pub(crate) fn renewal_due(&self, min: Duration, max: Duration) -> bool {
        let mut state = self.state();
        let pause = state.renew_pause.unwrap_or(Duration::ZERO);
        let due = state.renewed.elapsed() >= pause;
        if due {
            state.renewed = Instant::now();
            state.renew_pause = Some((pause * 2).clamp(min, max));
        }
        due
    }

    /// The listeners; made by `make`, from the weaver's address, if there are none. `make` must not call the weaver, which
    /// is locked.
    pub(crate) fn listeners(&self, make: impl FnOnce(Ipv6Addr) -> Listeners) -> Arc<Listeners> {
        let mut state = self.state();
        let remote = state.grant.peer_address;
        Arc::clone(state.listeners.get_or_insert_with(|| Arc::new(make(remote))))
    }

    /// Closes the listeners, and waits until they are closed.
    pub(crate) async fn close_listeners(&self) {
        let listeners = self.state().listeners.take();
        if let Some(listeners) = listeners {
            listeners.close().await;
        }
    }

    /// The tunnel's status, judged by the packets that were last authenticated.
    pub(crate) fn status(&self, link: &ServerLink) -> TunnelStatus {
        let peer = link.peer(self.address());
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
