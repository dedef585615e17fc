//! When a handshake is tried again.
//!
//! WireGuard alone waits 5 s for an answer (paper §6.4), which makes one lost packet the longest wait of a whole
//! connection. Here the first tries follow fast, then ever slower.

use std::time::{Duration, Instant};

use crate::random::Random;

/// The gaps after the first tries: at 0, 100, 250, 500 ms, 1 s, 1.5 s, 2 s and so on. Two tries are accepted at a time,
/// so that an answer counts when its round trip is shorter than two gaps; they grow for those that are longer. With 20
/// % loss each way, one connection in 100 needs more than a second.
pub const RETRY_GAPS: [Duration; 9] = [
    Duration::from_millis(100),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(500),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(1),
    Duration::from_secs(1),
];

/// The gap after those: `REKEY_TIMEOUT` of the paper, §6.1.
pub const RETRY_TAIL: Duration = Duration::from_secs(5);

/// The most that is added to each gap of the tail, so that many peers of one that came back do not call in chorus
/// (paper §6.1).
pub const RETRY_JITTER: Duration = Duration::from_millis(333);

/// The tries of one handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ladder {
    step: usize,
    next: Instant,
}

impl Ladder {
    /// A ladder whose first try is due at `first`.
    pub(crate) const fn from(first: Instant) -> Self {
        Self { step: 0, next: first }
    }

    pub(crate) const fn next(&self) -> Instant {
        self.next
    }

    /// A try was made: sets when the next is due.
    pub(crate) fn climb(&mut self, now: Instant, random: &mut Random) {
        let gap = RETRY_GAPS
            .get(self.step)
            .copied()
            .unwrap_or_else(|| RETRY_TAIL + Duration::from_micros(random.below(RETRY_JITTER.as_micros() as u64)));
        self.step += 1;
        self.next = now + gap;
    }

    /// The peer has begun a handshake itself: leaves it the time of one more step.
    pub(crate) fn yield_to_peer(&mut self, now: Instant) {
        let gap = RETRY_GAPS.get(self.step).copied().unwrap_or(RETRY_TAIL);
        self.next = self.next.max(now + gap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_tries_follow_fast_and_the_last_slowly() {
        let start = Instant::now();
        let mut random = Random::new(1);
        let mut ladder = Ladder::from(start);
        let mut times = Vec::new();
        for _ in 0..20 {
            let at = ladder.next();
            times.push((at - start).as_millis());
            ladder.climb(at, &mut random);
        }

        assert_eq!(times[..7], [0, 100, 250, 500, 1000, 1500, 2000]);
        let last = times[19] - times[18];
        assert!((5000..5334).contains(&last), "{last}");
    }
}
