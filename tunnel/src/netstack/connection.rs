//! One TCP connection: a smoltcp socket, the clock it sees, and how it ended.

use std::time::{Duration, Instant};

use smoltcp::{
    iface::{Interface, PollResult, SocketHandle, SocketSet},
    socket::tcp::{self, CongestionControl, State},
    time,
};

use super::{
    device::{Outbox, Port},
    segment::{Flow, Segment},
};

/// Silence after which the peer is asked whether it still lives.
const KEEP_ALIVE: time::Duration = time::Duration::from_secs(45);

/// Silence after which a connection is given up. Long, because a laptop that sleeps must find its sessions again; a
/// peer that is known to be gone is removed, and that ends its connections at once.
const DEAD_AFTER: time::Duration = time::Duration::from_secs(2 * 60 * 60);

/// How long an answer waits for data to travel with.
const ACK_DELAY: time::Duration = time::Duration::from_millis(10);

/// How long a connection that the application has let go of may take to deliver what was written.
const LINGER: Duration = Duration::from_secs(60);

/// How far the clock of a connection in TIME-WAIT goes on: long enough for a last delayed answer, too short for smoltcp
/// to end the state, which would throw away what the application has not yet read.
const TIME_WAIT_CLOCK: time::Duration = time::Duration::from_secs(1);

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Both directions were finished.
    Finished,
    /// The peer reset it, or it was reset here.
    Reset,
    /// The peer did not answer for too long.
    TimedOut,
}

/// The translation between the system's clock and smoltcp's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub(super) fn new(epoch: Instant) -> Self {
        Self { epoch }
    }

    /// Begins at one second, since smoltcp means "at once" by zero.
    pub(super) fn at(&self, now: Instant) -> time::Instant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX / 2)) + time::Duration::from_secs(1)
    }
}

/// One connection. It has a socket set of its own, so that a packet costs the same however many connections there are.
pub(super) struct Connection {
    pub(super) flow: Flow,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// Bytes of each of its two buffers.
    pub(super) buffer: usize,
    /// How far the connection's clock is ahead of the node's.
    skew: time::Duration,
    /// Where the clock of a connection in TIME-WAIT stops; see [`TIME_WAIT_CLOCK`].
    frozen: Option<time::Instant>,
    last_heard: Instant,
    end: Option<End>,
    /// When the application dropped its end.
    released: Option<Instant>,
    /// The last answer of a connection in TIME-WAIT.
    farewell: Option<Vec<u8>>,
    /// Whether it stands in the queue of those with something to do.
    pub(super) queued: bool,
    /// The timer that is set for it.
    pub(super) armed: Option<Instant>,
}

