//! The interface to WireGuard: `boringtun`'s Noise state machine, with the time as an argument.
//!
//! All of WireGuard that this crate does not implement itself is behind [`Session`] (one per peer) and [`Gate`] (one per
//! node, which checks every handshake initiation), so that the implementation could be replaced. What this adds:
//!
//! - **Lengths are checked before `boringtun` sees a datagram** ([`classify`]): it panics when the output buffer is
//!   smaller than the input.
//! - **Time.** `boringtun` reads the system's clock (on Linux the one that includes sleep). With the feature
//!   `simulated-time` that clock is replaced and set to the `now` of each call; without it, `now` must be real.
//! - **Fresh timers.** `boringtun` stamps sessions with the time of the last [`Session::tick`], so a tick comes before
//!   each handshake message; otherwise a session that begins after a quiet time would end early.
//! - **Keys in use are kept.** `boringtun` has eight session slots, which handshakes begun or answered use in turn. Many
//!   attempts in a row would overwrite the keys in use with ones that may never be used, so slots in use are skipped.
//! - **One rate limit for the node.** It is the gate's; `boringtun`'s own limiters are not used.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::{Duration, Instant},
};

use boringtun::noise::{Packet, Tunn, TunnResult, errors::WireGuardError, handshake, rate_limiter::RateLimiter};
use x25519_dalek::{PublicKey, StaticSecret};

/// Bytes that WireGuard adds to each packet: 16 of header, 16 of authentication (paper §5.4.6).
pub(crate) const OVERHEAD: usize = 32;

/// Bytes of a handshake initiation (paper §5.4.2).
pub(crate) const INITIATION_LEN: usize = 148;

/// Bytes of a cookie reply (paper §5.4.7).
pub(crate) const COOKIE_REPLY_LEN: usize = 64;

/// Enough bytes for any message except data packets.
pub(crate) const CONTROL_LEN: usize = 256;

/// Valid initiations per second before cookies are required (paper §5.3). Each costs about 0.3 ms of a core, so a flood
/// costs 3 % of it; one peer that retries on every path needs less than 20.
pub(crate) const INITIATIONS_PER_SECOND: u64 = 100;

/// How old `boringtun`'s time may be when a packet is sent. Its timers count seconds.
pub(crate) const CLOCK_GRAIN: Duration = Duration::from_millis(250);

/// The session slots of `boringtun`.
const MAX_SESSIONS: u32 = 8;

const RESPONSE_LEN: usize = 92;
const MAC1: std::ops::Range<usize> = INITIATION_LEN - 32..INITIATION_LEN - 16;

/// A datagram whose type and length agree (paper §5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// Type 1.
    Initiation,
    /// Type 2, for the handshake with this local index.
    Response(u32),
    /// Type 3, for the handshake with this local index.
    CookieReply(u32),
    /// Type 4, for the session with this local index.
    Data(u32),
}

/// Why a datagram was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The counter or timestamp was seen before, or is too old to tell.
    Replayed,
    /// Authentication failed.
    Forged,
    /// The session or handshake has ended.
    Stale,
    /// The contents are not an IP packet.
    Malformed,
    /// There are too many handshakes.
    RateLimited,
}

/// The contents of an authentic datagram. Lengths are of what was written to the output buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// An empty packet, or a cookie: nothing to do.
    Nothing,
    /// An inner IPv6 packet.
    Packet { len: usize, source: Ipv6Addr },
    /// An inner IPv4 packet, which is not supported.
    Ipv4,
    /// A message to send on the path on which the datagram arrived.
    Reply(usize),
}

/// The datagram's message type, if its length fits the type.
pub(crate) fn classify(datagram: &[u8]) -> Option<Message> {
    let index = |at: usize| Some(u32::from_le_bytes(datagram.get(at..at + 4)?.try_into().ok()?));
    match (index(0)?, datagram.len()) {
        (1, INITIATION_LEN) => Some(Message::Initiation),
        (2, RESPONSE_LEN) => index(8).map(Message::Response),
        (3, COOKIE_REPLY_LEN) => index(4).map(Message::CookieReply),
        (4, OVERHEAD..) => index(4).map(Message::Data),
        _ => None,
    }
}

/// Whether a message of ours is an initiation.
pub(crate) const fn is_initiation(message: &[u8]) -> bool {
    matches!(message.first(), Some(1))
}

/// The sender's index in an initiation or a response (paper §5.4.2, §5.4.3).
pub(crate) fn sender_index(message: &[u8]) -> u32 {
    u32::from_le_bytes(message[4..8].try_into().expect("the range is 4 bytes"))
}

/// Identifies an initiation: its keyed hash over everything before that.
pub(crate) fn fingerprint(initiation: &[u8; INITIATION_LEN]) -> [u8; 16] {
    initiation[MAC1].try_into().expect("the range is 16 bytes")
}

/// Whether a handshake initiation may proceed.
pub(crate) enum Admission {
    /// Made by the holder of this key, or a replay of that.
    From(PublicKey),
    /// There are too many: send only the cookie reply that was written (paper §5.3).
    Cookie,
    /// Drop it.
    Refused(Refusal),
}

