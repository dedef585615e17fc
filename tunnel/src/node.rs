//! The node: every peer, and which of them a datagram or a packet belongs to.
//!
//! [`Node`] has no socket, clock or task: inputs come in through `handle_*` and the setters, each with the time, and the
//! caller polls with `poll_*` for what to do. After every input a driver drains [`Node::poll_transmit`],
//! [`Node::poll_packet`] and [`Node::poll_event`], and asks [`Node::poll_timeout`] when to call
//! [`Node::handle_timeout`] next. Time must not go backwards. (Only one thing comes from the system: the ephemeral keys
//! of handshakes, which `boringtun` generates itself; they affect no decision.)
//!
//! **Incoming datagrams.** The receiver index of a datagram names its session. We choose its upper 24 bits, and put the
//! peer's slot in a table there, so that no address or key is hashed per packet. Handshake initiations have no receiver
//! index; they pass the gate, which finds out who made them. If one arrives by several paths, only the first copy
//! counts. One from an unknown key is never answered, but reported and kept for a moment: if the application adds the
//! peer, the handshake continues.
//!
//! **Dropped datagrams** are counted by reason in [`Counters`] and never answered. (Under a flood of handshakes their
//! senders get cookies; paper §5.3.)

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use x25519_dalek::{PublicKey, StaticSecret};

pub use crate::path::PathKind as Path;
use crate::{
    output::Output,
    peer::{NodeContext, Peer, PeerConfig, PeerStatus},
    random::Random,
    wireguard::{self, Admission, COOKIE_REPLY_LEN, Gate, INITIATION_LEN, Message, OVERHEAD, Refusal},
};

/// Bytes of an inner packet: a jumbo frame. The netstack's are far shorter.
pub const MAX_PACKET: usize = 9000;

/// Peers of one node.
pub const MAX_PEERS: usize = 1 << SLOT_BITS;

/// How long copies of an initiation that arrive by other paths are recognised.
pub const DUPLICATE_WINDOW: Duration = Duration::from_secs(10);

/// Initiations remembered for that: two seconds of the most that the gate lets pass.
pub const MAX_REMEMBERED: usize = 256;

/// Reports of unknown keys per second.
pub const UNKNOWN_PER_SECOND: u32 = 4;

/// How long an unknown key's initiation is kept, in case the key becomes a peer's: about as long as its sender accepts
/// the answer.
pub const UNKNOWN_LIFETIME: Duration = Duration::from_secs(2);

/// Initiations kept from unknown keys.
pub const MAX_UNKNOWN: usize = 8;

/// Bits of a session index for the peer's slot; the bits above differ between successive peers in the same slot.
const SLOT_BITS: u32 = 14;
const INDEX_BITS: u32 = 24;

/// A node's identity and keys.
pub struct NodeConfig {
    /// An X25519 key.
    pub private_key: StaticSecret,
    /// The node's address inside the tunnel.
    pub address: Ipv6Addr,
    /// Seeds jitter, path nonces and session indices. Need not be secret, but should differ at each start.
    pub seed: u64,
}

/// One batch of datagrams for one path, in the buffer given to [`Node::poll_transmit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// The path to send the datagrams on.
    pub path: Path,
    /// The destination. All zero for a cookie reply to an unknown sender on a direct path.
    pub peer: PublicKey,
    /// The size of every datagram except the last, which may be shorter.
    pub segment_size: usize,
}

/// Events of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeEvent {
    /// A valid handshake initiation came from a key that is not a peer's (at most [`UNKNOWN_PER_SECOND`]).
    UnknownPeer(PublicKey),
    /// There is a session with a peer, for the first time or after there was none.
    SessionEstablished(PublicKey),
    /// Data for the peer takes another path.
    PathChanged {
        /// The peer.
        peer: PublicKey,
        /// The new path; `None` when no path works.
        path: Option<Path>,
    },
    /// A peer was removed because another has taken over its address.
    PeerReplaced {
        /// The removed peer.
        old: PublicKey,
        /// The peer that has the address now.
        new: PublicKey,
    },
}

