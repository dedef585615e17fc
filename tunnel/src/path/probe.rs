//! The probe's wire format: an IPv6 packet with one UDP datagram, sent like any other packet inside WireGuard.
//!
//! So a probe is authenticated without a key of its own, and looks like any data packet from outside.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 40 | IPv6 header (RFC 8200 §3): next header 17, hop limit 1, the two tunnel addresses |
//! | 40 | 8 | UDP header (RFC 768): both ports [`PROBE_PORT`], checksum as RFC 8200 §8.1 demands |
//! | 48 | 4 | magic, `LOOM` |
//! | 52 | 1 | version, 1 |
//! | 53 | 1 | type: 1 ping, 2 pong |
//! | 54 | 2 | zero |
//! | 56 | 8 | nonce: names the path, random, chosen by who pings |
//! | 64 | 4 | sequence, big-endian, counted per path |
//!
//! A pong repeats the ping's nonce and sequence and is sent on the path on which the ping arrived. A packet to
//! [`PROBE_PORT`] that does not match exactly is not a probe, and is delivered like any packet.

use std::net::Ipv6Addr;

/// The UDP port inside the tunnel: `discard` (RFC 863), so that a peer that does not know probes drops them.
pub const PROBE_PORT: u16 = 9;

/// Bytes, before encryption.
pub const PROBE_LEN: usize = 68;

const MAGIC: [u8; 4] = *b"LOOM";
const VERSION: u8 = 1;
const UDP_LEN: u16 = 28;
const NEXT_HEADER_UDP: u8 = 17;
const UDP_AT: usize = 40;
const BODY_AT: usize = 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeKind {
    Ping,
    Pong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) kind: ProbeKind,
    pub(crate) nonce: u64,
    pub(crate) sequence: u32,
}

impl Probe {
    /// The whole packet.
    pub(crate) fn encode(&self, source: Ipv6Addr, destination: Ipv6Addr) -> [u8; PROBE_LEN] {
        let mut packet = [0; PROBE_LEN];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&UDP_LEN.to_be_bytes());
        packet[6] = NEXT_HEADER_UDP;
        packet[7] = 1;
        packet[8..24].copy_from_slice(&source.octets());
        packet[24..40].copy_from_slice(&destination.octets());
        packet[UDP_AT..UDP_AT + 2].copy_from_slice(&PROBE_PORT.to_be_bytes());
        packet[UDP_AT + 2..UDP_AT + 4].copy_from_slice(&PROBE_PORT.to_be_bytes());
        packet[UDP_AT + 4..UDP_AT + 6].copy_from_slice(&UDP_LEN.to_be_bytes());
        let body = &mut packet[BODY_AT..];
        body[..4].copy_from_slice(&MAGIC);
        body[4] = VERSION;
        body[5] = match self.kind {
            ProbeKind::Ping => 1,
            ProbeKind::Pong => 2,
        };
        body[8..16].copy_from_slice(&self.nonce.to_be_bytes());
        body[16..20].copy_from_slice(&self.sequence.to_be_bytes());
        let checksum = udp_checksum(&packet);
        packet[UDP_AT + 6..UDP_AT + 8].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    /// Parses a probe. Ignores the checksum, because WireGuard has authenticated the packet.
    pub(crate) fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; PROBE_LEN] = packet.try_into().ok()?;
        let port = PROBE_PORT.to_be_bytes();
        let headers = packet[0] >> 4 == 6
            && packet[6] == NEXT_HEADER_UDP
            && packet[UDP_AT..UDP_AT + 2] == port
            && packet[UDP_AT + 2..UDP_AT + 4] == port;
        let body = &packet[BODY_AT..];
        if !headers || body[..4] != MAGIC || body[4] != VERSION {
            return None;
        }
        let kind = match body[5] {
            1 => ProbeKind::Ping,
            2 => ProbeKind::Pong,
            _ => return None,
        };
        Some(Self {
            kind,
            nonce: u64::from_be_bytes(body[8..16].try_into().ok()?),
            sequence: u32::from_be_bytes(body[16..20].try_into().ok()?),
        })
    }
}

/// The Internet checksum (RFC 1071) over the pseudo-header and the datagram, whose checksum field is zero.
fn udp_checksum(packet: &[u8; PROBE_LEN]) -> u16 {
    let words = packet[8..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = words.sum::<u32>() + u32::from(UDP_LEN) + u32::from(NEXT_HEADER_UDP);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    const SOURCE: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const DESTINATION: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

    #[test]
    fn probes_survive_the_round_trip() {
        for kind in [ProbeKind::Ping, ProbeKind::Pong] {
            let probe = Probe { kind, nonce: 0x0123_4567_89ab_cdef, sequence: 42 };
            assert_eq!(Probe::decode(&probe.encode(SOURCE, DESTINATION)), Some(probe));
        }
    }

    #[test]
    fn the_udp_checksum_verifies() {
        let probe = Probe { kind: ProbeKind::Ping, nonce: u64::MAX, sequence: 7 };
        let packet = probe.encode(SOURCE, DESTINATION);

        let words = packet[8..].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = words.sum::<u32>() + 28 + 17;
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn other_packets_are_no_probes() {
        let packet = Probe { kind: ProbeKind::Ping, nonce: 1, sequence: 2 }.encode(SOURCE, DESTINATION);

        for len in 0..PROBE_LEN {
            assert_eq!(Probe::decode(&packet[..len]), None);
        }
        for at in [0, 6, 40, 41, 42, 43, 48, 49, 50, 51, 52, 53] {
            let mut other = packet;
            other[at] ^= 0xf0;
            assert_eq!(Probe::decode(&other), None, "byte {at}");
        }
    }

    #[test]
    fn hostile_bytes_never_panic() {
        for seed in 0..5_000 {
            let mut random = Random::new(seed);
            let mut packet = Probe { kind: ProbeKind::Pong, nonce: 1, sequence: 2 }.encode(SOURCE, DESTINATION);
            packet[random.below(PROBE_LEN as u64) as usize] = random.next() as u8;
            let _ = Probe::decode(&packet[..random.below(PROBE_LEN as u64 + 1) as usize]);
        }
    }
}