/// Checks handshake initiations before any peer's state is touched.
pub(crate) struct Gate {
    private_key: StaticSecret,
    public_key: PublicKey,
    limiter: RateLimiter,
    unlimited: Arc<RateLimiter>,
    reset_at: Instant,
}

impl Gate {
    pub(crate) fn new(private_key: StaticSecret, now: Instant) -> Self {
        set_clock(now);
        let public_key = PublicKey::from(&private_key);
        Self {
            limiter: RateLimiter::new(&public_key, INITIATIONS_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public_key, u64::MAX)),
            private_key,
            public_key,
            reset_at: now,
        }
    }

    pub(crate) const fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// Checks the initiation's MAC and the rate, and decrypts its sender's key (paper §5.4.2).
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        source: IpAddr,
        initiation: &[u8; INITIATION_LEN],
        cookie_reply: &mut [u8; COOKIE_REPLY_LEN],
    ) -> Admission {
        set_clock(now);
        if now.saturating_duration_since(self.reset_at) >= Duration::from_secs(1) {
            self.limiter.reset_count();
            self.reset_at = now;
        }
        let packet = match self.limiter.verify_packet(Some(source), initiation, cookie_reply) {
            Ok(Packet::HandshakeInit(packet)) => packet,
            Err(TunnResult::WriteToNetwork(_)) => return Admission::Cookie,
            Err(TunnResult::Err(error)) => return Admission::Refused(refusal(&error)),
            _ => return Admission::Refused(Refusal::Malformed),
        };
        match handshake::parse_handshake_anon(&self.private_key, &self.public_key, &packet) {
            Ok(half) => Admission::From(PublicKey::from(half.peer_static_public)),
            Err(error) => Admission::Refused(refusal(&error)),
        }
    }

    /// The session with one peer. `index` has 24 bits and becomes the upper part of the receiver index in all datagrams
    /// from the peer.
    pub(crate) fn session(
        &self,
        now: Instant,
        peer: PublicKey,
        preshared_key: Option<[u8; 32]>,
        index: u32,
    ) -> Session {
        set_clock(now);
        let limiter = Arc::clone(&self.unlimited);
        let tunn = Tunn::new(self.private_key.clone(), peer, preshared_key, None, index, Some(limiter));
        Session { tunn, ticked_at: now, established: false, last_index: index << 8, answered: None, in_use: [None; 2] }
    }
}

/// WireGuard with one peer: the handshake in progress and the keys in use.
pub(crate) struct Session {
    tunn: Tunn,
    ticked_at: Instant,
    established: bool,
    /// The index of the last handshake that was begun or answered.
    last_index: u32,
    /// The index of the last handshake that was answered, until it is used.
    answered: Option<u32>,
    /// The indices of the last two sessions for which both sides had keys.
    in_use: [Option<u32>; 2],
}

impl Session {
    /// Whether there are keys to send with.
    pub(crate) const fn is_established(&self) -> bool {
        self.established
    }

