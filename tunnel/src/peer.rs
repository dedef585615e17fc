//! A peer: its session, its paths, and the packets waiting for either.
//!
//! Each part makes its own decisions: the session when to renew keys, the paths which one is best, the retry schedule
//! when to repeat a handshake. Every input ends in `Peer::settle`, which acts on them: sends the pings that are due,
//! moves to a better path, flushes pending packets, starts a handshake when one is needed.
//!
//! A handshake is started when there are no keys and either the application asked for it or packets are waiting; and
//! when there are keys but every path is silent (*distress*), because the peer may have been restarted and lost its
//! keys. It goes over all paths at once; the answer shows which one works.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use x25519_dalek::PublicKey;

use crate::{
    node::NodeEvent,
    output::{Output, Written},
    path::{PathKind, PathStatus, Paths, Probe, ProbeKind},
    pending::PendingPackets,
    random::Random,
    retry::RetrySchedule,
    wireguard::{CONTROL_LEN, Gate, INITIATION_LEN, Message, OVERHEAD, Received, Session, is_initiation, sender_index},
};

/// An idle peer gets an empty packet this often, to keep NAT mappings (the value that `wg(8)` recommends).
pub const KEEPALIVE: Duration = Duration::from_secs(25);

/// Between checks of WireGuard's timers while there is traffic; they count seconds.
pub const TICK_BUSY: Duration = Duration::from_secs(1);

/// The same without traffic, when only the expiry of keys matters, after 180 s (paper §6.1).
pub const TICK_IDLE: Duration = Duration::from_secs(10);

/// How long traffic counts as recent: `KEEPALIVE_TIMEOUT + REKEY_TIMEOUT` (paper §6.1), and a little more.
pub const TICK_WINDOW: Duration = Duration::from_secs(20);

/// How long a rekey is tried only on the path in use, before every path is tried.
pub const REKEY_PATH_TIMEOUT: Duration = Duration::from_millis(500);

/// The configuration of a peer.
#[derive(Clone)]
pub struct PeerConfig {
    /// An X25519 key.
    pub public_key: PublicKey,
    /// The key that WireGuard mixes into the handshake with this peer (paper §5.2).
    pub preshared_key: Option<[u8; 32]>,
    /// The peer's address inside the tunnel: the only source accepted from it, and the destination routed to it.
    pub address: Ipv6Addr,
    /// UDP addresses at which the peer may be reachable.
    pub candidates: Vec<SocketAddr>,
}

/// The status of one peer.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// The peer's public key.
    pub public_key: PublicKey,
    /// Its address inside the tunnel.
    pub address: Ipv6Addr,
    /// The time since the last completed handshake.
    pub last_handshake: Option<Duration>,
    /// Bytes of inner packets sent.
    pub sent: u64,
    /// Bytes of inner packets received.
    pub received: u64,
    /// The known paths to the peer.
    pub paths: Vec<PathStatus>,
}

/// What a new peer needs to know of its node.
pub(crate) struct NodeContext<'a> {
    pub(crate) gate: &'a Gate,
    pub(crate) address: Ipv6Addr,
    pub(crate) relay_up: bool,
}

/// The state of one peer.
pub(crate) struct Peer {
    config: PeerConfig,
    initiate: bool,
    index: u32,
    own_address: Ipv6Addr,
    session: Session,
    /// Whether both sides are known to have keys: our handshake was answered, or data came under keys of one we answered.
    live: bool,
    /// The last two initiations: which session, and when.
    initiated: [Option<(u32, Instant)>; 2],
    established_at: Option<Instant>,
    /// WireGuard has asked for new keys, and there are none yet.
    rekeying: bool,
    retry: Option<RetrySchedule>,
    paths: Paths,
    pending: PendingPackets,
    next_tick: Instant,
    last_sent: Instant,
    last_data: Option<Instant>,
    sent: u64,
    received: u64,
    random: Random,
}

impl Peer {
    /// A peer without keys. `index` has 24 bits and no other peer of the node has it.
    pub(crate) fn new(
        now: Instant,
        config: PeerConfig,
        initiate: bool,
        index: u32,
        context: &NodeContext<'_>,
        random: &mut Random,
    ) -> Self {
        let session = context.gate.session(now, config.public_key, config.preshared_key, index);
        let mut paths = Paths::new(context.relay_up, Random::new(random.next()));
        paths.set_candidates(now, &config.candidates);
        Self {
            config,
            initiate,
            index,
            own_address: context.address,
            session,
            live: false,
            initiated: [None; 2],
            established_at: None,
            rekeying: false,
            retry: None,
            paths,
            pending: PendingPackets::default(),
            next_tick: now + TICK_IDLE,
            last_sent: now,
            last_data: None,
            sent: 0,
            received: 0,
            random: Random::new(random.next()),
        }
    }

