//! A small internet in one thread: nodes, direct links between their UDP addresses, one relay, and a clock that jumps
//! from one event to the next.
//!
//! The same [`Node`] runs here as in the agent and the CLI; only the driver is another. All that is random comes from
//! the world's seed, so that a failure repeats. (The handshakes' ephemeral keys are drawn by the system, but no
//! decision depends on their bits.)

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use loom_tunnel::{
    PeerConfig, PeerStatus, PublicKey, StaticSecret,
    node::{Counters, Node, NodeConfig, NodeEvent, Path},
    output::{MAX_BATCH_BYTES, MAX_BATCH_SEGMENTS},
};

mod link;

pub use link::{Link, Random};

/// A host's index in the world.
pub type Id = usize;

/// The time between a node's connection to the relay ending and its being told.
const RELAY_NOTICE: Duration = Duration::from_millis(1);

/// More steps than this without the clock moving is a node that never comes to rest.
const MAX_STEPS_AT_ONE_TIME: u32 = 5_000;

/// The simulated network: all hosts, links, the relay and the clock.
pub struct World {
    pub now: Instant,
    pub start: Instant,
    pub random: Random,
    pub hosts: Vec<Host>,
    /// The relay's one-way delay and loss between a node and the server.
    pub relay: Link,
    /// Direct links, by sender and receiver; without an entry there is none.
    links: HashMap<(Id, Id), Link>,
    queue: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    /// Counts the relay's lives: what was on its way through an earlier one is lost.
    relay_life: u64,
    /// Every datagram that was handed to the network, when asked for.
    pub capture: Option<Vec<Captured>>,
    /// What the direct links' translators did to addresses: sources as the receiver sees them.
    pub seen_as: HashMap<Id, SocketAddr>,
}

/// A computer with one node.
pub struct Host {
    pub node: Node,
    pub key: PublicKey,
    pub private_key: StaticSecret,
    pub address: Ipv6Addr,
    pub endpoint: SocketAddr,
    pub on_relay: bool,
    pub received: Vec<(Instant, Vec<u8>)>,
    pub events: Vec<(Instant, NodeEvent)>,
    /// Datagrams handed to the network.
    pub sent: u64,
}

/// A datagram as the network saw it.
#[derive(Clone)]
pub struct Captured {
    pub from: Id,
    pub path: Path,
    pub bytes: Vec<u8>,
}

struct Scheduled {
    at: Instant,
    order: u64,
    happening: Happening,
}

enum Happening {
    Datagram { to: Id, path: Path, source: Option<PublicKey>, bytes: Vec<u8>, life: Option<u64> },
    AtRelay { from: Id, to: PublicKey, bytes: Vec<u8>, life: u64 },
    Absent { to: Id, key: PublicKey, life: u64 },
    RelayUp { to: Id, up: bool },
}

