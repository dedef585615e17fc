//! What a node has ready for its driver: datagrams in batches, decrypted packets, events, counters.
//!
//! Packets are encrypted directly into a batch and decrypted directly into the inbox. Buffers are reused: a batch's
//! buffer is swapped with the caller's, which is used for a later batch. So nothing is allocated per packet once the
//! buffers have grown.

use std::collections::VecDeque;

use x25519_dalek::PublicKey;

use crate::{
    node::{Counters, NodeEvent, Transmit},
    path::PathKind,
};

/// Linux accepts at most 64 KiB, headers included, in one `sendmsg` with `UDP_SEGMENT`; a batch also fits into one relay
/// frame.
pub const MAX_BATCH_BYTES: usize = 60 * 1024;

/// The kernel's limit, `UDP_MAX_SEGMENTS`.
pub const MAX_BATCH_SEGMENTS: usize = 64;

/// Bytes waiting for the driver to send: about 15 ms at 1 Gbit/s. The driver drains them after every input, so only a
/// stalled driver can reach this.
pub const MAX_OUTBOX_BYTES: usize = 2 * 1024 * 1024;

/// Decrypted bytes waiting for the driver; likewise.
pub const MAX_INBOX_BYTES: usize = 4 * 1024 * 1024;

/// Beyond this the oldest events are dropped.
pub const MAX_EVENTS: usize = 256;

/// The newest batches that may still grow. If more peers than this send in turns, batches get smaller.
const OPEN_BATCHES: usize = 8;

/// Empty buffers kept for later batches.
const SPARE_BUFFERS: usize = 16;

/// Everything that a call into the core produces; the driver empties it.
#[derive(Default)]
pub(crate) struct Output {
    pub(crate) outbox: Outbox,
    pub(crate) inbox: Inbox,
    pub(crate) counters: Counters,
    /// Room for a datagram that goes out by two paths.
    pub(crate) scratch: Vec<u8>,
    events: VecDeque<NodeEvent>,
}

impl Output {
    pub(crate) fn event(&mut self, event: NodeEvent) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    pub(crate) fn pop_event(&mut self) -> Option<NodeEvent> {
        self.events.pop_front()
    }

    /// Queues a finished datagram.
    pub(crate) fn send(&mut self, peer: PublicKey, path: PathKind, datagram: &[u8]) {
        let queued = self.outbox.write(peer, path, datagram.len(), |slot| {
            slot.copy_from_slice(datagram);
            true
        });
        if queued == Written::Full {
            self.counters.overflow += 1;
        }
    }

    /// Drops everything for or from a removed peer.
    pub(crate) fn purge(&mut self, peer: &PublicKey) {
        self.outbox.purge(peer);
        self.inbox.purge(peer);
    }
}

/// Whether a datagram was written to the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    Queued,
    /// There was nothing to write after all.
    Nothing,
    Full,
}

/// Datagrams to send.
#[derive(Default)]
pub(crate) struct Outbox {
    batches: VecDeque<Batch>,
    spare: Vec<Vec<u8>>,
    bytes: usize,
}

struct Batch {
    peer: PublicKey,
    path: PathKind,
    segment_size: usize,
    segments: usize,
    /// A shorter datagram was added, which must be the last.
    closed: bool,
    data: Vec<u8>,
}

impl Batch {
    fn takes(&self, len: usize) -> bool {
        !self.closed
            && len <= self.segment_size
            && self.segments < MAX_BATCH_SEGMENTS
            && self.data.len() + len <= MAX_BATCH_BYTES
    }
}

