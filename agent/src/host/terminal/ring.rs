//! The last part of the output, by absolute offset.

use std::collections::VecDeque;

use bytes::Bytes;

/// The last bytes of a stream, addressed by their offset from its beginning.
#[derive(Debug)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
    end: u64,
    capacity: usize,
}

impl Ring {
    /// An empty ring for at most `capacity` bytes.
    pub(super) const fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), end: 0, capacity }
    }

    /// Appends bytes, and drops the oldest if necessary.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        let kept = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(self.capacity);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// The offset of the oldest byte kept.
    pub(super) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// The offset of the next byte to be appended.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// Up to `limit` bytes from `offset` on; `None` when `offset` is outside the ring.
    pub(super) fn get(&self, offset: u64, limit: usize) -> Option<Bytes> {
        if offset < self.start() || offset > self.end {
            return None;
        }
        let from = usize::try_from(offset - self.start()).ok()?;
        let to = self.bytes.len().min(from + limit);
        let (first, second) = self.bytes.as_slices();
        let middle = first.len();
        let head = &first[from.min(middle)..to.min(middle)];
        let tail = &second[from.max(middle) - middle..to.max(middle) - middle];
        Some(if tail.is_empty() { Bytes::copy_from_slice(head) } else { [head, tail].concat().into() })
    }

    /// The last bytes, at most `limit`.
    pub(super) fn tail(&self, limit: usize) -> Bytes {
        let from = self.start().max(self.end.saturating_sub(limit as u64));
        self.get(from, limit).expect("the range lies within the ring")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_stay_true_while_the_oldest_bytes_go() {
        let mut ring = Ring::new(10);
        let mut all = Vec::new();
        for step in 0u8..40 {
            let part: Vec<u8> = (0..step % 7).map(|index| step.wrapping_mul(7).wrapping_add(index)).collect();
            ring.push(&part);
            all.extend_from_slice(&part);
            assert_eq!(ring.end(), all.len() as u64);
            let start = usize::try_from(ring.start()).unwrap();
            assert_eq!(start, all.len().saturating_sub(10));
            for offset in start..=all.len() {
                let expected = &all[offset..all.len().min(offset + 4)];
                assert_eq!(ring.get(offset as u64, 4).unwrap(), expected);
            }
            assert_eq!(ring.tail(3), all[all.len().saturating_sub(3)..]);
        }
        assert_eq!(ring.get(ring.start() - 1, 1), None);
        assert_eq!(ring.get(ring.end() + 1, 1), None);
        ring.push(&[7; 100]);
        assert_eq!(ring.tail(100).as_ref(), [7; 10]);
    }
}
