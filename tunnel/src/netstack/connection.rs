//! A TCP connection: a smoltcp socket, the connection's clock, and how it ended.

use std::time::{Duration, Instant};

use smoltcp::{
    iface::{Interface, PollResult, SocketHandle, SocketSet},
    socket::tcp::{self, CongestionControl, State},
    time,
};

use super::{
    device::{PacketBuffer, Port},
    segment::{Flow, Segment},
};

/// A silent peer is probed this often.
const KEEPALIVE_INTERVAL: time::Duration = time::Duration::from_secs(45);

/// A connection whose peer is silent for this long is closed. Long, so that sessions survive a laptop's sleep; when a
/// peer is known to be gone it is removed, which resets its connections at once.
const PEER_TIMEOUT: time::Duration = time::Duration::from_secs(2 * 60 * 60);

/// How long an acknowledgement waits to be sent with data.
const ACK_DELAY: time::Duration = time::Duration::from_millis(10);

/// How long a connection that the application has dropped may take to deliver its data.
const LINGER: Duration = Duration::from_secs(60);

/// How far the clock of a connection in TIME-WAIT may advance: enough for a last delayed acknowledgement, but not for
/// smoltcp to leave the state, which would discard data that the application has not read yet.
const TIME_WAIT_CLOCK: time::Duration = time::Duration::from_secs(1);

/// Why a connection was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloseReason {
    /// Both sides have finished their direction.
    Finished,
    /// Reset by the peer or by us.
    Reset,
    /// The peer did not answer for too long.
    TimedOut,
}

/// Converts the system's clock to smoltcp's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub(super) fn new(epoch: Instant) -> Self {
        Self { epoch }
    }

    /// Starts at one second, because zero means "at once" to smoltcp.
    pub(super) fn at(&self, now: Instant) -> time::Instant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        time::Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX / 2)) + time::Duration::from_secs(1)
    }
}

/// A connection. Each has a socket set of its own, so that the cost of a packet does not depend on the number of
/// connections.
pub(super) struct Connection {
    pub(super) flow: Flow,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The size of each of the two buffers, in bytes.
    pub(super) buffer: usize,
    /// How far the connection's clock is ahead of the node's.
    skew: time::Duration,
    /// Where the clock of a connection in TIME-WAIT stops; see [`TIME_WAIT_CLOCK`].
    frozen: Option<time::Instant>,
    last_heard: Instant,
    end: Option<CloseReason>,
    /// When the application dropped the stream.
    released: Option<Instant>,
    /// The last acknowledgement sent in TIME-WAIT.
    time_wait_reply: Option<Vec<u8>>,
    /// Whether it is in the queue of connections with work to do.
    pub(super) queued: bool,
    /// When its timer is set to.
    pub(super) armed: Option<Instant>,
}

impl Connection {
    /// A closed connection with two buffers of `buffer` bytes.
    pub(super) fn new(flow: Flow, buffer: usize, now: Instant) -> Self {
        // Zeroed pages that were never touched cost no memory, so an idle connection is small whatever its window.
        let mut socket =
            tcp::Socket::new(tcp::SocketBuffer::new(vec![0; buffer]), tcp::SocketBuffer::new(vec![0; buffer]));
        socket.set_congestion_control(CongestionControl::Cubic);
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        socket.set_keep_alive(Some(KEEPALIVE_INTERVAL));
        socket.set_timeout(Some(PEER_TIMEOUT));
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
            time_wait_reply: None,
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

    pub(super) fn end(&self) -> Option<CloseReason> {
        self.end
    }

    /// The time on the connection's clock.
    fn time(&self, clock: Clock, now: Instant) -> time::Instant {
        let time = clock.at(now) + self.skew;
        self.frozen.map_or(time, |frozen| time.min(frozen))
    }

    /// Processes one segment.
    pub(super) fn receive(
        &mut self,
        interface: &mut Interface,
        clock: Clock,
        now: Instant,
        packet: &[u8],
        out: &mut PacketBuffer,
    ) {
        let (time, before) = (self.time(clock, now), self.state());
        interface.poll_ingress_single(time, &mut Port { incoming: Some(packet), out }, &mut self.sockets);
        self.last_heard = now;
        let reset = Segment::resets_packet(packet);
        self.note(time, before, if reset { CloseReason::Reset } else { CloseReason::Finished });
        if self.released.is_some() && self.socket().recv_queue() > 0 {
            // Nothing will read the data, and the peer must know.
            self.abort();
        }
    }

    /// Sends at most `quantum` packets; returns whether there may be more.
    pub(super) fn transmit(
        &mut self,
        interface: &mut Interface,
        clock: Clock,
        now: Instant,
        out: &mut PacketBuffer,
        quantum: usize,
    ) -> bool {
        if self.released.is_some_and(|at| now >= at + LINGER) {
            self.abort();
        }
        let time = self.time(clock, now);
        for _ in 0..quantum {
            let before = self.state();
            let sent = interface.poll_egress(time, &mut Port { incoming: None, out }, &mut self.sockets);
            self.note(time, before, CloseReason::TimedOut);
            if sent == PollResult::None {
                return false;
            }
            if self.state() == State::TimeWait {
                self.time_wait_reply = out.last().map(<[u8]>::to_vec);
            }
        }
        true
    }

    /// When it must be served again if nothing else happens.
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

    /// Retransmits unacknowledged data now instead of at the next timeout, which after a long outage may be a minute away:
    /// advances the connection's clock to that time. Does nothing unless the peer has been silent.
    pub(super) fn retransmit_now(&mut self, interface: &mut Interface, clock: Clock, now: Instant) -> bool {
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
            self.end = Some(CloseReason::Reset);
        }
        self.socket().abort();
    }

    /// The application has dropped the stream. If it had finished its direction the data is still delivered; otherwise the
    /// connection is reset.
    pub(super) fn release(&mut self, now: Instant) {
        self.released = Some(now);
        let unread = self.socket().recv_queue() > 0;
        match self.state() {
            State::FinWait1 | State::FinWait2 | State::Closing | State::LastAck | State::TimeWait if !unread => {}
            State::Closed => {}
            _ => self.abort(),
        }
    }

    /// Whether the connection can be removed.
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

    /// The acknowledgement to repeat if a peer in LAST-ACK retransmits its FIN (RFC 9293 §3.10.7.4, TIME-WAIT).
    pub(super) fn time_wait_reply(&mut self) -> Option<Vec<u8>> {
        self.time_wait_reply.take()
    }

    /// Checks what a call into smoltcp has changed; `cause` is the reason if the connection is closed now.
    fn note(&mut self, time: time::Instant, before: State, cause: CloseReason) {
        let after = self.state();
        if after == before {
            return;
        }
        match after {
            State::TimeWait => self.frozen = Some(time + TIME_WAIT_CLOCK),
            // When the peer resets a passive open, smoltcp returns to LISTEN; for us the connection is over.
            State::Closed | State::Listen if self.end.is_none() => {
                let finished = cause == CloseReason::Finished && before == State::LastAck;
                self.end = Some(match cause {
                    CloseReason::Finished if !finished => CloseReason::Reset,
                    cause => cause,
                });
            }
            _ => {}
        }
    }
}