    pub(crate) const fn key(&self) -> PublicKey {
        self.config.public_key
    }

    pub(crate) const fn address(&self) -> Ipv6Addr {
        self.config.address
    }

    pub(crate) const fn index(&self) -> u32 {
        self.index
    }

    /// Whether the new configuration allows the session to continue.
    pub(crate) fn is_same_peering(&self, config: &PeerConfig) -> bool {
        self.config.public_key == config.public_key
            && self.config.preshared_key == config.preshared_key
            && self.config.address == config.address
    }

    /// Sets the candidates, and whether to initiate handshakes.
    pub(crate) fn update(&mut self, now: Instant, candidates: Vec<SocketAddr>, initiate: bool, out: &mut Output) {
        let news = self.paths.set_candidates(now, &candidates);
        self.config.candidates = candidates;
        self.initiate |= initiate;
        if news {
            self.retry_now(now);
        }
        self.settle(now, out);
    }

    pub(crate) fn set_relay_up(&mut self, now: Instant, up: bool, out: &mut Output) {
        self.paths.set_relay_up(now, up);
        if up {
            self.retry_now(now);
        }
        self.settle(now, out);
    }

    pub(crate) fn set_relay_absent(&mut self, now: Instant, out: &mut Output) {
        self.paths.set_relay_absent();
        self.settle(now, out);
    }

    pub(crate) fn network_changed(&mut self, now: Instant, out: &mut Output) {
        // The machine may have slept, and the keys may have expired meanwhile.
        self.tick(now, out);
        self.paths.network_changed(now);
        self.retry_now(now);
        self.settle(now, out);
    }

    /// Processes an initiation that has passed the node's gate.
    pub(crate) fn handle_initiation(
        &mut self,
        now: Instant,
        from: PathKind,
        datagram: &[u8; INITIATION_LEN],
        out: &mut Output,
    ) {
        self.tick_if_stale(now, out);
        let mut reply = [0; CONTROL_LEN];
        match self.session.decrypt(now, datagram, &mut reply) {
            Ok(Received::Reply(len)) => {
                self.send_finished(now, from, &reply[..len], out);
                self.paths.heard(now, from);
                if let Some(retry) = &mut self.retry {
                    retry.yield_to_peer(now);
                }
                self.settle(now, out);
            }
            Ok(_) => {}
            Err(refusal) => out.counters.refuse(refusal),
        }
    }

    /// An identical initiation arrived by another path. If that is the relay, the peer is a Loom node.
    pub(crate) fn handle_duplicate(&mut self, now: Instant, from: PathKind) {
        if from == PathKind::Relay {
            self.paths.set_loom(now);
        }
    }

    /// Processes any other datagram for a session of this peer.
    pub(crate) fn handle_message(
        &mut self,
        now: Instant,
        from: PathKind,
        message: Message,
        datagram: &[u8],
        out: &mut Output,
    ) {
        match message {
            Message::Data(index) => self.handle_data(now, from, index, datagram, out),
            Message::Response(index) => self.handle_response(now, from, index, datagram, out),
            Message::CookieReply(_) => {
                if let Err(refusal) = self.session.decrypt(now, datagram, &mut [0; CONTROL_LEN]) {
                    out.counters.refuse(refusal);
                }
            }
            Message::Initiation => {}
        }
    }

    /// Sends a packet, or queues it until it can be sent.
    pub(crate) fn send(&mut self, now: Instant, packet: &[u8], out: &mut Output) {
        self.last_data = Some(now);
        self.tick_if_stale(now, out);
        if let Some(path) = self.paths.active().filter(|_| self.live && self.pending.is_empty())
            && self.transmit_data(now, path, packet, out)
        {
            return;
        }
        out.counters.overflow += self.pending.push(packet);
        self.settle(now, out);
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant, out: &mut Output) {
        if now >= self.next_tick {
            self.tick(now, out);
        }
        if self.live {
            self.paths.handle_timeout(now);
            if now >= self.last_sent + KEEPALIVE {
                self.last_sent = now;
                if let Some(path) = self.paths.active() {
                    self.transmit(now, path, &[], out);
                }
            }
        }
        self.settle(now, out);
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        let retry = self.retry.map(|retry| retry.next());
        let paths = if self.live { self.paths.next_timeout() } else { None };
        let keepalive = self.live.then_some(self.last_sent + KEEPALIVE);
        [retry, paths, keepalive].into_iter().flatten().fold(self.next_tick, Instant::min)
    }

    pub(crate) fn status(&self, now: Instant) -> PeerStatus {
        PeerStatus {
            public_key: self.config.public_key,
            address: self.config.address,
            last_handshake: self.established_at.map(|at| now.saturating_duration_since(at)),
            sent: self.sent,
            received: self.received,
            paths: self.paths.status(now),
        }
    }

