//! The paths to a peer, and which of them its data takes.
//!
//! A peer has the relay and any number of **direct** paths, one for each UDP address: those from the application and
//! those that authentic packets came from. Each path has a prober. A path is **proved** once it has worked in both
//! directions: a ping or a handshake was answered on it, or on the relay, which is one connection for both directions,
//! any authentic packet arrived. Data goes only over proved paths; the score chooses among them. After three lost pings
//! a path is no longer proved, data moves to the next best at once, and the search starts over. After the first lost
//! ping data also goes over the relay, so that nothing is lost before the third.
//!
//! Only Loom nodes answer probes. A peer is known to be one when it sends or answers a probe, or when anything authentic
//! comes from it over the relay (nobody else uses that); only then are its direct paths probed. A **foreign** WireGuard
//! peer has a single path, the source of its latest authentic packet (paper §2.1).
//!
//! This module does no I/O: `Paths::poll_ping` returns the pings to send, `Paths::heard`, `Paths::pong` and
//! `Paths::handshake_answered` process what arrives, `Paths::select` chooses the path.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

mod candidate;
mod probe;
mod prober;
mod score;

pub use candidate::{MAX_CANDIDATES, MAX_LEARNT};
pub use probe::{PROBE_LEN, PROBE_PORT};
pub use prober::{
    BURST_GAPS, BUSY_GAP, IDLE_GAP, LOST_PINGS, MAX_SEEK_GAP, PONG_TIMEOUT, SEEK_GAP, SEEK_STEPS, STANDBY_GAP,
    SUSPECT_GAP,
};
pub use score::{HYSTERESIS, HYSTERESIS_PART};

use crate::random::Random;
use candidate::Origin;
pub(crate) use probe::{Probe, ProbeKind};
use prober::{Pace, Prober};
use score::Score;

/// A path counts as busy for this long after the last packet.
pub const BUSY_WINDOW: Duration = Duration::from_secs(2);

/// How long an address that was learnt but never worked is kept.
pub const LEARNT_LIFETIME: Duration = Duration::from_secs(120);

/// How a packet reaches a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PathKind {
    /// Through the server's relay.
    Relay,
    /// UDP straight to the peer.
    Direct(SocketAddr),
}

/// The status of one path to a peer, judged by the last authenticated packet.
#[derive(Debug, Clone)]
pub struct PathStatus {
    /// How packets travel on this path.
    pub kind: PathKind,
    /// Whether it carries the data now.
    pub active: bool,
    /// The last round trip measured on it.
    pub rtt: Option<Duration>,
    /// The time since the last authenticated packet on it.
    pub last_received: Option<Duration>,
}

/// A ping to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ping {
    pub(crate) path: PathKind,
    pub(crate) probe: Probe,
}

/// All paths to one peer.
pub(crate) struct Paths {
    relay: Route,
    relay_up: bool,
    relay_absent: bool,
    direct: Vec<Route>,
    /// The index in `direct` of the path that was heard last, which is usually heard next.
    heard_at: usize,
    /// The source of the latest authentic packet on a direct path.
    endpoint: Option<SocketAddr>,
    is_loom: bool,
    active: Option<PathKind>,
    spare: Option<PathKind>,
    data_sent: Option<Instant>,
    random: Random,
}

struct Route {
    kind: PathKind,
    origin: Origin,
    nonce: u64,
    prober: Prober,
    proved: bool,
    /// Whether a probe was ever answered on this path.
    worked: bool,
    last_received: Option<Instant>,
}

impl Route {
    fn new(kind: PathKind, origin: Origin, random: &mut Random) -> Self {
        let nonce = random.next();
        Self { kind, origin, nonce, prober: Prober::new(), proved: false, worked: false, last_received: None }
    }

    const fn prove(&mut self) {
        self.proved = true;
        self.worked = true;
    }

    const fn score(&self) -> Score {
        Score { kind: self.kind, rtt: self.prober.smoothed_rtt() }
    }

    /// Does not depend on the current time, so that a ping that is due stays due until it is sent.
    fn pace(&self, active: Option<PathKind>, data_sent: Option<Instant>) -> Pace {
        if active != Some(self.kind) {
            return Pace::Standby;
        }
        let busy_until = data_sent.map(|at| at + BUSY_WINDOW);
        if self.prober.next_ping(Pace::Busy) < busy_until { Pace::Busy } else { Pace::Idle }
    }

