//! What waits to be written to the relay.
//!
//! Packets for one peer that follow each other share a frame. The queue is bounded in bytes: when it is half full the
//! driver stops making TCP segments for the peer, so that nothing is lost to a slow relay, and when it is full
//! nevertheless (handshakes, many peers) the oldest frame goes.

use std::{collections::VecDeque, net::Ipv6Addr};

use bytes::Bytes;
use x25519_dalek::PublicKey;

use super::frame;

/// Where TCP stops, in bytes: enough to keep a gigabit busy for the 2 ms until the writer runs again.
const FULL: usize = 256 << 10;

/// Queued bytes below which stopped TCP connections continue.
const LOW: usize = 64 << 10;

/// The most bytes that may be queued.
const MAX: usize = 512 << 10;

/// Frames grow to this size: large enough that the server's work per frame does not show, small enough that dropping
/// one is no disaster.
const FRAME: usize = 32 << 10;

/// Frames on their way to the relay.
#[derive(Default)]
pub(crate) struct RelayQueue {
    frames: VecDeque<(PublicKey, Vec<u8>)>,
    bytes: usize,
    /// Peers whose TCP waits for room.
    blocked: Vec<Ipv6Addr>,
    up: bool,
}

impl RelayQueue {
    /// The relay came or went; a queue without a relay holds nothing.
    pub(crate) fn set_up(&mut self, up: bool) {
        self.up = up;
        self.frames.clear();
        self.bytes = 0;
    }

    /// Appends a batch of packets of `segment` bytes each, the last perhaps shorter.
    pub(crate) fn push(&mut self, peer: &PublicKey, segment: usize, batch: &[u8]) {
        if !self.up || segment == 0 {
            return;
        }
        let per_frame = (FRAME / (segment + frame::PACKET_HEADER_LEN)).max(1);
        for part in batch.chunks(segment * per_frame) {
            let mut encoded = Vec::new();
            if frame::encode_packets(peer.as_bytes(), part, segment, &mut encoded).is_err() {
                // Longer than any frame: no packet of ours is.
                continue;
            }
            self.bytes += encoded.len();
            match self.frames.back_mut() {
                Some((last, frame)) if last == peer && frame.len() + encoded.len() <= FRAME => {
                    frame.extend_from_slice(&encoded[frame::HEADER_LEN..]);
                    self.bytes -= frame::HEADER_LEN;
                }
                _ => self.frames.push_back((*peer, encoded)),
            }
        }
        while self.bytes > MAX
            && let Some((_, oldest)) = self.frames.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }

    /// Takes the oldest frame out.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let (_, frame) = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame.into())
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether TCP should stop.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= FULL
    }

    /// Remembers a peer whose TCP has stopped.
    pub(crate) fn note_blocked(&mut self, peer: Ipv6Addr) {
        if !self.blocked.contains(&peer) {
            self.blocked.push(peer);
        }
    }

    /// The peers whose TCP may go on, once there is room again.
    pub(crate) fn take_unblocked(&mut self) -> Vec<Ipv6Addr> {
        if self.bytes > LOW { Vec::new() } else { std::mem::take(&mut self.blocked) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> (RelayQueue, PublicKey) {
        let mut queue = RelayQueue::default();
        queue.set_up(true);
        (queue, PublicKey::from([7; 32]))
    }

    fn packets(message: &[u8]) -> usize {
        match frame::decode(message) {
            Ok(frame::Frame::Packets { packets, .. }) => packets.count(),
            other => panic!("no packets: {other:?}"),
        }
    }

    #[test]
    fn packets_for_one_peer_share_a_frame() {
        let (mut queue, peer) = queue();
        queue.push(&peer, 100, &[1; 250]);
        queue.push(&peer, 80, &[2; 80]);
        queue.push(&PublicKey::from([8; 32]), 80, &[2; 80]);

        assert_eq!(packets(&queue.pop().expect("two frames wait")), 4);
        assert_eq!(packets(&queue.pop().expect("one frame waits")), 1);
        assert_eq!((queue.pop(), queue.bytes), (None, 0));
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let (mut queue, peer) = queue();
        for number in 0..=255u8 {
            queue.push(&peer, 1000, &[number; 60_000]);
            assert!(queue.bytes <= MAX);
        }
        let mut last = Bytes::new();
        let mut bytes = 0;
        while let Some(frame) = queue.pop() {
            bytes += frame.len();
            last = frame;
        }
        assert!(bytes > MAX - 2 * FRAME);
        assert_eq!((last.last(), queue.bytes), (Some(&255), 0));
    }

    #[test]
    fn without_a_relay_nothing_waits() {
        let (mut queue, peer) = queue();
        queue.push(&peer, 10, &[1; 10]);
        queue.set_up(false);
        queue.push(&peer, 10, &[1; 10]);
        assert_eq!((queue.pop(), queue.bytes), (None, 0));
    }
}
