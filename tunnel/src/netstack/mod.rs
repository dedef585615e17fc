//! TCP in user space: IP packets on one side, byte streams on the other.
//!
//! [`Netstack`] is sans-IO like the node: every call takes `now`, packets go in through [`Netstack::handle_packet`] and
//! come out of [`Netstack::drain`], and [`Netstack::poll_timeout`] says when to call it again. smoltcp implements TCP;
//! this module does everything around the connections:
//!
//! - `segment` finds the connection that a packet belongs to. Each `connection` has its own smoltcp socket set, so the
//!   cost of a packet does not grow with the number of connections, and its own clock, so that it can be made to
//!   retransmit at once.
//! - `backlog` keeps a peer's SYN until the application has accepted or refused the connection.
//! - `device` is the interface to smoltcp.
//!
//! Packets that belong to no connection go to smoltcp with an empty socket set: it answers pings, and resets segments.
//!
//! Streams call in from their own tasks (under the driver's lock), read and write the socket buffers in place, and leave
//! a waker. Packets are sent only by [`Netstack::poll`], which serves the connections in turn, a few packets each.

mod backlog;
mod connection;
mod device;
mod segment;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    io,
    net::Ipv6Addr,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use smoltcp::{
    iface::{Config, Interface, SocketSet},
    socket::tcp::{RecvError, State},
    wire::{HardwareAddress, IpCidr, IpListenEndpoint},
};
use tokio::io::ReadBuf;

pub(crate) use self::segment::Flow;
use self::segment::Segment;
use self::{
    backlog::Backlog,
    connection::{Clock, CloseReason, Connection},
    device::{PacketBuffer, Port},
};
use crate::random::Random;

/// Concurrent connections of a node.
const MAX_CONNECTIONS: usize = 1024;

/// A connection's buffer size per direction, by the total buffer size of all connections: large while there are few, so
/// that one stream fills a fast or a long path, and small instead of refused when there are many. Only used buffer space
/// costs memory.
const BUFFERS: [(usize, usize); 3] = [(128 << 20, 1 << 20), (224 << 20, 256 << 10), (384 << 20, 64 << 10)];

/// Packets that a connection sends before the next one's turn.
const QUANTUM: usize = 16;

/// Connections in TIME-WAIT whose last acknowledgement is kept, and for how long (the same as smoltcp's TIME-WAIT).
const MAX_TIME_WAIT_REPLIES: usize = 1024;
const TIME_WAIT: Duration = Duration::from_secs(10);

/// The source ports of outgoing connections (RFC 6335 §6).
const EPHEMERAL: std::ops::RangeInclusive<u16> = 49152..=65535;

/// Names a connection; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnectionId(u64);

/// The limit of connections is reached.
#[derive(Debug)]
pub(crate) struct Full;

/// Why a connection could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpenError {
    /// The peer refused the connection, or gave it up before it was open.
    Refused,
    /// The peer did not answer.
    TimedOut,
}

/// The TCP stack of a node.
pub(crate) struct Netstack {
    address: Ipv6Addr,
    clock: Clock,
    interface: Interface,
    nobody: SocketSet<'static>,
    connections: HashMap<ConnectionId, Connection>,
    /// Connections that can still receive.
    flows: HashMap<Flow, ConnectionId>,
    /// Connections with something to do.
    ready: VecDeque<ConnectionId>,
    /// Connections with something to do whose peer's path is full.
    parked: Vec<ConnectionId>,
    blocked: HashSet<Ipv6Addr>,
    timers: BTreeSet<(Instant, ConnectionId)>,
    backlog: Backlog,
    time_wait_replies: HashMap<Flow, (Instant, Vec<u8>)>,
    time_wait_by_age: VecDeque<(Instant, Flow)>,
    heard: HashMap<Ipv6Addr, Instant>,
    out: PacketBuffer,
    buffered: usize,
    next_id: u64,
    random: Random,
}