    fn status(&self, now: Instant, active: Option<PathKind>) -> PathStatus {
        PathStatus {
            kind: self.kind,
            active: active == Some(self.kind),
            rtt: self.prober.last_rtt(),
            last_received: self.last_received.map(|at| now.saturating_duration_since(at)),
        }
    }
}

impl Paths {
    pub(crate) fn new(relay_up: bool, mut random: Random) -> Self {
        Self {
            relay: Route::new(PathKind::Relay, Origin::Given, &mut random),
            relay_up,
            relay_absent: false,
            direct: Vec::new(),
            heard_at: 0,
            endpoint: None,
            is_loom: false,
            active: None,
            spare: None,
            data_sent: None,
            random,
        }
    }

    /// The path for data; `None` while no path works.
    pub(crate) const fn active(&self) -> Option<PathKind> {
        self.active
    }

    /// A second path for data while the first is in doubt.
    pub(crate) const fn spare(&self) -> Option<PathKind> {
        self.spare
    }

    /// All paths that could work, for a handshake.
    pub(crate) fn handshake_targets(&self) -> impl Iterator<Item = PathKind> {
        let relay = self.relay_up.then_some(PathKind::Relay);
        relay.into_iter().chain(self.direct.iter().map(|route| route.kind))
    }

    /// Whether the relay can be used for this peer, as far as we know.
    pub(crate) const fn relay_works(&self) -> bool {
        self.relay_up && !self.relay_absent && self.relay.proved
    }

    /// Replaces the given addresses, but keeps those that work. Returns whether there are new ones.
    pub(crate) fn set_candidates(&mut self, now: Instant, given: &[SocketAddr]) -> bool {
        let mut wanted: Vec<PathKind> = Vec::new();
        for address in given.iter().copied().filter_map(candidate::normalise) {
            let kind = PathKind::Direct(address);
            if !wanted.contains(&kind) && wanted.len() < MAX_CANDIDATES {
                wanted.push(kind);
            }
        }
        let endpoint = self.endpoint.map(PathKind::Direct);
        self.direct.retain_mut(|route| {
            if wanted.contains(&route.kind) {
                route.origin = Origin::Given;
                return true;
            }
            let keep = route.origin == Origin::Learnt || route.proved || endpoint == Some(route.kind);
            route.origin = Origin::Learnt;
            keep
        });
        let known = self.direct.len();
        for kind in wanted {
            if self.direct.iter().all(|route| route.kind != kind) {
                self.add_direct(now, kind, Origin::Given);
            }
        }
        self.direct.len() > known
    }

    /// The relay connection was established or lost. The path has to be proved again, because the peer's own connection may
    /// still be down.
    pub(crate) fn set_relay_up(&mut self, now: Instant, up: bool) {
        self.relay_up = up;
        self.relay_absent = false;
        self.relay.proved = false;
        if up {
            self.relay.prober.restart(now);
            self.relay.prober.seek(now);
        }
    }

    /// The relay says that the peer is not connected to it.
    pub(crate) fn set_relay_absent(&mut self) {
        self.relay_absent = true;
        self.relay.proved = false;
    }

    /// An authentic packet arrived on a path. Returns whether that may change the choice.
    pub(crate) fn heard(&mut self, now: Instant, kind: PathKind) -> bool {
        match kind {
            PathKind::Relay => {
                self.relay.last_received = Some(now);
                let news = self.relay_up && (!self.relay.proved || self.relay_absent || !self.is_loom);
                self.relay_absent = false;
                self.relay.proved |= self.relay_up;
                self.set_loom(now);
                news
            }
            PathKind::Direct(address) => self.heard_direct(now, address),
        }
    }

    /// A handshake of ours was answered on this path, so it works in both directions.
    pub(crate) fn handshake_answered(&mut self, now: Instant, kind: PathKind, rtt: Option<Duration>) {
        self.heard(now, kind);
        if let Some(route) = self.route_mut(kind) {
            route.prove();
            if let Some(rtt) = rtt {
                route.prober.measured(rtt);
            }
        }
    }