/// Datagrams that the node dropped, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Initiations from unknown keys, and packets for unknown sessions.
    pub unknown_peer: u64,
    /// Packets and handshakes seen before, or too old to tell.
    pub replayed: u64,
    /// Packets that did not authenticate, or that the relay attributes to another sender.
    pub forged: u64,
    /// Packets that are not WireGuard, or whose contents are not IPv6.
    pub malformed: u64,
    /// Authentic packets whose inner source address is not their peer's.
    pub spoofed: u64,
    /// Packets, authentic or not, for a session or handshake that has ended. A few are normal after a rekey.
    pub stale: u64,
    /// Handshakes refused because too many came.
    pub rate_limited: u64,
    /// Packets dropped because a queue was full.
    pub overflow: u64,
    /// Outgoing packets for an address that no peer has, or that are too long.
    pub no_route: u64,
    /// Copies of an initiation that arrived by several paths; harmless.
    pub duplicate: u64,
}

impl Counters {
    pub(crate) const fn refuse(&mut self, refusal: Refusal) {
        match refusal {
            Refusal::Replayed => self.replayed += 1,
            Refusal::Forged => self.forged += 1,
            Refusal::Stale => self.stale += 1,
            Refusal::Malformed => self.malformed += 1,
            Refusal::RateLimited => self.rate_limited += 1,
        }
    }
}

/// The state of a WireGuard node and all its peers.
pub struct Node {
    gate: Gate,
    address: Ipv6Addr,
    relay_up: bool,
    /// Free slots are reused.
    slots: Vec<Option<Box<Peer>>>,
    by_key: HashMap<[u8; 32], usize>,
    by_address: HashMap<Ipv6Addr, usize>,
    /// A cache of the last lookup, because the next packet mostly goes to the same peer.
    last_route: Option<(Ipv6Addr, usize)>,
    seen: VecDeque<Seen>,
    unknown: Unknown,
    random: Random,
    out: Output,
}

/// A handshake initiation that was accepted.
struct Seen {
    fingerprint: [u8; 16],
    path: Path,
    at: Instant,
}

/// Recent initiations from unknown keys, and the rate limit of their reports.
struct Unknown {
    recent: VecDeque<PendingInitiation>,
    /// The beginning of the current second, and the reports in it.
    window: (Instant, u32),
}

struct PendingInitiation {
    key: PublicKey,
    path: Path,
    at: Instant,
    initiation: [u8; INITIATION_LEN],
}

impl Node {
    /// A node without peers.
    #[must_use]
    pub fn new(config: NodeConfig, now: Instant) -> Self {
        Self {
            gate: Gate::new(config.private_key, now),
            address: config.address,
            relay_up: false,
            slots: Vec::new(),
            by_key: HashMap::new(),
            by_address: HashMap::new(),
            last_route: None,
            seen: VecDeque::new(),
            unknown: Unknown { recent: VecDeque::new(), window: (now, 0) },
            random: Random::new(config.seed),
            out: Output::default(),
        }
    }

    /// The node's public key.
    #[must_use]
    pub const fn public_key(&self) -> PublicKey {
        self.gate.public_key()
    }

