//! Packets that wait for a session or a path.
//!
//! Bounded in bytes, because segments of TCP come back anyway: what is kept is what a stream needs to go on at once
//! instead of at its next backed-off timer (RFC 6298 §5.5). When it is full the oldest go, for the newest segments
//! are those that the other side acknowledges first.

use std::collections::VecDeque;

/// The most bytes kept for one peer: about one window of a stream at 100 Mbit/s and 20 ms.
pub const MAX_BACKLOG_BYTES: usize = 256 * 1024;

/// The packets that wait for one peer's session.
#[derive(Default)]
pub(crate) struct Backlog {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Keeps a copy; how many older packets had to go for it.
    pub(crate) fn push(&mut self, packet: &[u8]) -> u64 {
        let mut dropped = 0;
        while self.bytes + packet.len() > MAX_BACKLOG_BYTES && self.pop().is_some() {
            dropped += 1;
        }
        self.bytes += packet.len();
        self.packets.push_back(packet.to_vec());
        dropped
    }

    /// Puts a packet back that was taken a moment ago.
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
        let mut backlog = Backlog::default();
        let dropped: u64 = (0..300u16).map(|n| backlog.push(&[n.to_be_bytes().as_slice(), &[0; 1022]].concat())).sum();

        assert_eq!(dropped, 300 - (MAX_BACKLOG_BYTES / 1024) as u64);
        let first = backlog.pop().expect("the queue is full");
        assert_eq!(u64::from(u16::from_be_bytes([first[0], first[1]])), dropped);
    }
}