impl Outbox {
    /// Lets `fill` write a datagram of `len` bytes into a batch; `fill` returns whether it did.
    pub(crate) fn write(
        &mut self,
        peer: PublicKey,
        path: PathKind,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Written {
        if self.bytes + len > MAX_OUTBOX_BYTES || len > MAX_BATCH_BYTES {
            return Written::Full;
        }
        let at = self.open_batch(peer, path, len);
        let batch = &mut self.batches[at];
        let start = batch.data.len();
        batch.data.resize(start + len, 0);
        if fill(&mut batch.data[start..]) {
            batch.segments += 1;
            batch.closed = len < batch.segment_size;
            self.bytes += len;
            return Written::Queued;
        }
        batch.data.truncate(start);
        if start == 0 {
            // An empty batch was just opened, so it is the last.
            if let Some(batch) = self.batches.pop_back() {
                self.recycle(batch.data);
            }
        }
        Written::Nothing
    }

    /// The oldest batch, its data swapped into `buffer`.
    pub(crate) fn pop(&mut self, buffer: &mut Vec<u8>) -> Option<Transmit> {
        let mut batch = self.batches.pop_front()?;
        self.bytes -= batch.data.len();
        std::mem::swap(buffer, &mut batch.data);
        self.recycle(batch.data);
        Some(Transmit { path: batch.path, peer: batch.peer, segment_size: batch.segment_size })
    }

    fn purge(&mut self, peer: &PublicKey) {
        self.batches.retain(|batch| batch.peer != *peer);
        self.bytes = self.batches.iter().map(|batch| batch.data.len()).sum();
    }

    /// The index of the batch for a datagram. Only the newest batch of a path may grow, to keep the order on each path.
    fn open_batch(&mut self, peer: PublicKey, path: PathKind, len: usize) -> usize {
        let recent = self.batches.iter().enumerate().rev().take(OPEN_BATCHES);
        let newest = recent.into_iter().find(|(_, batch)| batch.path == path && batch.peer == peer);
        if let Some((at, _)) = newest.filter(|(_, batch)| batch.takes(len)) {
            return at;
        }
        let data = self.spare.pop().unwrap_or_default();
        self.batches.push_back(Batch { peer, path, segment_size: len, segments: 0, closed: false, data });
        self.batches.len() - 1
    }

    fn recycle(&mut self, mut data: Vec<u8>) {
        if data.capacity() > 0 && self.spare.len() < SPARE_BUFFERS {
            data.clear();
            self.spare.push(data);
        }
    }
}

/// Decrypted packets in order of arrival.
#[derive(Default)]
pub(crate) struct Inbox {
    data: Vec<u8>,
    /// The sender and length of each packet; no sender once it was removed.
    packets: VecDeque<(Option<PublicKey>, usize)>,
    /// Where the first packet begins, and where the last ends.
    start: usize,
    end: usize,
}

impl Inbox {
    /// Space at the end to decrypt into. [`Inbox::commit`] turns it into a packet; otherwise it is reused.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        if self.data.len() < self.end + len {
            self.data.resize(self.end + len, 0);
        }
        &mut self.data[self.end..self.end + len]
    }

    /// What was written into the space.
    pub(crate) fn written(&self, len: usize) -> &[u8] {
        &self.data[self.end..self.end + len]
    }

    /// Keeps the first `len` bytes of the space as a packet. False if the inbox is full.
    pub(crate) fn commit(&mut self, peer: PublicKey, len: usize) -> bool {
        if self.end - self.start + len > MAX_INBOX_BYTES {
            return false;
        }
        self.packets.push_back((Some(peer), len));
        self.end += len;
        true
    }

    /// The oldest packet, copied into `buffer`, and who sent it.
    pub(crate) fn pop(&mut self, buffer: &mut Vec<u8>) -> Option<PublicKey> {
        while let Some((peer, len)) = self.packets.pop_front() {
            let start = self.start;
            self.start += len;
            if let Some(peer) = peer {
                buffer.clear();
                buffer.extend_from_slice(&self.data[start..start + len]);
                self.rewind();
                return Some(peer);
            }
        }
        self.rewind();
        None
    }

    fn purge(&mut self, peer: &PublicKey) {
        for (sender, _) in &mut self.packets {
            if sender.as_ref() == Some(peer) {
                *sender = None;
            }
        }
    }

    fn rewind(&mut self) {
        if self.packets.is_empty() {
            self.start = 0;
            self.end = 0;
        } else if self.start > MAX_INBOX_BYTES {
            // If the inbox is never drained completely, move the rest to the front, once per 4 MiB.
            self.data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: [u8; 32] = [1; 32];
    const B: [u8; 32] = [2; 32];

    fn direct(port: u16) -> PathKind {
        PathKind::Direct(([127, 0, 0, 1], port).into())
    }

    fn push(outbox: &mut Outbox, key: [u8; 32], path: PathKind, len: usize, byte: u8) -> Written {
        outbox.write(key.into(), path, len, |slot| {
            slot.fill(byte);
            true
        })
    }

    fn drain(outbox: &mut Outbox) -> Vec<(PathKind, usize, Vec<u8>)> {
        let mut buffer = Vec::new();
        std::iter::from_fn(|| {
            outbox.pop(&mut buffer).map(|transmit| (transmit.path, transmit.segment_size, buffer.clone()))
        })
        .collect()
    }

    #[test]
    fn equal_datagrams_and_one_shorter_make_a_batch() {
        let mut outbox = Outbox::default();
        for (len, byte) in [(10, 1), (10, 2), (4, 3), (10, 4)] {
            push(&mut outbox, A, direct(1), len, byte);
        }

        let batches = drain(&mut outbox);

        assert_eq!(batches.len(), 2);
        assert_eq!((batches[0].1, batches[0].2.len()), (10, 24));
        assert_eq!((batches[1].1, batches[1].2.as_slice()), (10, [4; 10].as_slice()));
    }

    #[test]
    fn paths_do_not_mix_and_keep_their_order() {
        let mut outbox = Outbox::default();
        for byte in 0..6 {
            push(&mut outbox, A, direct(u16::from(byte % 2)), 8, byte);
        }
        push(&mut outbox, B, direct(0), 8, 9);

        let batches = drain(&mut outbox);

        assert_eq!(batches.len(), 3);
        assert_eq!(batches[0].2.chunks(8).map(|chunk| chunk[0]).collect::<Vec<_>>(), [0, 2, 4]);
        assert_eq!(batches[1].2.chunks(8).map(|chunk| chunk[0]).collect::<Vec<_>>(), [1, 3, 5]);
    }

    #[test]
    fn a_batch_is_bounded_in_bytes_and_datagrams() {
        let mut outbox = Outbox::default();
        for _ in 0..200 {
            push(&mut outbox, A, direct(1), 100, 0);
            push(&mut outbox, A, PathKind::Relay, 1312, 0);
        }

        for (_, segment_size, data) in drain(&mut outbox) {
            assert!(data.len() <= MAX_BATCH_BYTES);
            assert!(data.len().div_ceil(segment_size) <= MAX_BATCH_SEGMENTS);
        }
    }

    #[test]
    fn a_full_outbox_refuses_and_a_drained_one_takes_again() {
        let mut outbox = Outbox::default();
        while push(&mut outbox, A, direct(1), 1000, 0) == Written::Queued {}

        assert!(outbox.bytes <= MAX_OUTBOX_BYTES && outbox.bytes > MAX_OUTBOX_BYTES - 1000);
        drain(&mut outbox);
        assert_eq!(outbox.bytes, 0);
        assert_eq!(push(&mut outbox, A, direct(1), 1000, 0), Written::Queued);
    }

    #[test]
    fn what_was_not_written_leaves_no_trace() {
        let mut outbox = Outbox::default();
        assert_eq!(outbox.write(A.into(), direct(1), 10, |_| false), Written::Nothing);
        push(&mut outbox, A, direct(1), 10, 1);
        assert_eq!(outbox.write(A.into(), direct(1), 10, |_| false), Written::Nothing);

        assert_eq!(drain(&mut outbox), [(direct(1), 10, vec![1; 10])]);
    }

    #[test]
    fn removed_peers_leave_nothing_in_the_inbox() {
        let mut inbox = Inbox::default();
        for (key, byte) in [(A, 1), (B, 2), (A, 3)] {
            inbox.room(20)[..4].fill(byte);
            assert!(inbox.commit(key.into(), 4));
        }

        inbox.purge(&A.into());

        let mut buffer = Vec::new();
        assert_eq!(inbox.pop(&mut buffer), Some(B.into()));
        assert_eq!(buffer, [2; 4]);
        assert_eq!(inbox.pop(&mut buffer), None);
        assert_eq!((inbox.start, inbox.end), (0, 0));
    }
}