    /// Adds or updates a peer. With `initiate` the node starts handshakes on its own and keeps retrying; without, only
    /// when there is something to send.
    ///
    /// New candidates keep the session; another pre-shared key or address ends it. Another peer with the same address is
    /// removed. Beyond [`MAX_PEERS`] a new peer is counted in [`Counters::overflow`] and ignored.
    pub fn upsert_peer(&mut self, now: Instant, peer: PeerConfig, initiate: bool) {
        self.remove_others_at(now, &peer);
        if let Some(&slot) = self.by_key.get(peer.public_key.as_bytes())
            && let Some(known) = &mut self.slots[slot]
        {
            if known.is_same_peering(&peer) {
                return known.update(now, peer.candidates, initiate, &mut self.out);
            }
            self.remove_peer(now, &peer.public_key);
        }
        let Some(slot) = self.free_slot() else {
            self.out.counters.overflow += 1;
            return;
        };
        let generation = self.random.next() as u32 & ((1 << (INDEX_BITS - SLOT_BITS)) - 1);
        let index = generation << SLOT_BITS | slot as u32;
        let (key, address) = (peer.public_key, peer.address);
        let context = NodeContext { gate: &self.gate, address: self.address, relay_up: self.relay_up };
        let mut peer = Box::new(Peer::new(now, peer, initiate, index, &context, &mut self.random));
        // Continue the handshake that led to this call before starting one of our own.
        if let Some(pending) = self.unknown.take(now, &key) {
            peer.handle_initiation(now, pending.path, &pending.initiation, &mut self.out);
        }
        peer.settle(now, &mut self.out);
        self.slots[slot] = Some(peer);
        self.by_key.insert(key.to_bytes(), slot);
        self.by_address.insert(address, slot);
        self.last_route = None;
    }

    /// Removes a peer and drops everything queued for or from it. Returns its address if it was a peer.
    pub fn remove_peer(&mut self, _now: Instant, key: &PublicKey) -> Option<Ipv6Addr> {
        let slot = self.by_key.remove(key.as_bytes())?;
        let peer = self.slots[slot].take()?;
        self.by_address.remove(&peer.address());
        self.last_route = None;
        self.out.purge(key);
        Some(peer.address())
    }

    /// The relay connection was established or lost. A driver must report both, even if one follows the other at once.
    pub fn set_relay_up(&mut self, now: Instant, up: bool) {
        self.relay_up = up;
        for peer in self.slots.iter_mut().flatten() {
            peer.set_relay_up(now, up, &mut self.out);
        }
    }

    /// The relay says that the peer is not connected to it.
    pub fn relay_peer_absent(&mut self, now: Instant, key: &PublicKey) {
        if let Some(&slot) = self.by_key.get(key.as_bytes())
            && let Some(peer) = &mut self.slots[slot]
        {
            peer.set_relay_absent(now, &mut self.out);
        }
    }

    /// Processes a datagram. `source_key` is the sender according to the relay; ignored on a direct path.
    pub fn handle_datagram(&mut self, now: Instant, path: Path, source_key: Option<&PublicKey>, datagram: &mut [u8]) {
        let claimed = match (path, source_key) {
            (Path::Direct(_), _) => None,
            (Path::Relay, Some(key)) => Some(*key),
            (Path::Relay, None) => {
                self.out.counters.malformed += 1;
                return;
            }
        };
        let message = wireguard::classify(datagram).filter(|_| datagram.len() <= MAX_PACKET + OVERHEAD);
        match message {
            Some(Message::Initiation) => self.handle_initiation(now, path, claimed, datagram),
            Some(message) => self.handle_message(now, path, claimed, message, datagram),
            None => self.out.counters.malformed += 1,
        }
    }

    /// Sends an IPv6 packet from the netstack to the peer that has its destination address.
    pub fn handle_packet(&mut self, now: Instant, packet: &[u8]) {
        let destination: Option<[u8; 16]> = packet.get(24..40).and_then(|bytes| bytes.try_into().ok());
        let Some(destination) = destination.filter(|_| packet[0] >> 4 == 6) else {
            self.out.counters.malformed += 1;
            return;
        };
        let route = self.route(Ipv6Addr::from(destination)).filter(|_| packet.len() <= MAX_PACKET);
        match route.and_then(|slot| self.slots[slot].as_mut()) {
            Some(peer) => peer.send(now, packet, &mut self.out),
            None => self.out.counters.no_route += 1,
        }
    }

