//! Packets that wait for a session or a path.
//!
//! Bounded in bytes, because TCP retransmits lost segments anyway: keeping some lets a stream continue at once instead of
//! at its next backed-off timer (RFC 6298 §5.5). When the queue is full the oldest packets are dropped, because the other
//! side acknowledges the newest segments first.

use std::collections::VecDeque;

/// For one peer: about one window of a stream at 100 Mbit/s and 20 ms.
pub const MAX_PENDING_BYTES: usize = 256 * 1024;

/// The packets that wait for one peer's session.
#[derive(Default)]
pub(crate) struct PendingPackets {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl PendingPackets {
    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Queues a copy; returns how many older packets were dropped for it.
    pub(crate) fn push(&mut self, packet: &[u8]) -> u64 {
        let mut dropped = 0;
        while self.bytes + packet.len() > MAX_PENDING_BYTES && self.pop().is_some() {
            dropped += 1;
        }
        self.bytes += packet.len();
        self.packets.push_back(packet.to_vec());
        dropped
    }

    /// Puts back the packet that was just popped.
    pub(crate) fn put_back(&mut self, packet: Vec<u8>) {
        self.bytes += packet.len();
        self.packets.push_front(packet);
    }

    pub(crate) fn pop(&mut self) -> Option<Vec<u8>> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_packets_go_first() {
        let mut pending = PendingPackets::default();
        let dropped: u64 = (0..300u16).map(|n| pending.push(&[n.to_be_bytes().as_slice(), &[0; 1022]].concat())).sum();

        assert_eq!(dropped, 300 - (MAX_PENDING_BYTES / 1024) as u64);
        let first = pending.pop().expect("the queue is full");
        assert_eq!(u64::from(u16::from_be_bytes([first[0], first[1]])), dropped);
    }
}
