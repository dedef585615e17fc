//! The relay's frames: one binary WebSocket message each (RFC 6455), subprotocol [`SUBPROTOCOL`].
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 1 | version, [`VERSION`] |
//! | 1 | 1 | type: 1 packets, 2 peer absent |
//! | 2 | 32 | X25519 public key of the peer |
//! | 34 | … | body |
//!
//! **Packets** (both ways): the body is one or more `length: u16 big-endian, packet: length bytes`; no packet is empty.
//! From a client the key names the destination, from the server the source. The server rewrites the key and forwards
//! the message whole; it never looks into the body.
//!
//! **Peer absent** (server to client): the key names a peer that is not connected; the body is empty.
//!
//! A message is at most [`MAX_MESSAGE`] bytes. The version comes first, so that text from a proxy that answers in the
//! server's place is recognised at its first byte. The receiver of a frame that does not decode closes the connection,
//! because a WebSocket does not corrupt messages in transit.
//!
//! Test vector, a frame with the packets `aa` and `bb cc` and a key of 32 bytes `07`:
//!
//! ```text
//! 01 01  07 × 32  00 01 aa  00 02 bb cc
//! ```

/// The WebSocket subprotocol of these frames.
pub const SUBPROTOCOL: &str = "loom.relay.v1";

/// The first byte of each frame.
pub const VERSION: u8 = 1;

/// Bytes before the body.
pub const HEADER_LEN: usize = 34;

/// Bytes before each packet in a body.
pub const PACKET_HEADER_LEN: usize = 2;

/// In bytes: a batch of some fifty packets, yet small enough that one sender's turn is short.
pub const MAX_MESSAGE: usize = 64 * 1024;

const TYPE_PACKETS: u8 = 1;
const TYPE_PEER_ABSENT: u8 = 2;
const KEY: std::ops::Range<usize> = 2..HEADER_LEN;

/// A decoded and completely validated frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Packets to or from a peer.
    Packets {
        /// The destination's key on the way to the server, the source's on the way from it.
        peer: [u8; 32],
        /// The packets, at least one.
        packets: Packets<'a>,
    },
    /// The peer is not connected to the relay.
    PeerAbsent {
        /// The absent peer's public key.
        peer: [u8; 32],
    },
}

/// Why a message is not a valid frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than a header.
    #[error("the frame ends within its header, after {0} bytes")]
    Truncated(usize),
    /// Longer than [`MAX_MESSAGE`].
    #[error("the frame has {0} bytes, more than the {MAX_MESSAGE} allowed")]
    TooLong(usize),
    /// From a later protocol version, or not from a relay at all.
    #[error("the frame's version is {0}, not {VERSION}")]
    Version(u8),
    /// A type that this version does not have.
    #[error("the frame's type {0} is unknown")]
    Type(u8),
    /// A packet frame without a packet.
    #[error("the frame holds no packet")]
    NoPacket,
    /// A packet of no bytes at this offset.
    #[error("the packet at offset {0} is empty")]
    EmptyPacket(usize),
    /// The packet at this offset does not end within the frame.
    #[error("the packet at offset {0} ends beyond the frame")]
    PacketTruncated(usize),
    /// A peer-absent frame with a body.
    #[error("{0} bytes follow a frame that has no body")]
    TrailingBytes(usize),
}

/// The packets of a frame, in order. Their lengths were checked when the frame was decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packets<'a>(&'a [u8]);

impl<'a> Iterator for Packets<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first_chunk::<PACKET_HEADER_LEN>()?;
        let (packet, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        self.0 = rest;
        Some(packet)
    }
}

/// Decodes one message.
///
/// # Errors
///
/// When any part of it is not as the module's table says.
pub fn decode(message: &[u8]) -> Result<Frame<'_>, FrameError> {
    if message.len() > MAX_MESSAGE {
        return Err(FrameError::TooLong(message.len()));
    }
    match message.first() {
        Some(&VERSION) => {}
        Some(&other) => return Err(FrameError::Version(other)),
        None => return Err(FrameError::Truncated(0)),
    }
    let Some((header, body)) = message.split_first_chunk::<HEADER_LEN>() else {
        return Err(FrameError::Truncated(message.len()));
    };
    let peer: [u8; 32] = header[KEY].try_into().expect("the key's range is 32 bytes");
    match header[1] {
        TYPE_PACKETS => Ok(Frame::Packets { peer, packets: check_packets(body)? }),
        TYPE_PEER_ABSENT if body.is_empty() => Ok(Frame::PeerAbsent { peer }),
        TYPE_PEER_ABSENT => Err(FrameError::TrailingBytes(body.len())),
        other => Err(FrameError::Type(other)),
    }
}

/// Replaces the key in an encoded frame, as the server does before it forwards one.
///
/// # Errors
///
/// When the message is shorter than a header.
pub fn set_peer(message: &mut [u8], peer: &[u8; 32]) -> Result<(), FrameError> {
    let len = message.len();
    let key = message.get_mut(KEY).ok_or(FrameError::Truncated(len))?;
    key.copy_from_slice(peer);
    Ok(())
}

/// Encodes a batch of packets of `segment_size` bytes each (the last perhaps shorter), as
/// [`Node::poll_transmit`](crate::node::Node::poll_transmit) gives them, and appends the frame to `frame`.
///
/// # Errors
///
/// When the batch is empty or does not fit into [`MAX_MESSAGE`]; `frame` is then as before.
pub fn encode_packets(
    peer: &[u8; 32],
    batch: &[u8],
    segment_size: usize,
    frame: &mut Vec<u8>,
) -> Result<(), FrameError> {
    if batch.is_empty() || segment_size == 0 {
        return Err(FrameError::NoPacket);
    }
    let len = HEADER_LEN + batch.len() + batch.len().div_ceil(segment_size) * PACKET_HEADER_LEN;
    if len > MAX_MESSAGE {
        return Err(FrameError::TooLong(len));
    }
    frame.reserve(len);
    put_header(peer, TYPE_PACKETS, frame);
    for packet in batch.chunks(segment_size) {
        let length = u16::try_from(packet.len()).expect("the whole frame fits into 64 KiB");
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(packet);
    }
    Ok(())
}

