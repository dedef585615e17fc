//! When a handshake is retried.
//!
//! Plain WireGuard waits 5 s for an answer (paper §6.4), so one lost packet would delay a connection by that much. Here
//! the first retries follow quickly, later ones ever more slowly.

use std::time::{Duration, Instant};

use crate::random::Random;

/// The gaps after the first attempts: at 0, 100, 250, 500 ms, 1 s, 1.5 s, 2 s and so on. The last two attempts are valid
/// at a time, so an answer counts if its round trip is shorter than two gaps; the gaps grow for longer round trips. With
/// 20 % loss each way, one connection in 100 needs more than a second.
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

/// The gap after these: `REKEY_TIMEOUT` (paper §6.1).
pub const RETRY_TAIL: Duration = Duration::from_secs(5);

/// At most this is added to each later gap, so that not all peers of a restarted node retry at the same time (paper
/// §6.1).
pub const RETRY_JITTER: Duration = Duration::from_millis(333);

/// When the attempts of one handshake are due.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetrySchedule {
    step: usize,
    next: Instant,
}

impl RetrySchedule {
    /// A schedule whose first attempt is due at `first`.
    pub(crate) const fn from(first: Instant) -> Self {
        Self { step: 0, next: first }
    }

    pub(crate) const fn next(&self) -> Instant {
        self.next
    }

    /// An attempt was made: sets when the next is due.
    pub(crate) fn advance(&mut self, now: Instant, random: &mut Random) {
        let gap = RETRY_GAPS
            .get(self.step)
            .copied()
            .unwrap_or_else(|| RETRY_TAIL + Duration::from_micros(random.below(RETRY_JITTER.as_micros() as u64)));
        self.step += 1;
        self.next = now + gap;
    }

    /// The peer has begun a handshake itself: waits one more gap before our next attempt.
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
        let mut retry = RetrySchedule::from(start);
        let mut times = Vec::new();
        for _ in 0..20 {
            let at = retry.next();
            times.push((at - start).as_millis());
            retry.advance(at, &mut random);
        }

        assert_eq!(times[..7], [0, 100, 250, 500, 1000, 1500, 2000]);
        let last = times[19] - times[18];
        assert!((5000..5334).contains(&last), "{last}");
    }
}