    /// Acts on the decisions of the handshake, the session and the paths.
    pub(crate) fn settle(&mut self, now: Instant, out: &mut Output) {
        if self.paths.select() {
            out.event(NodeEvent::PathChanged { peer: self.key(), path: self.paths.active() });
        }
        if self.live {
            while let Some(ping) = self.paths.poll_ping(now) {
                self.send_probe(now, ping.path, ping.probe, out);
            }
            self.flush(now, out);
        }
        self.keep_trying(now, out);
    }

    fn flush(&mut self, now: Instant, out: &mut Output) {
        let Some(path) = self.paths.active() else { return };
        while let Some(packet) = self.pending.pop() {
            if !self.transmit_data(now, path, &packet, out) {
                self.pending.put_back(packet);
                return;
            }
        }
    }

    fn keep_trying(&mut self, now: Instant, out: &mut Output) {
        let keyless = !self.live && (self.initiate || !self.pending.is_empty());
        let distress = self.live && self.paths.is_in_distress();
        if !keyless && !distress && !self.rekeying {
            self.retry = None;
            return;
        }
        let retry = *self.retry.get_or_insert(RetrySchedule::from(now));
        if retry.next() <= now {
            self.initiate_everywhere(now, out);
            if let Some(retry) = &mut self.retry {
                retry.advance(now, &mut self.random);
            }
        }
    }

    /// Conditions have improved: retry the handshake now.
    fn retry_now(&mut self, now: Instant) {
        if let Some(retry) = &mut self.retry {
            *retry = RetrySchedule::from(now);
        }
    }

    fn initiate_everywhere(&mut self, now: Instant, out: &mut Output) {
        if self.paths.handshake_targets().next().is_none() {
            return;
        }
        let mut message = [0; CONTROL_LEN];
        // Update WireGuard's clock first, from which the time of this attempt is taken.
        let ticked = self.run_timers(now, &mut message);
        let ready = ticked.filter(|_| is_initiation(&message)).or_else(|| self.session.initiate(now, &mut message));
        if let Some(len) = ready {
            self.note_initiation(now, &message);
            for path in self.paths.handshake_targets() {
                out.send(self.config.public_key, path, &message[..len]);
            }
        }
    }

    fn note_initiation(&mut self, now: Instant, message: &[u8; CONTROL_LEN]) {
        self.initiated = [Some((sender_index(message), now)), self.initiated[0]];
        self.last_sent = now;
    }

    fn tick_if_stale(&mut self, now: Instant, out: &mut Output) {
        if self.session.is_stale(now) {
            self.tick(now, out);
        }
    }

    /// Runs WireGuard's timers and sends what they require.
    fn tick(&mut self, now: Instant, out: &mut Output) {
        let mut message = [0; CONTROL_LEN];
        let Some(len) = self.run_timers(now, &mut message) else { return };
        if !is_initiation(&message) {
            if let Some(path) = self.paths.active() {
                self.send_finished(now, path, &message[..len], out);
            }
            return;
        }
        self.note_initiation(now, &message);
        let key = self.config.public_key;
        match self.paths.active().filter(|_| self.live && !self.rekeying) {
            Some(active) => {
                out.send(key, active, &message[..len]);
                if active != PathKind::Relay && self.paths.relay_works() {
                    out.send(key, PathKind::Relay, &message[..len]);
                }
            }
            None => {
                for path in self.paths.handshake_targets() {
                    out.send(key, path, &message[..len]);
                }
            }
        }
        if self.live {
            self.rekeying = true;
            self.retry.get_or_insert(RetrySchedule::from(now + REKEY_PATH_TIMEOUT));
        }
    }

    fn run_timers(&mut self, now: Instant, message: &mut [u8; CONTROL_LEN]) -> Option<usize> {
        let len = self.session.tick(now, message);
        if !self.session.is_established() {
            self.live = false;
            self.rekeying = false;
        }
        let recent = self.last_data.is_some_and(|at| now.saturating_duration_since(at) < TICK_WINDOW);
        let busy = recent || self.rekeying || self.retry.is_some();
        self.next_tick = now + if busy { TICK_BUSY } else { TICK_IDLE };
        len
    }

    fn handle_response(&mut self, now: Instant, from: PathKind, index: u32, datagram: &[u8], out: &mut Output) {
        self.tick_if_stale(now, out);
        let mut message = [0; CONTROL_LEN];
        match self.session.decrypt(now, datagram, &mut message) {
            Ok(Received::Reply(len)) => {
                // The first packet under the new keys, which confirms them to the peer (paper §5.4.3).
                self.send_finished(now, from, &message[..len], out);
                self.established(now, out);
                let initiated = self.initiated.iter().flatten().find(|(of, _)| *of == index);
                let rtt = initiated.map(|(_, at)| now.saturating_duration_since(*at));
                self.paths.handshake_answered(now, from, rtt);
                while let Some(len) = self.session.pop_queued(now, &mut message) {
                    self.send_finished(now, from, &message[..len], out);
                }
                self.settle(now, out);
            }
            Ok(_) => {}
            Err(refusal) => out.counters.refuse(refusal),
        }
    }

