//! The queue of frames waiting to be written to the relay.
//!
//! Consecutive packets for one peer share a frame. The queue is bounded in bytes: when it is half full the driver stops
//! making TCP segments for the peer, so that a slow relay loses no data, and when it is full nevertheless (handshakes,
//! many peers) the oldest frame is dropped.

use std::{collections::VecDeque, net::Ipv6Addr};

use bytes::Bytes;
use x25519_dalek::PublicKey;

use super::frame;

/// In bytes; above this TCP pauses. Enough to keep a gigabit busy for the 2 ms until the writer runs again.
const HIGH_WATER: usize = 256 << 10;

/// In bytes; below this paused TCP connections continue.
const LOW_WATER: usize = 64 << 10;

/// Above this the oldest frames are dropped.
const MAX_BYTES: usize = 512 << 10;

/// Frames grow to this size, in bytes: large enough that the server's work per frame does not matter, small enough that
/// losing one does not either.
const FRAME_SIZE: usize = 32 << 10;

/// Frames for the relay.
#[derive(Default)]
pub(crate) struct RelayQueue {
    frames: VecDeque<(PublicKey, Vec<u8>)>,
    bytes: usize,
    /// Peers whose TCP is paused.
    blocked: Vec<Ipv6Addr>,
    up: bool,
}

impl RelayQueue {
    /// The relay was connected or lost; without a relay the queue stays empty.
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
        let per_frame = (FRAME_SIZE / (segment + frame::PACKET_HEADER_LEN)).max(1);
        for part in batch.chunks(segment * per_frame) {
            let mut encoded = Vec::new();
            if frame::encode_packets(peer.as_bytes(), part, segment, &mut encoded).is_err() {
                // Longer than a frame; we never send such a packet.
                continue;
            }
            self.bytes += encoded.len();
            match self.frames.back_mut() {
                Some((last, frame)) if last == peer && frame.len() + encoded.len() <= FRAME_SIZE => {
                    frame.extend_from_slice(&encoded[frame::HEADER_LEN..]);
                    self.bytes -= frame::HEADER_LEN;
                }
                _ => self.frames.push_back((*peer, encoded)),
            }
        }
        while self.bytes > MAX_BYTES
            && let Some((_, oldest)) = self.frames.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }

    /// Removes and returns the oldest frame.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let (_, frame) = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame.into())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether TCP should pause.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= HIGH_WATER
    }

    /// Records a peer whose TCP is paused.
    pub(crate) fn note_blocked(&mut self, peer: Ipv6Addr) {
        if !self.blocked.contains(&peer) {
            self.blocked.push(peer);
        }
    }

    /// The peers whose TCP may continue, once there is room again.
    pub(crate) fn take_unblocked(&mut self) -> Vec<Ipv6Addr> {
        if self.bytes > LOW_WATER { Vec::new() } else { std::mem::take(&mut self.blocked) }
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
            assert!(queue.bytes <= MAX_BYTES);
        }
        let mut last = Bytes::new();
        let mut bytes = 0;
        while let Some(frame) = queue.pop() {
            bytes += frame.len();
            last = frame;
        }
        assert!(bytes > MAX_BYTES - 2 * FRAME_SIZE);
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