    /// Whether [`Session::tick`] should be called before the next packet.
    pub(crate) fn is_stale(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.ticked_at) >= CLOCK_GRAIN
    }

    /// Encrypts a packet (an empty one is a keepalive) into `output`, which must be exactly [`OVERHEAD`] bytes longer.
    /// Returns false if there are no keys; then nothing was written that could be sent.
    pub(crate) fn encrypt(&mut self, now: Instant, packet: &[u8], output: &mut [u8]) -> bool {
        debug_assert_eq!(output.len(), packet.len() + OVERHEAD);
        if !self.established {
            return false;
        }
        set_clock(now);
        let len = output.len();
        matches!(self.tunn.encapsulate(packet, output), TunnResult::WriteToNetwork(sent) if sent.len() == len)
    }

    /// Processes a datagram that [`classify`] recognises. `output` must have at least the datagram's length and
    /// [`CONTROL_LEN`].
    pub(crate) fn decrypt(&mut self, now: Instant, datagram: &[u8], output: &mut [u8]) -> Result<Received, Refusal> {
        debug_assert!(output.len() >= datagram.len().max(CONTROL_LEN));
        set_clock(now);
        let message = classify(datagram);
        if message == Some(Message::Initiation) {
            self.skip_sessions_in_use();
        }
        let received = match self.tunn.decapsulate(None, datagram, output) {
            TunnResult::Done => Received::Nothing,
            TunnResult::Err(error) => return Err(refusal(&error)),
            TunnResult::WriteToNetwork(reply) => Received::Reply(reply.len()),
            TunnResult::WriteToTunnelV4(..) => Received::Ipv4,
            TunnResult::WriteToTunnelV6(packet, source) => Received::Packet { len: packet.len(), source },
        };
        match message {
            Some(Message::Initiation) => {
                self.last_index = sender_index(output);
                self.answered = Some(self.last_index);
            }
            Some(Message::Response(index)) => self.use_index(index),
            Some(Message::Data(index)) if self.answered == Some(index) => {
                self.answered = None;
                self.use_index(index);
            }
            _ => {}
        }
        if !self.established {
            self.refresh();
        }
        Ok(received)
    }

    /// The session that the peer has begun but not used yet.
    pub(crate) const fn unconfirmed(&self) -> Option<u32> {
        self.answered
    }

    /// The next message that `boringtun` has queued until there were keys; to be called until there is none.
    pub(crate) fn pop_queued(&mut self, now: Instant, output: &mut [u8; CONTROL_LEN]) -> Option<usize> {
        set_clock(now);
        match self.tunn.decapsulate(None, &[], output) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    /// Writes a new initiation, replacing one in progress. An answer to the previous one is still accepted.
    pub(crate) fn initiate(&mut self, now: Instant, output: &mut [u8; CONTROL_LEN]) -> Option<usize> {
        set_clock(now);
        self.skip_sessions_in_use();
        self.format_initiation(output)
    }

    /// Runs WireGuard's timers (paper §6); returns the length of what has to be sent, an initiation or a keepalive.
    pub(crate) fn tick(&mut self, now: Instant, output: &mut [u8; CONTROL_LEN]) -> Option<usize> {
        set_clock(now);
        self.ticked_at = now;
        let len = match self.tunn.update_timers(output) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        };
        if len.is_some() && is_initiation(output) {
            self.last_index = sender_index(output);
        }
        self.refresh();
        len
    }

    fn format_initiation(&mut self, output: &mut [u8; CONTROL_LEN]) -> Option<usize> {
        let TunnResult::WriteToNetwork(message) = self.tunn.format_handshake_initiation(output, true) else {
            return None;
        };
        let len = message.len();
        self.last_index = sender_index(output);
        Some(len)
    }

    /// Uses up indices, by making initiations that are not sent, until the next slot is not in use.
    fn skip_sessions_in_use(&mut self) {
        for _ in 0..self.in_use.len() {
            let next = self.last_index.wrapping_add(1) % MAX_SESSIONS;
            if self.in_use.iter().flatten().all(|index| index % MAX_SESSIONS != next) {
                return;
            }
            self.format_initiation(&mut [0; CONTROL_LEN]);
        }
    }

    fn use_index(&mut self, index: u32) {
        self.in_use = [Some(index), self.in_use[0]];
    }

    fn refresh(&mut self) {
        self.established = self.tunn.time_since_last_handshake().is_some();
    }
}

const fn refusal(error: &WireGuardError) -> Refusal {
    match error {
        WireGuardError::DuplicateCounter
        | WireGuardError::InvalidCounter
        | WireGuardError::WrongTai64nTimestamp
        | WireGuardError::InvalidTai64nTimestamp => Refusal::Replayed,
        WireGuardError::UnexpectedPacket
        | WireGuardError::WrongIndex
        | WireGuardError::NoCurrentSession
        | WireGuardError::ConnectionExpired => Refusal::Stale,
        WireGuardError::InvalidPacket
        | WireGuardError::IncorrectPacketLength
        | WireGuardError::WrongPacketType
        | WireGuardError::DestinationBufferTooSmall => Refusal::Malformed,
        WireGuardError::UnderLoad => Refusal::RateLimited,
        WireGuardError::WrongKey
        | WireGuardError::InvalidMac
        | WireGuardError::InvalidAeadTag
        | WireGuardError::LockFailed => Refusal::Forged,
    }
}

#[cfg(not(feature = "simulated-time"))]
const fn set_clock(_now: Instant) {}

/// The simulated clock is thread-local; the epoch is global, so that a node may move between threads.
#[cfg(feature = "simulated-time")]
fn set_clock(now: Instant) {
    static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    /// So that a simulation may begin before the epoch was first asked for.
    const SLACK: Duration = Duration::from_secs(24 * 3600);
    let epoch = EPOCH.get_or_init(Instant::now);
    mock_instant::MockClock::set_time((now + SLACK).saturating_duration_since(*epoch));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_and_length_must_agree() {
        let datagram = |kind: u8, len: usize| {
            let mut bytes = vec![0; len];
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            bytes
        };

        assert_eq!(classify(&datagram(1, 148)), Some(Message::Initiation));
        assert_eq!(classify(&datagram(2, 92)), Some(Message::Response(0)));
        assert_eq!(classify(&datagram(3, 64)), Some(Message::CookieReply(0)));
        assert_eq!(classify(&datagram(4, 32)), Some(Message::Data(0)));
        for (kind, len) in [(0, 148), (1, 147), (1, 149), (2, 91), (3, 65), (4, 31), (5, 100), (4, 0), (4, 3), (255, 4)]
        {
            assert_eq!(classify(&datagram(kind, len)), None, "type {kind}, {len} bytes");
        }
    }

    #[test]
    fn reserved_bytes_must_be_zero() {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&[4, 0, 1, 0]);

        assert_eq!(classify(&bytes), None);
    }
}