    /// Does what is due. To be called at [`Node::poll_timeout`]; harmless at any other time.
    pub fn handle_timeout(&mut self, now: Instant) {
        for peer in self.slots.iter_mut().flatten() {
            if peer.next_timeout() <= now {
                peer.handle_timeout(now, &mut self.out);
            }
        }
    }

    /// The host's network has changed, or it has slept: probes every path and retries handshakes at once.
    pub fn network_changed(&mut self, now: Instant) {
        for peer in self.slots.iter_mut().flatten() {
            peer.network_changed(now, &mut self.out);
        }
    }

    /// The oldest batch of datagrams, swapped into `buffer`: at most
    /// [`MAX_BATCH_BYTES`](crate::output::MAX_BATCH_BYTES) and
    /// [`MAX_BATCH_SEGMENTS`](crate::output::MAX_BATCH_SEGMENTS).
    pub fn poll_transmit(&mut self, buffer: &mut Vec<u8>) -> Option<Transmit> {
        self.out.outbox.pop(buffer)
    }

    /// The oldest decrypted packet, copied into `buffer`, and who sent it. Its source address is the peer's.
    pub fn poll_packet(&mut self, buffer: &mut Vec<u8>) -> Option<PublicKey> {
        self.out.inbox.pop(buffer)
    }

    /// Takes the oldest pending event.
    pub fn poll_event(&mut self) -> Option<NodeEvent> {
        self.out.pop_event()
    }

    /// When to call [`Node::handle_timeout`]; `None` without peers. May be in the past.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.slots.iter().flatten().map(|peer| peer.next_timeout()).min()
    }

    /// The status of every peer.
    #[must_use]
    pub fn peers(&self, now: Instant) -> Vec<PeerStatus> {
        self.slots.iter().flatten().map(|peer| peer.status(now)).collect()
    }

    /// The number of datagrams dropped so far, by reason.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.out.counters
    }

    fn handle_initiation(&mut self, now: Instant, path: Path, claimed: Option<PublicKey>, datagram: &[u8]) {
        let initiation: &[u8; INITIATION_LEN] = datagram.try_into().expect("the message's length was checked");
        let mut cookie_reply = [0; COOKIE_REPLY_LEN];
        let key = match self.gate.admit(now, cookie_source(path, claimed), initiation, &mut cookie_reply) {
            Admission::From(key) => key,
            Admission::Cookie => {
                self.out.counters.rate_limited += 1;
                self.out.send(claimed.unwrap_or_else(|| [0; 32].into()), path, &cookie_reply);
                return;
            }
            Admission::Refused(refusal) => return self.out.counters.refuse(refusal),
        };
        if claimed.is_some_and(|claimed| claimed != key) {
            self.out.counters.forged += 1;
            return;
        }
        let peer = self.by_key.get(key.as_bytes()).copied().and_then(|slot| self.slots[slot].as_mut());
        if let Some(first) = remember(&mut self.seen, now, path, initiation) {
            if first == path {
                self.out.counters.replayed += 1;
            } else {
                self.out.counters.duplicate += 1;
                if let Some(peer) = peer {
                    peer.handle_duplicate(now, path);
                }
            }
            return;
        }
        match peer {
            Some(peer) => peer.handle_initiation(now, path, initiation, &mut self.out),
            None => {
                self.out.counters.unknown_peer += 1;
                if self.unknown.note(now, key, path, initiation) {
                    self.out.event(NodeEvent::UnknownPeer(key));
                }
            }
        }
    }

    fn handle_message(
        &mut self,
        now: Instant,
        path: Path,
        claimed: Option<PublicKey>,
        message: Message,
        datagram: &[u8],
    ) {
        let (Message::Data(index) | Message::Response(index) | Message::CookieReply(index)) = message else { return };
        let index = index >> (u32::BITS - INDEX_BITS);
        let slot = index as usize & (MAX_PEERS - 1);
        let peer = self.slots.get_mut(slot).and_then(Option::as_mut).filter(|peer| peer.index() == index);
        match peer {
            None => self.out.counters.unknown_peer += 1,
            Some(peer) if claimed.is_some_and(|claimed| claimed != peer.key()) => self.out.counters.forged += 1,
            Some(peer) => peer.handle_message(now, path, message, datagram, &mut self.out),
        }
    }

    fn route(&mut self, destination: Ipv6Addr) -> Option<usize> {
        if let Some((address, slot)) = self.last_route
            && address == destination
        {
            return Some(slot);
        }
        let slot = *self.by_address.get(&destination)?;
        self.last_route = Some((destination, slot));
        Some(slot)
    }

    fn remove_others_at(&mut self, now: Instant, peer: &PeerConfig) {
        let holder = self.by_address.get(&peer.address).and_then(|&slot| self.slots[slot].as_ref());
        if let Some(old) = holder.map(|holder| holder.key()).filter(|key| *key != peer.public_key) {
            self.remove_peer(now, &old);
            self.out.event(NodeEvent::PeerReplaced { old, new: peer.public_key });
        }
    }

    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            return Some(slot);
        }
        if self.slots.len() == MAX_PEERS {
            return None;
        }
        self.slots.push(None);
        Some(self.slots.len() - 1)
    }
}