impl World {
    /// An empty world.
    pub fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            now,
            start: now,
            random: Random::new(seed),
            hosts: Vec::new(),
            relay: Link::with_delay(Duration::from_millis(20)),
            links: HashMap::new(),
            queue: BinaryHeap::new(),
            scheduled: 0,
            relay_life: 0,
            capture: None,
            seen_as: HashMap::new(),
        }
    }

    /// Two hosts that know each other, `0` the one that initiates; neither link nor relay yet.
    pub fn pair(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.add_host();
        world.add_host();
        world
    }

    /// A host without peers.
    pub fn add_host(&mut self) -> Id {
        let id = self.hosts.len();
        let private_key = StaticSecret::from(self.random.bytes32());
        let address = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0, 0, 0, 0, id as u16 + 1);
        let node =
            Node::new(NodeConfig { private_key: private_key.clone(), address, seed: self.random.next() }, self.now);
        self.hosts.push(Host {
            key: node.public_key(),
            node,
            private_key,
            address,
            endpoint: SocketAddr::from(([192, 0, 2, id as u8 + 1], 51820)),
            on_relay: false,
            received: Vec::new(),
            events: Vec::new(),
            sent: 0,
        });
        id
    }

    /// What `of` is to another host.
    pub fn peer_config(&self, of: Id) -> PeerConfig {
        let host = &self.hosts[of];
        PeerConfig {
            public_key: host.key,
            preshared_key: Some([7; 32]),
            address: host.address,
            candidates: vec![host.endpoint],
        }
    }

    /// Makes `b` a peer of `a`.
    pub fn admit(&mut self, a: Id, b: Id, initiate: bool) {
        let peer = self.peer_config(b);
        self.upsert(a, peer, initiate);
    }

    pub fn upsert(&mut self, at: Id, peer: PeerConfig, initiate: bool) {
        self.input(at, |node, now| node.upsert_peer(now, peer, initiate));
    }

    /// Both become peers of each other; `a` initiates.
    pub fn introduce(&mut self, a: Id, b: Id) {
        self.admit(b, a, false);
        self.admit(a, b, true);
    }

    /// Lays a direct link, both ways.
    pub fn link(&mut self, a: Id, b: Id, link: Link) {
        self.links.insert((a, b), link.clone());
        self.links.insert((b, a), link);
    }

    /// Cuts or mends the direct link both ways.
    pub fn set_link_up(&mut self, a: Id, b: Id, up: bool) {
        for pair in [(a, b), (b, a)] {
            if let Some(link) = self.links.get_mut(&pair) {
                link.up = up;
            }
        }
    }

    /// Connects all hosts to the relay.
    pub fn relay_on(&mut self) {
        for id in 0..self.hosts.len() {
            self.set_on_relay(id, true);
        }
    }

    pub fn set_on_relay(&mut self, id: Id, up: bool) {
        self.hosts[id].on_relay = up;
        self.input(id, |node, now| node.set_relay_up(now, up));
    }

    /// The relay restarts: everything in it is lost, all are told; each comes back after its own while.
    pub fn restart_relay(&mut self, back_after: &[Duration]) {
        self.relay_life += 1;
        for (id, after) in back_after.iter().enumerate() {
            self.hosts[id].on_relay = false;
            self.schedule(self.now + RELAY_NOTICE, Happening::RelayUp { to: id, up: false });
            self.schedule(self.now + *after, Happening::RelayUp { to: id, up: true });
        }
    }

    /// A new process takes the host's place: same address, perhaps a new key, nothing remembered.
    pub fn restart_host(&mut self, id: Id, new_key: bool) {
        if new_key {
            self.hosts[id].private_key = StaticSecret::from(self.random.bytes32());
        }
        let seed = self.random.next();
        let (now, host) = (self.now, &mut self.hosts[id]);
        let config = NodeConfig { private_key: host.private_key.clone(), address: host.address, seed };
        host.node = Node::new(config, now);
        host.key = host.node.public_key();
        if host.on_relay {
            self.set_on_relay(id, true);
        }
    }

    /// Sends a numbered packet from one host to another.
    pub fn send(&mut self, from: Id, to: Id, number: u64) {
        let packet = packet(self.hosts[from].address, self.hosts[to].address, number, 100);
        self.input(from, |node, now| node.handle_packet(now, &packet));
    }

    /// Gives a datagram to a host as if it had come by that path.
    pub fn inject(&mut self, to: Id, path: Path, source: Option<PublicKey>, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        self.input(to, |node, now| node.handle_datagram(now, path, source.as_ref(), &mut bytes));
    }

    pub fn input(&mut self, id: Id, input: impl FnOnce(&mut Node, Instant)) {
        input(&mut self.hosts[id].node, self.now);
        self.pump(id);
    }

    /// Advances the clock and delivers everything due by then.
    pub fn run_for(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_until(until, |_| false);
    }

    /// Lets time pass until something holds; whether it did within the time.
    pub fn run_while_not(&mut self, time: Duration, holds: impl Fn(&Self) -> bool) -> bool {
        let until = self.now + time;
        self.run_until(until, holds)
    }

    /// The time since the world began.
    pub fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// The numbers of the packets that a host received.
    pub fn received(&self, id: Id) -> Vec<u64> {
        self.hosts[id].received.iter().map(|(_, packet)| number(packet)).collect()
    }

    pub fn counters(&self, id: Id) -> Counters {
        self.hosts[id].node.counters()
    }

    /// How `of` stands at `at`.
    pub fn status(&self, at: Id, of: Id) -> PeerStatus {
        let key = self.hosts[of].key;
        let peers = self.hosts[at].node.peers(self.now);
        peers.into_iter().find(|peer| peer.public_key == key).expect("the hosts are peers")
    }

    /// The path that data from one to the other takes.
    pub fn path(&self, from: Id, to: Id) -> Option<Path> {
        self.status(from, to).paths.iter().find(|path| path.active).map(|path| path.kind)
    }

    pub fn is_direct(&self, from: Id, to: Id) -> bool {
        self.path(from, to) == Some(Path::Direct(self.hosts[to].endpoint))
    }

    pub fn has_session(&self, at: Id) -> bool {
        self.hosts[at].events.iter().any(|(_, event)| matches!(event, NodeEvent::SessionEstablished(_)))
    }

    fn run_until(&mut self, until: Instant, holds: impl Fn(&Self) -> bool) -> bool {
        let mut steps = 0;
        loop {
            if holds(self) {
                return true;
            }
            let timers = self.hosts.iter().filter_map(|host| host.node.poll_timeout());
            let next = timers.chain(self.queue.peek().map(|first| first.0.at)).min();
            let Some(next) = next.filter(|next| *next <= until) else {
                self.now = until;
                return holds(self);
            };
            steps = if next > self.now { 0 } else { steps + 1 };
            assert!(steps < MAX_STEPS_AT_ONE_TIME, "a node does not come to rest at {:?}", self.elapsed());
            self.now = self.now.max(next);
            self.step();
        }
    }

    fn step(&mut self) {
        while self.queue.peek().is_some_and(|first| first.0.at <= self.now) {
            let Some(Reverse(scheduled)) = self.queue.pop() else { return };
            self.happen(scheduled.happening);
        }
        for id in 0..self.hosts.len() {
            if self.hosts[id].node.poll_timeout().is_some_and(|at| at <= self.now) {
                self.input(id, |node, now| node.handle_timeout(now));
            }
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Datagram { to, path, source, bytes, life } => {
                let alive = life.is_none_or(|life| life == self.relay_life && self.hosts[to].on_relay);
                if alive {
                    self.inject(to, path, source, &bytes);
                }
            }
            Happening::AtRelay { from, to, bytes, life } => self.relay_forwards(from, to, bytes, life),
            Happening::Absent { to, key, life } => {
                if life == self.relay_life && self.hosts[to].on_relay {
                    self.input(to, |node, now| node.relay_peer_absent(now, &key));
                }
            }
            Happening::RelayUp { to, up } => self.set_on_relay(to, up),
        }
    }

    fn relay_forwards(&mut self, from: Id, to: PublicKey, bytes: Vec<u8>, life: u64) {
        if life != self.relay_life {
            return;
        }
        let Some(delay) = self.relay.clone().carry(&mut self.random) else { return };
        let happening = match self.hosts.iter().position(|host| host.key == to && host.on_relay) {
            Some(id) => {
                let source = Some(self.hosts[from].key);
                Happening::Datagram { to: id, path: Path::Relay, source, bytes, life: Some(life) }
            }
            None => Happening::Absent { to: from, key: to, life },
        };
        self.schedule(self.now + delay, happening);
    }

    /// Takes all that the node has ready, and hands its datagrams to the network.
    fn pump(&mut self, id: Id) {
        let mut buffer = Vec::new();
        while let Some(transmit) = self.hosts[id].node.poll_transmit(&mut buffer) {
            assert!(buffer.len() <= MAX_BATCH_BYTES && transmit.segment_size > 0);
            assert!(buffer.len().div_ceil(transmit.segment_size) <= MAX_BATCH_SEGMENTS);
            for datagram in buffer.chunks(transmit.segment_size) {
                self.transmit(id, transmit.path, transmit.peer, datagram.to_vec());
            }
        }
        let host = &mut self.hosts[id];
        while host.node.poll_packet(&mut buffer).is_some() {
            host.received.push((self.now, buffer.clone()));
        }
        while let Some(event) = host.node.poll_event() {
            host.events.push((self.now, event));
        }
    }

    fn transmit(&mut self, from: Id, path: Path, peer: PublicKey, bytes: Vec<u8>) {
        self.hosts[from].sent += 1;
        if let Some(capture) = &mut self.capture {
            capture.push(Captured { from, path, bytes: bytes.clone() });
        }
        match path {
            Path::Relay => {
                if self.hosts[from].on_relay
                    && let Some(delay) = self.relay.clone().carry(&mut self.random)
                {
                    let life = self.relay_life;
                    self.schedule(self.now + delay, Happening::AtRelay { from, to: peer, bytes, life });
                }
            }
            Path::Direct(address) => {
                let Some(to) = self.hosts.iter().position(|host| host.endpoint == address) else { return };
                let Some(link) = self.links.get(&(from, to)) else { return };
                if let Some(delay) = link.carry(&mut self.random) {
                    let source = self.seen_as.get(&from).copied().unwrap_or(self.hosts[from].endpoint);
                    let path = Path::Direct(source);
                    self.schedule(self.now + delay, Happening::Datagram { to, path, source: None, bytes, life: None });
                }
            }
        }
    }

    fn schedule(&mut self, at: Instant, happening: Happening) {
        self.scheduled += 1;
        self.queue.push(Reverse(Scheduled { at, order: self.scheduled, happening }));
    }
}

/// An IPv6 packet with a number in it: UDP to a port that is no probe's.
pub fn packet(source: Ipv6Addr, destination: Ipv6Addr, number: u64, len: usize) -> Vec<u8> {
    assert!(len >= 56);
    let mut packet = vec![0; len];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
    packet[6] = 17;
    packet[7] = 64;
    packet[8..24].copy_from_slice(&source.octets());
    packet[24..40].copy_from_slice(&destination.octets());
    packet[40..44].copy_from_slice(&[0x13, 0x88, 0x13, 0x88]);
    packet[48..56].copy_from_slice(&number.to_be_bytes());
    packet
}

fn number(packet: &[u8]) -> u64 {
    u64::from_be_bytes(packet[48..56].try_into().expect("packets of this world hold a number"))
}

/// Runs a case for each seed, and says which one failed.
pub fn for_seeds(count: u64, case: impl Fn(u64)) {
    struct Say(u64);
    impl Drop for Say {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with seed {}", self.0);
            }
        }
    }
    for seed in 0..count {
        let say = Say(seed);
        case(seed);
        drop(say);
    }
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}