    /// There are new session keys: pings can be sent, and earlier ones no longer count.
    pub(crate) fn session_began(&mut self, now: Instant) {
        let is_loom = self.is_loom;
        self.relay.prober.restart(now);
        for route in self.direct.iter_mut().filter(|_| is_loom) {
            route.prober.restart(now);
        }
    }

    /// The peer sent or answered a probe, or uses the relay, so it is a Loom node.
    pub(crate) fn set_loom(&mut self, now: Instant) {
        if self.is_loom {
            return;
        }
        self.is_loom = true;
        let active = self.active;
        for route in &mut self.direct {
            // Data stays on its path until the pings say otherwise.
            if active == Some(route.kind) {
                route.prove();
            }
            route.prober.seek(now);
        }
    }

    /// A pong arrived. Returns whether it answers a ping of ours.
    pub(crate) fn pong(&mut self, now: Instant, nonce: u64, sequence: u32) -> bool {
        let routes = std::iter::once(&mut self.relay).chain(&mut self.direct);
        let Some(route) = routes.into_iter().find(|route| route.nonce == nonce) else { return false };
        if !route.prober.pong(now, sequence) {
            return false;
        }
        if route.kind != PathKind::Relay || self.relay_up {
            route.prove();
        }
        true
    }

    /// A ping arrived: the path works in one direction at least, so probe it at once.
    pub(crate) fn pinged(&mut self, now: Instant, kind: PathKind) {
        if let Some(route) = self.route_mut(kind).filter(|route| !route.proved) {
            route.prober.ping_now(now);
        }
    }

    /// Data was sent. After a pause the path is checked at once, because it may have failed meanwhile.
    pub(crate) fn data_sent(&mut self, now: Instant) {
        let busy = self.data_sent.is_some_and(|at| now.saturating_duration_since(at) < BUSY_WINDOW);
        self.data_sent = Some(now);
        if let Some(active) = self.active.filter(|_| !busy)
            && let Some(route) = self.route_mut(active)
        {
            route.prober.ping_now(now);
        }
    }

    /// The host's network has changed: every path must answer again before it is trusted.
    pub(crate) fn network_changed(&mut self, now: Instant) {
        self.relay_absent = false;
        for route in std::iter::once(&mut self.relay).chain(&mut self.direct) {
            if route.proved {
                route.prober.suspect(now);
            } else {
                route.prober.restart(now);
            }
        }
    }