impl Connection {
    /// A closed connection with two buffers of `buffer` bytes.
    pub(super) fn new(flow: Flow, buffer: usize, now: Instant) -> Self {
        // Zeroed memory that was never touched costs no memory: an idle connection is small whatever its window.
        let mut socket =
            tcp::Socket::new(tcp::SocketBuffer::new(vec![0; buffer]), tcp::SocketBuffer::new(vec![0; buffer]));
        socket.set_congestion_control(CongestionControl::Cubic);
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        socket.set_keep_alive(Some(KEEP_ALIVE));
        socket.set_timeout(Some(DEAD_AFTER));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            flow,
            sockets,
            handle,
            buffer,
            skew: time::Duration::ZERO,
            frozen: None,
            last_heard: now,
            end: None,
            released: None,
            farewell: None,
            queued: false,
            armed: None,
        }
    }

    pub(super) fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    pub(super) fn state(&self) -> State {
        self.sockets.get::<tcp::Socket<'_>>(self.handle).state()
    }

    pub(super) fn end(&self) -> Option<End> {
        self.end
    }

    /// What the connection takes the time to be.
    fn time(&self, clock: Clock, now: Instant) -> time::Instant {
        let time = clock.at(now) + self.skew;
        self.frozen.map_or(time, |frozen| time.min(frozen))
    }

    /// Takes in one segment.
    pub(super) fn receive(
        &mut self,
        interface: &mut Interface,
        clock: Clock,
        now: Instant,
        packet: &[u8],
        out: &mut Outbox,
    ) {
        let (time, before) = (self.time(clock, now), self.state());
        interface.poll_ingress_single(time, &mut Port { incoming: Some(packet), out }, &mut self.sockets);
        self.last_heard = now;
        let reset = Segment::resets_packet(packet);
        self.note(time, before, if reset { End::Reset } else { End::Finished });
        if self.released.is_some() && self.socket().recv_queue() > 0 {
            // Nobody is left to read it: the peer must know.
            self.abort();
        }
    }

    /// Sends at most `quantum` packets; says whether there may be more.
    pub(super) fn transmit(
        &mut self,
        interface: &mut Interface,
        clock: Clock,
        now: Instant,
        out: &mut Outbox,
        quantum: usize,
    ) -> bool {
        if self.released.is_some_and(|at| now >= at + LINGER) {
            self.abort();
        }
        let time = self.time(clock, now);
        for _ in 0..quantum {
            let before = self.state();
            let sent = interface.poll_egress(time, &mut Port { incoming: None, out }, &mut self.sockets);
            self.note(time, before, End::TimedOut);
            if sent == PollResult::None {
                return false;
            }
            if self.state() == State::TimeWait {
                self.farewell = out.last().map(<[u8]>::to_vec);
            }
        }
        true
    }

    /// When it must be served again though nothing happens.
    pub(super) fn deadline(&mut self, interface: &mut Interface, clock: Clock, now: Instant) -> Option<Instant> {
        let time = self.time(clock, now);
        let timer = match self.frozen {
            Some(frozen) if time >= frozen => None,
            _ => interface.poll_at(time, &self.sockets).map(|at| now + Duration::from(at.max(time) - time)),
        };
        let linger = self.released.map(|at| at + LINGER);
        [timer, linger].into_iter().flatten().min()
    }

    /// Whether it has something to send now.
    pub(super) fn is_due(&self, interface: &mut Interface, clock: Clock, now: Instant) -> bool {
        let time = self.time(clock, now);
        interface.poll_at(time, &self.sockets).is_some_and(|at| at <= time)
    }

    /// Sends what waits for an answer at once instead of at the next retransmission, which after a long outage may be a
    /// minute away: its clock jumps to that moment. Only if the peer has been silent, else there is no reason to.
    pub(super) fn hurry(&mut self, interface: &mut Interface, clock: Clock, now: Instant) -> bool {
        let unanswered = self.state() == State::SynSent || self.socket().send_queue() > 0;
        if !unanswered || now.saturating_duration_since(self.last_heard) < Duration::from_secs(1) {
            return false;
        }
        let time = self.time(clock, now);
        let Some(at) = interface.poll_at(time, &self.sockets) else { return false };
        if at > time {
            self.skew += at - time;
        }
        true
    }

    /// Resets the connection.
    pub(super) fn abort(&mut self) {
        if self.end.is_none() {
            self.end = Some(End::Reset);
        }
        self.socket().abort();
    }

    /// The application lets go: what was written and finished is still delivered, anything else is reset.
    pub(super) fn release(&mut self, now: Instant) {
        self.released = Some(now);
        let unread = self.socket().recv_queue() > 0;
        match self.state() {
            State::FinWait1 | State::FinWait2 | State::Closing | State::LastAck | State::TimeWait if !unread => {}
            State::Closed => {}
            _ => self.abort(),
        }
    }

    /// Whether nothing is left to be done for it; with what must still be repeated should the peer ask.
    pub(super) fn is_over(&self) -> bool {
        let socket: &tcp::Socket<'_> = self.sockets.get(self.handle);
        self.released.is_some()
            && match socket.state() {
                // A reset that has not been sent yet keeps its remote endpoint.
                State::Closed => socket.remote_endpoint().is_none(),
                State::Listen | State::TimeWait => true,
                _ => false,
            }
    }

    /// The answer that a peer in LAST-ACK must get if it asks again (RFC 9293 §3.10.7.4, TIME-WAIT).
    pub(super) fn farewell(&mut self) -> Option<Vec<u8>> {
        self.farewell.take()
    }

    /// Notices what a call into smoltcp has changed; `cause` is what it means if the connection is closed now.
    fn note(&mut self, time: time::Instant, before: State, cause: End) {
        let after = self.state();
        if after == before {
            return;
        }
        match after {
            State::TimeWait => self.frozen = Some(time + TIME_WAIT_CLOCK),
            // A passive opening that the peer resets goes back to LISTEN: for us it is over.
            State::Closed | State::Listen if self.end.is_none() => {
                let finished = cause == End::Finished && before == State::LastAck;
                self.end = Some(match cause {
                    End::Finished if !finished => End::Reset,
                    cause => cause,
                });
            }
            _ => {}
        }
    }
}