impl Netstack {
    /// A stack with one address; `seed` determines ports and sequence numbers.
    pub(crate) fn new(address: Ipv6Addr, seed: u64, now: Instant) -> Self {
        let clock = Clock::new(now);
        let mut random = Random::new(seed);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = random.next();
        let mut out = PacketBuffer::default();
        let mut interface = Interface::new(config, &mut Port { incoming: None, out: &mut out }, clock.at(now));
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(address.into(), 128)).expect("an interface holds at least one address");
        });
        Self {
            address,
            clock,
            interface,
            nobody: SocketSet::new(Vec::new()),
            connections: HashMap::new(),
            flows: HashMap::new(),
            ready: VecDeque::new(),
            parked: Vec::new(),
            blocked: HashSet::new(),
            timers: BTreeSet::new(),
            backlog: Backlog::default(),
            time_wait_replies: HashMap::new(),
            time_wait_by_age: VecDeque::new(),
            heard: HashMap::new(),
            out,
            buffered: 0,
            next_id: 0,
            random,
        }
    }

    /// Processes one IP packet that the node has authenticated; answers are queued for [`Self::drain`].
    pub(crate) fn handle_packet(&mut self, now: Instant, packet: &[u8]) {
        let Some(segment) = Segment::parse(packet, self.address) else {
            return self.handle_unclaimed(now, packet);
        };
        self.note_heard(now, segment.flow.remote);
        if let Some(&id) = self.flows.get(&segment.flow) {
            let connection = self.connections.get_mut(&id).expect("a flow belongs to a connection");
            connection.receive(&mut self.interface, self.clock, now, packet, &mut self.out);
            if connection.end().is_some() {
                self.flows.remove(&segment.flow);
            }
            return self.enqueue(id);
        }
        if segment.opens() {
            self.time_wait_replies.remove(&segment.flow);
            return self.backlog.offer(now, segment.flow, packet);
        }
        if segment.resets() {
            self.time_wait_replies.remove(&segment.flow);
            self.backlog.forget(|flow| flow == &segment.flow);
            return;
        }
        match self.time_wait_replies.get(&segment.flow) {
            Some((until, time_wait_reply)) if now < *until => {
                if segment.finishes() {
                    self.out.push(time_wait_reply);
                }
            }
            _ => self.handle_unclaimed(now, packet),
        }
    }

    /// Does what is due until at least `limit` packets are queued; returns whether more is due.
    pub(crate) fn poll(&mut self, now: Instant, limit: usize) -> bool {
        while let Some(&(at, id)) = self.timers.first()
            && at <= now
        {
            self.timers.pop_first();
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.armed = None;
                self.enqueue(id);
            }
        }
        while self.out.len() < limit {
            let Some(id) = self.ready.pop_front() else { return false };
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if self.blocked.contains(&connection.flow.remote) {
                self.parked.push(id);
                continue;
            }
            if connection.transmit(&mut self.interface, self.clock, now, &mut self.out, QUANTUM) {
                self.ready.push_back(id);
            } else {
                connection.queued = false;
                self.settle(now, id);
            }
        }
        !self.ready.is_empty()
    }

    /// Passes the queued packets to `take`.
    pub(crate) fn drain(&mut self, take: impl FnMut(&[u8])) {
        self.out.drain(take);
    }

    /// When to call [`Netstack::poll`] if nothing else happens.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// The next connection that a peer wants to open.
    pub(crate) fn poll_incoming(&mut self) -> Option<Flow> {
        self.backlog.next()
    }

    /// Answers a peer's SYN; `None` if the peer has given up. Poll it with [`Netstack::poll_open`].
    ///
    /// # Errors
    ///
    /// When the limit of connections is reached; then the peer gets a reset.
    pub(crate) fn accept(&mut self, now: Instant, flow: Flow) -> Result<Option<ConnectionId>, Full> {
        let Some(syn) = self.backlog.take(&flow) else { return Ok(None) };
        let Ok(id) = self.add(now, flow) else {
            self.handle_unclaimed(now, &syn);
            return Err(Full);
        };
        let connection = self.connections.get_mut(&id).expect("it was just added");
        connection
            .socket()
            .listen(IpListenEndpoint { addr: Some(self.address.into()), port: flow.local_port })
            .expect("a new socket can listen on a port that is not zero");
        connection.receive(&mut self.interface, self.clock, now, &syn, &mut self.out);
        self.enqueue(id);
        Ok(Some(id))
    }

    /// Answers a peer's SYN with a reset.
    pub(crate) fn refuse(&mut self, now: Instant, flow: Flow) {
        if let Some(syn) = self.backlog.take(&flow) {
            self.handle_unclaimed(now, &syn);
        }
    }

    /// Opens a connection to a peer. Poll it with [`Netstack::poll_open`].
    pub(crate) fn connect(&mut self, now: Instant, remote: Ipv6Addr, remote_port: u16) -> Result<ConnectionId, Full> {
        let ports = EPHEMERAL.end() - EPHEMERAL.start();
        let flow = (0..64)
            .map(|_| Flow {
                remote,
                remote_port,
                local_port: EPHEMERAL.start() + self.random.below(u64::from(ports) + 1) as u16,
            })
            .find(|flow| !self.flows.contains_key(flow) && !self.time_wait_replies.contains_key(flow))
            .ok_or(Full)?;
        let id = self.add(now, flow)?;
        let connection = self.connections.get_mut(&id).expect("it was just added");
        let local = IpListenEndpoint { addr: Some(self.address.into()), port: flow.local_port };
        let begun = connection.socket().connect(self.interface.context(), (remote, remote_port), local);
        if begun.is_err() {
            // Port zero or the unspecified address, which cannot be reached.
            connection.abort();
        }
        self.enqueue(id);
        Ok(id)
    }

    /// Waits until a connection is open.
    pub(crate) fn poll_open(&mut self, id: ConnectionId, cx: &mut Context<'_>) -> Poll<Result<(), OpenError>> {
        let connection = self.get(id);
        match connection.end() {
            Some(CloseReason::TimedOut) => return Poll::Ready(Err(OpenError::TimedOut)),
            Some(CloseReason::Reset | CloseReason::Finished) => return Poll::Ready(Err(OpenError::Refused)),
            None => {}
        }
        match connection.state() {
            State::Closed | State::Listen | State::SynSent | State::SynReceived => {
                connection.socket().register_send_waker(cx.waker());
                Poll::Pending
            }
            _ => Poll::Ready(Ok(())),
        }
    }

    /// Reads what has arrived; zero bytes are the end of the stream. Also returns whether the driver has something to
    /// send now.
    pub(crate) fn poll_read(
        &mut self,
        now: Instant,
        id: ConnectionId,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> (Poll<io::Result<()>>, bool) {
        let clock = self.clock;
        let connection = self.connections.get_mut(&id).expect("a stream owns its connection");
        let end = connection.end();
        let socket = connection.socket();
        match socket.recv_slice(buffer.initialize_unfilled()) {
            Ok(0) if buffer.remaining() > 0 => {
                socket.register_recv_waker(cx.waker());
                (Poll::Pending, false)
            }
            Ok(count) => {
                buffer.advance(count);
                let due = connection.is_due(&mut self.interface, clock, now);
                if due {
                    self.enqueue(id);
                }
                (Poll::Ready(Ok(())), due)
            }
            Err(RecvError::Finished) => (Poll::Ready(Ok(())), false),
            Err(RecvError::InvalidState) => (Poll::Ready(Err(error(end))), false),
        }
    }

    /// Queues bytes to send.
    pub(crate) fn poll_write(
        &mut self,
        id: ConnectionId,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let connection = self.get(id);
        let end = connection.end();
        let socket = connection.socket();
        match socket.send_slice(data) {
            Ok(0) if !data.is_empty() => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            Ok(count) => {
                self.enqueue(id);
                Poll::Ready(Ok(count))
            }
            Err(_) => Poll::Ready(Err(match end {
                // Our direction is finished.
                None | Some(CloseReason::Finished) => io::ErrorKind::BrokenPipe.into(),
                end => error(end),
            })),
        }
    }

    /// Ends our direction once everything written has been sent. Fails if the connection was reset or timed out, so that
    /// data may be lost.
    pub(crate) fn finish(&mut self, id: ConnectionId) -> io::Result<()> {
        let connection = self.get(id);
        match connection.end() {
            None | Some(CloseReason::Finished) => {
                connection.socket().close();
                self.enqueue(id);
                Ok(())
            }
            end => Err(error(end)),
        }
    }

    /// The application has dropped a stream. If it had finished its direction and read everything, the data is still
    /// delivered; otherwise the peer gets a reset.
    pub(crate) fn release(&mut self, now: Instant, id: ConnectionId) {
        let connection = self.get(id);
        connection.release(now);
        if connection.end().is_some() {
            let flow = connection.flow;
            self.forget_flow(flow, id);
        }
        self.enqueue(id);
    }

    /// Resets every connection with a peer, or with all.
    pub(crate) fn reset(&mut self, peer: Option<Ipv6Addr>) {
        let concerned = |flow: &Flow| peer.is_none_or(|peer| flow.remote == peer);
        self.backlog.forget(concerned);
        self.time_wait_replies.retain(|flow, _| !concerned(flow));
        let ids: Vec<_> =
            self.connections.iter().filter(|(_, connection)| concerned(&connection.flow)).map(|(&id, _)| id).collect();
        for id in ids {
            let connection = self.get(id);
            connection.abort();
            let flow = connection.flow;
            self.forget_flow(flow, id);
            self.enqueue(id);
        }
        match peer {
            Some(peer) => _ = self.heard.remove(&peer),
            None => self.heard.clear(),
        }
    }

    /// A path works again: retransmits at once what was not acknowledged for long.
    pub(crate) fn retransmit_now(&mut self, now: Instant, peer: Option<Ipv6Addr>) {
        let ids: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| peer.is_none_or(|peer| connection.flow.remote == peer))
            .map(|(&id, _)| id)
            .collect();
        for id in ids {
            let connection = self.connections.get_mut(&id).expect("it was just found");
            if connection.retransmit_now(&mut self.interface, self.clock, now) {
                self.enqueue(id);
            }
        }
    }

    /// Pauses or resumes sending to a peer, because the queue to it is full: data that is not sent cannot be lost.
    pub(crate) fn set_blocked(&mut self, peer: Ipv6Addr, blocked: bool) {
        if blocked {
            self.blocked.insert(peer);
        } else if self.blocked.remove(&peer) {
            self.ready.extend(self.parked.drain(..));
        }
    }

    /// Packets for no connection of ours: smoltcp answers pings, resets segments, and drops what is malformed.
    fn handle_unclaimed(&mut self, now: Instant, packet: &[u8]) {
        let mut port = Port { incoming: Some(packet), out: &mut self.out };
        self.interface.poll_ingress_single(self.clock.at(now), &mut port, &mut self.nobody);
    }

    /// The first packet after a silence means that the path works again.
    fn note_heard(&mut self, now: Instant, peer: Ipv6Addr) {
        let before = self.heard.insert(peer, now);
        if before.is_some_and(|before| now.saturating_duration_since(before) > Duration::from_secs(1)) {
            self.retransmit_now(now, Some(peer));
        }
    }

    fn get(&mut self, id: ConnectionId) -> &mut Connection {
        self.connections.get_mut(&id).expect("a stream owns its connection")
    }

    fn add(&mut self, now: Instant, flow: Flow) -> Result<ConnectionId, Full> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(Full);
        }
        let &(_, buffer) = BUFFERS.iter().find(|&&(limit, size)| self.buffered + 2 * size <= limit).ok_or(Full)?;
        self.buffered += 2 * buffer;
        let id = ConnectionId(self.next_id);
        self.next_id += 1;
        self.connections.insert(id, Connection::new(flow, buffer, now));
        self.flows.insert(flow, id);
        Ok(id)
    }

    fn enqueue(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Sets the timer of a connection that has nothing to send now, or removes it when it is over.
    fn settle(&mut self, now: Instant, id: ConnectionId) {
        let connection = self.connections.get_mut(&id).expect("the caller has it");
        if connection.is_over() {
            return self.remove(now, id);
        }
        if connection.end().is_some() {
            let flow = connection.flow;
            return self.forget_flow(flow, id);
        }
        let Some(deadline) = connection.deadline(&mut self.interface, self.clock, now) else { return };
        // smoltcp says that something is due although it had nothing to send; prevent a busy loop.
        let deadline = deadline.max(now + Duration::from_millis(1));
        // A timer that fires too early is moved then, which is cheaper than moving it at every packet.
        if connection.armed.is_none_or(|armed| deadline < armed) {
            if let Some(armed) = connection.armed.replace(deadline) {
                self.timers.remove(&(armed, id));
            }
            self.timers.insert((deadline, id));
        }
    }

    fn remove(&mut self, now: Instant, id: ConnectionId) {
        let mut connection = self.connections.remove(&id).expect("the caller has it");
        self.buffered -= 2 * connection.buffer;
        if let Some(armed) = connection.armed {
            self.timers.remove(&(armed, id));
        }
        self.forget_flow(connection.flow, id);
        let Some(time_wait_reply) = connection.time_wait_reply() else { return };
        if self.time_wait_by_age.len() >= MAX_TIME_WAIT_REPLIES {
            self.forget_time_wait_reply();
        }
        while self.time_wait_by_age.front().is_some_and(|&(until, _)| until <= now) {
            self.forget_time_wait_reply();
        }
        self.time_wait_replies.insert(connection.flow, (now + TIME_WAIT, time_wait_reply));
        self.time_wait_by_age.push_back((now + TIME_WAIT, connection.flow));
    }

    fn forget_time_wait_reply(&mut self) {
        if let Some((until, flow)) = self.time_wait_by_age.pop_front()
            && self.time_wait_replies.get(&flow).is_some_and(|time_wait_reply| time_wait_reply.0 == until)
        {
            self.time_wait_replies.remove(&flow);
        }
    }

    fn forget_flow(&mut self, flow: Flow, id: ConnectionId) {
        if self.flows.get(&flow) == Some(&id) {
            self.flows.remove(&flow);
        }
    }
}

fn error(end: Option<CloseReason>) -> io::Error {
    match end {
        Some(CloseReason::TimedOut) => io::ErrorKind::TimedOut.into(),
        Some(CloseReason::Finished) => io::ErrorKind::BrokenPipe.into(),
        Some(CloseReason::Reset) | None => io::ErrorKind::ConnectionReset.into(),
    }
}