/// Encodes that a peer is not connected, and appends the frame to `frame`.
pub fn encode_peer_absent(peer: &[u8; 32], frame: &mut Vec<u8>) {
    put_header(peer, TYPE_PEER_ABSENT, frame);
}

fn put_header(peer: &[u8; 32], kind: u8, frame: &mut Vec<u8>) {
    frame.extend_from_slice(&[VERSION, kind]);
    frame.extend_from_slice(peer);
}

fn check_packets(body: &[u8]) -> Result<Packets<'_>, FrameError> {
    if body.is_empty() {
        return Err(FrameError::NoPacket);
    }
    let mut offset = 0;
    while offset < body.len() {
        let at = HEADER_LEN + offset;
        let Some((length, rest)) = body[offset..].split_first_chunk::<PACKET_HEADER_LEN>() else {
            return Err(FrameError::PacketTruncated(at));
        };
        let length = usize::from(u16::from_be_bytes(*length));
        if length == 0 {
            return Err(FrameError::EmptyPacket(at));
        }
        if length > rest.len() {
            return Err(FrameError::PacketTruncated(at));
        }
        offset += PACKET_HEADER_LEN + length;
    }
    Ok(Packets(body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    const PEER: [u8; 32] = [7; 32];

    fn vector() -> Vec<u8> {
        let mut bytes = vec![1, 1];
        bytes.extend_from_slice(&PEER);
        bytes.extend_from_slice(&[0, 1, 0xaa, 0, 2, 0xbb, 0xcc]);
        bytes
    }

    fn packets(message: &[u8]) -> Vec<Vec<u8>> {
        match decode(message) {
            Ok(Frame::Packets { packets, .. }) => packets.map(<[u8]>::to_vec).collect(),
            other => panic!("no packets: {other:?}"),
        }
    }

    #[test]
    fn the_test_vector_decodes() {
        let bytes = vector();

        assert_eq!(packets(&bytes), [vec![0xaa], vec![0xbb, 0xcc]]);
        assert!(matches!(decode(&bytes), Ok(Frame::Packets { peer: PEER, .. })));
    }

    #[test]
    fn packets_of_equal_size_and_a_shorter_last_survive_the_round_trip() {
        for seed in 0..500 {
            let mut random = Random::new(seed);
            let segment_size = 1 + random.below(1400) as usize;
            let len = 1 + random.below(50_000) as usize;
            let batch: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            let mut frame = Vec::new();

            match encode_packets(&PEER, &batch, segment_size, &mut frame) {
                Ok(()) => {
                    let expected: Vec<Vec<u8>> = batch.chunks(segment_size).map(<[u8]>::to_vec).collect();
                    assert_eq!(packets(&frame), expected, "seed {seed}");
                }
                Err(FrameError::TooLong(_)) => assert!(frame.is_empty(), "seed {seed}"),
                Err(error) => panic!("seed {seed}: {error}"),
            }
        }
    }

    #[test]
    fn peer_absent_survives_the_round_trip() {
        let mut frame = Vec::new();
        encode_peer_absent(&PEER, &mut frame);

        assert_eq!(decode(&frame), Ok(Frame::PeerAbsent { peer: PEER }));
        frame.push(0);
        assert_eq!(decode(&frame), Err(FrameError::TrailingBytes(1)));
    }

    #[test]
    fn every_truncation_is_an_error_or_whole_packets() {
        let whole = vector();
        for len in 0..whole.len() {
            match decode(&whole[..len]) {
                Ok(Frame::Packets { packets, .. }) => assert_eq!((len, packets.count()), (HEADER_LEN + 3, 1)),
                Ok(frame) => panic!("{len}: {frame:?}"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn hostile_bytes_never_panic_and_never_yield_an_empty_packet() {
        for seed in 0..20_000 {
            let mut random = Random::new(seed);
            let mut bytes = vector();
            bytes.extend((0..random.below(60)).map(|_| 0u8));
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] = random.next() as u8;
            }
            if let Ok(Frame::Packets { packets, .. }) = decode(&bytes) {
                let mut total = 0;
                for packet in packets {
                    assert!(!packet.is_empty(), "seed {seed}");
                    total += packet.len() + PACKET_HEADER_LEN;
                }
                assert_eq!(total, bytes.len() - HEADER_LEN, "seed {seed}");
            }
        }
    }

    #[test]
    fn what_is_no_relay_is_told_by_its_first_byte() {
        assert_eq!(decode(b"HTTP/1.1 502 Bad Gateway\r\n"), Err(FrameError::Version(b'H')));
        assert_eq!(decode(&[]), Err(FrameError::Truncated(0)));
        assert_eq!(decode(&vec![VERSION; MAX_MESSAGE + 1]), Err(FrameError::TooLong(MAX_MESSAGE + 1)));
    }

    #[test]
    fn the_server_rewrites_only_the_key() {
        let mut bytes = vector();

        set_peer(&mut bytes, &[9; 32]).expect("the vector has a header");

        assert!(matches!(decode(&bytes), Ok(Frame::Packets { peer, .. }) if peer == [9; 32]));
        assert_eq!(packets(&bytes), packets(&vector()));
    }
}