impl Unknown {
    /// Keeps the initiation; returns whether its key should be reported.
    fn note(&mut self, now: Instant, key: PublicKey, path: Path, initiation: &[u8; INITIATION_LEN]) -> bool {
        self.recent.retain(|pending| now.saturating_duration_since(pending.at) < UNKNOWN_LIFETIME);
        let pending = PendingInitiation { key, path, at: now, initiation: *initiation };
        if let Some(known) = self.recent.iter_mut().find(|pending| pending.key == key) {
            // The key was reported already; keep its latest initiation, which is the one to answer.
            (known.path, known.initiation) = (pending.path, pending.initiation);
            return false;
        }
        if now.saturating_duration_since(self.window.0) >= Duration::from_secs(1) {
            self.window = (now, 0);
        }
        if self.window.1 == UNKNOWN_PER_SECOND {
            return false;
        }
        self.window.1 += 1;
        if self.recent.len() == MAX_UNKNOWN {
            self.recent.pop_front();
        }
        self.recent.push_back(pending);
        true
    }

    fn take(&mut self, now: Instant, key: &PublicKey) -> Option<PendingInitiation> {
        let at = self.recent.iter().position(|pending| pending.key == *key)?;
        let pending = self.recent.remove(at)?;
        (now.saturating_duration_since(pending.at) < UNKNOWN_LIFETIME).then_some(pending)
    }
}

/// Remembers an initiation; if this is a copy, returns the path of the first one.
fn remember(seen: &mut VecDeque<Seen>, now: Instant, path: Path, initiation: &[u8; INITIATION_LEN]) -> Option<Path> {
    let fingerprint = wireguard::fingerprint(initiation);
    while seen.front().is_some_and(|first| now.saturating_duration_since(first.at) >= DUPLICATE_WINDOW) {
        seen.pop_front();
    }
    if let Some(first) = seen.iter().find(|first| first.fingerprint == fingerprint) {
        return Some(first.path);
    }
    if seen.len() == MAX_REMEMBERED {
        seen.pop_front();
    }
    seen.push_back(Seen { fingerprint, path, at: now });
    None
}

/// What a cookie is bound to (paper §5.4.7): the sender's IP address, or over the relay, which knows no address but has
/// verified the key, a part of the key.
fn cookie_source(path: Path, claimed: Option<PublicKey>) -> IpAddr {
    match (path, claimed) {
        (Path::Direct(address), _) => address.ip(),
        (Path::Relay, Some(key)) => {
            let half = key.as_bytes().first_chunk::<16>().expect("a key has 32 bytes");
            IpAddr::V6(Ipv6Addr::from(*half))
        }
        (Path::Relay, None) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}
