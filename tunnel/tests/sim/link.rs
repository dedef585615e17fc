//! One direction of a link: delay, loss, reordering.

use std::time::Duration;

/// What a link does to datagrams.
#[derive(Clone)]
pub struct Link {
    pub up: bool,
    pub delay: Duration,
    /// Lost datagrams in a thousand.
    pub loss: u64,
    /// Datagrams in a thousand that come later than those sent after them, and how much later at most.
    pub reordered: u64,
    pub lag: Duration,
}

impl Link {
    /// A perfect link.
    pub fn with_delay(delay: Duration) -> Self {
        Self { up: true, delay, loss: 0, reordered: 0, lag: Duration::ZERO }
    }

    pub fn with_loss(self, per_mille: u64) -> Self {
        Self { loss: per_mille, ..self }
    }

    pub fn with_reordering(self, per_mille: u64, lag: Duration) -> Self {
        Self { reordered: per_mille, lag, ..self }
    }

    /// How long a datagram takes, unless it is lost.
    pub fn carry(&self, random: &mut Random) -> Option<Duration> {
        if !self.up || random.below(1000) < self.loss {
            return None;
        }
        let lag = if random.below(1000) < self.reordered { random.below(self.lag.as_micros() as u64 + 1) } else { 0 };
        Some(self.delay + Duration::from_micros(lag))
    }
}

/// SplitMix64, as in the crate itself.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_f42d_4c95_7f2d)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn bytes32(&mut self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes());
        }
        bytes
    }
}