    fn established(&mut self, now: Instant, out: &mut Output) {
        let first = !self.live;
        let anew = first || self.paths.active().is_none();
        self.live = true;
        self.rekeying = false;
        self.retry = None;
        self.established_at = Some(now);
        self.next_tick = self.next_tick.min(now + TICK_BUSY);
        if anew {
            self.paths.session_began(now);
        }
        if first {
            out.event(NodeEvent::SessionEstablished(self.key()));
        }
    }

    fn handle_data(&mut self, now: Instant, from: PathKind, index: u32, datagram: &[u8], out: &mut Output) {
        let confirmed = self.session.unconfirmed() == Some(index);
        let room = out.inbox.room(datagram.len().max(CONTROL_LEN));
        let received = match self.session.decrypt(now, datagram, room) {
            Ok(received) => received,
            Err(refusal) => return out.counters.refuse(refusal),
        };
        if confirmed {
            self.established(now, out);
        }
        let news = self.paths.heard(now, from);
        let probe = match received {
            Received::Packet { len, source } if source == self.config.address => self.take_packet(now, len, out),
            Received::Packet { .. } | Received::Ipv4 => {
                out.counters.spoofed += 1;
                None
            }
            Received::Nothing | Received::Reply(_) => None,
        };
        if let Some(probe) = probe {
            self.handle_probe(now, from, probe, out);
        }
        if confirmed || news || probe.is_some() {
            self.settle(now, out);
        }
    }

    /// Queues a decrypted packet for the netstack, unless it is a probe.
    fn take_packet(&mut self, now: Instant, len: usize, out: &mut Output) -> Option<Probe> {
        let probe = Probe::decode(out.inbox.written(len));
        if probe.is_none() {
            self.last_data = Some(now);
            self.received += len as u64;
            if !out.inbox.commit(self.config.public_key, len) {
                out.counters.overflow += 1;
            }
        }
        probe
    }

    fn handle_probe(&mut self, now: Instant, from: PathKind, probe: Probe, out: &mut Output) {
        self.paths.set_loom(now);
        match probe.kind {
            ProbeKind::Ping => {
                self.send_probe(now, from, Probe { kind: ProbeKind::Pong, ..probe }, out);
                self.paths.pinged(now, from);
            }
            ProbeKind::Pong => {
                self.paths.pong(now, probe.nonce, probe.sequence);
            }
        }
    }

    fn send_probe(&mut self, now: Instant, path: PathKind, probe: Probe, out: &mut Output) {
        self.transmit(now, path, &probe.encode(self.own_address, self.config.address), out);
    }

    /// Sends a packet of the netstack. Returns false if there are no keys.
    fn transmit_data(&mut self, now: Instant, path: PathKind, packet: &[u8], out: &mut Output) -> bool {
        let sent = match self.paths.spare() {
            Some(spare) => self.transmit_twice(now, path, spare, packet, out),
            None => self.transmit(now, path, packet, out),
        };
        if sent {
            self.sent += packet.len() as u64;
            self.paths.data_sent(now);
        }
        sent
    }

    /// Encrypts directly into the outbox.
    fn transmit(&mut self, now: Instant, path: PathKind, packet: &[u8], out: &mut Output) -> bool {
        let (session, key) = (&mut self.session, self.config.public_key);
        let written = out.outbox.write(key, path, packet.len() + OVERHEAD, |slot| session.encrypt(now, packet, slot));
        match written {
            Written::Queued => self.last_sent = now,
            Written::Full => out.counters.overflow += 1,
            Written::Nothing => {}
        }
        written != Written::Nothing
    }

    fn transmit_twice(
        &mut self,
        now: Instant,
        path: PathKind,
        spare: PathKind,
        packet: &[u8],
        out: &mut Output,
    ) -> bool {
        let mut datagram = std::mem::take(&mut out.scratch);
        datagram.resize(packet.len() + OVERHEAD, 0);
        let encrypted = self.session.encrypt(now, packet, &mut datagram);
        if encrypted {
            self.send_finished(now, path, &datagram, out);
            self.send_finished(now, spare, &datagram, out);
        }
        out.scratch = datagram;
        encrypted
    }

    fn send_finished(&mut self, now: Instant, path: PathKind, datagram: &[u8], out: &mut Output) {
        self.last_sent = now;
        out.send(self.config.public_key, path, datagram);
    }
}
