//! Parses as much of a TCP segment as is needed to find its connection; smoltcp checks the rest.

use std::net::Ipv6Addr;

const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Identifies a connection, together with our one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Flow {
    pub(crate) remote: Ipv6Addr,
    pub(crate) remote_port: u16,
    pub(crate) local_port: u16,
}

/// The relevant part of a TCP header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    pub(super) flow: Flow,
    flags: u8,
}

impl Segment {
    /// Reads an IPv6 packet (RFC 8200 §3) that carries TCP (RFC 9293 §3.1) to `address`; `None` for any other packet.
    pub(super) fn parse(packet: &[u8], address: Ipv6Addr) -> Option<Self> {
        if packet.len() < IPV6_HEADER + TCP_HEADER || packet[0] >> 4 != 6 || packet[6] != PROTOCOL_TCP {
            return None;
        }
        if packet[24..40] != address.octets() {
            return None;
        }
        let source: [u8; 16] = packet[8..24].try_into().ok()?;
        let tcp = &packet[IPV6_HEADER..];
        let remote_port = u16::from_be_bytes([tcp[0], tcp[1]]);
        let local_port = u16::from_be_bytes([tcp[2], tcp[3]]);
        if remote_port == 0 || local_port == 0 {
            return None;
        }
        Some(Self { flow: Flow { remote: source.into(), remote_port, local_port }, flags: tcp[13] })
    }

    /// Whether it asks for a new connection.
    pub(super) fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether it ends a connection at once.
    pub(super) fn resets(&self) -> bool {
        self.flags & RST != 0
    }

    /// Whether a packet that is known to be TCP resets its connection.
    pub(super) fn resets_packet(packet: &[u8]) -> bool {
        packet.get(IPV6_HEADER + 13).is_some_and(|flags| flags & RST != 0)
    }

    /// Whether it is the last of its direction.
    pub(super) fn finishes(&self) -> bool {
        self.flags & FIN != 0
    }
}