    /// Counts unanswered pings, and drops addresses that never worked.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        let active = self.active;
        let mut active_in_doubt = false;
        for route in std::iter::once(&mut self.relay).chain(&mut self.direct) {
            if !route.prober.expire(now) {
                continue;
            }
            active_in_doubt |= active == Some(route.kind);
            if route.proved && route.prober.is_lost() {
                route.proved = false;
                route.prober.seek(now);
            }
        }
        if active_in_doubt {
            for route in std::iter::once(&mut self.relay).chain(&mut self.direct) {
                route.prober.ping_now(now);
            }
        }
        let endpoint = self.endpoint.map(PathKind::Direct);
        self.direct.retain(|route| {
            let fresh = route.last_received.is_some_and(|at| now.saturating_duration_since(at) < LEARNT_LIFETIME);
            fresh || route.proved || route.origin == Origin::Given || endpoint == Some(route.kind)
        });
    }

    /// The next ping that is due. Only for a peer with session keys.
    pub(crate) fn poll_ping(&mut self, now: Instant) -> Option<Ping> {
        let (active, data_sent) = (self.active, self.data_sent);
        let relay = self.relay_up.then_some(&mut self.relay);
        let direct = self.is_loom.then_some(&mut self.direct);
        for route in relay.into_iter().chain(direct.into_iter().flatten()) {
            let pace = route.pace(active, data_sent);
            if let Some(sequence) = route.prober.ping(now, pace) {
                let probe = Probe { kind: ProbeKind::Ping, nonce: route.nonce, sequence };
                return Some(Ping { path: route.kind, probe });
            }
        }
        None
    }

    /// When [`Paths::handle_timeout`] and [`Paths::poll_ping`] are due. Only for a peer with session keys.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let relay = self.relay_up.then_some(&self.relay);
        let direct = self.is_loom.then_some(&self.direct);
        let routes = relay.into_iter().chain(direct.into_iter().flatten());
        routes.filter_map(|route| route.prober.next_timeout(route.pace(self.active, self.data_sent))).min()
    }

    /// Whether no path works although one of them should: the peer may have lost its keys. Addresses that never worked do
    /// not count.
    pub(crate) fn is_in_distress(&self) -> bool {
        let relay = (self.relay_up && !self.relay_absent).then_some(&self.relay);
        let direct = self.direct.iter().filter(|route| route.worked);
        self.is_loom && self.active.is_none() && relay.into_iter().chain(direct).any(|route| route.prober.is_lost())
    }

    /// Chooses the path for data. Returns whether the choice changed.
    pub(crate) fn select(&mut self) -> bool {
        let chosen = if self.is_loom { self.select_proved() } else { self.endpoint.map(PathKind::Direct) };
        let changed = chosen != self.active;
        self.active = chosen;
        let doubtful = chosen.and_then(|kind| self.route(kind)).is_some_and(|route| route.prober.is_suspect());
        let direct = matches!(chosen, Some(PathKind::Direct(_)));
        self.spare = (direct && doubtful && self.relay_works()).then_some(PathKind::Relay);
        changed
    }

    pub(crate) fn status(&self, now: Instant) -> Vec<PathStatus> {
        let relay = (self.relay_up || self.relay.last_received.is_some()).then_some(&self.relay);
        relay.into_iter().chain(&self.direct).map(|route| route.status(now, self.active)).collect()
    }

    fn select_proved(&self) -> Option<PathKind> {
        let relay = self.relay_works().then_some(&self.relay);
        let working = || relay.into_iter().chain(self.direct.iter().filter(|route| route.proved)).map(Route::score);
        let best = working().min_by(score::compare)?;
        let incumbent = working().find(|score| self.active == Some(score.kind));
        match incumbent {
            Some(incumbent) if !score::beats(&best, &incumbent) => Some(incumbent.kind),
            _ => Some(best.kind),
        }
    }

    fn heard_direct(&mut self, now: Instant, address: SocketAddr) -> bool {
        let kind = PathKind::Direct(address);
        if self.direct.get(self.heard_at).is_none_or(|route| route.kind != kind) {
            self.heard_at = match self.direct.iter().position(|route| route.kind == kind) {
                Some(at) => at,
                None => {
                    self.make_room_to_learn();
                    self.add_direct(now, kind, Origin::Learnt);
                    self.ping_all_now(now);
                    self.direct.len() - 1
                }
            };
        }
        self.direct[self.heard_at].last_received = Some(now);
        let moved = self.endpoint != Some(address);
        self.endpoint = Some(address);
        moved
    }

    /// A peer with a new address may have lost the old one.
    fn ping_all_now(&mut self, now: Instant) {
        for route in std::iter::once(&mut self.relay).chain(&mut self.direct) {
            route.prober.ping_now(now);
        }
    }

    fn add_direct(&mut self, now: Instant, kind: PathKind, origin: Origin) {
        let mut route = Route::new(kind, origin, &mut self.random);
        if self.is_loom {
            route.prober.start(now);
        }
        self.direct.push(route);
    }

    fn make_room_to_learn(&mut self) {
        let learnt = || self.direct.iter().enumerate().filter(|(_, route)| route.origin == Origin::Learnt);
        if learnt().count() < MAX_LEARNT {
            return;
        }
        let spared = |route: &Route| route.proved || self.active == Some(route.kind);
        let oldest = learnt().min_by_key(|(_, route)| (spared(route), route.last_received));
        if let Some(at) = oldest.map(|(at, _)| at) {
            self.direct.remove(at);
        }
    }

    fn route(&self, kind: PathKind) -> Option<&Route> {
        match kind {
            PathKind::Relay => Some(&self.relay),
            PathKind::Direct(_) => self.direct.iter().find(|route| route.kind == kind),
        }
    }

    fn route_mut(&mut self, kind: PathKind) -> Option<&mut Route> {
        match kind {
            PathKind::Relay => Some(&mut self.relay),
            PathKind::Direct(_) => self.direct.iter_mut().find(|route| route.kind == kind),
        }
    }
}
