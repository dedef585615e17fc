//! Exponential backoff with jitter, from a tenth of a second to two seconds.

use std::time::Duration;

const MIN_WAIT: Duration = Duration::from_millis(100);
const MAX_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: MIN_WAIT }
    }
}

impl Backoff {
    /// Waits before the next try.
    pub(crate) async fn wait(&mut self) {
        let random = uuid::Uuid::new_v4().as_u128() as u32;
        tokio::time::sleep(self.step(random)).await;
    }

    /// Starts over with the shortest wait; to be called after a success.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Between half of the step and all of it, by `random`; the step then doubles.
    fn step(&mut self, random: u32) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(MAX_WAIT);
        step / 2 + (step / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_two_seconds_and_start_over() {
        let mut backoff = Backoff::default();
        let longest: Vec<u128> = (0..7).map(|_| backoff.step(u32::MAX).as_millis()).collect();
        assert_eq!(longest, [100, 200, 400, 800, 1600, 2000, 2000]);
        backoff.reset();
        assert_eq!(backoff.step(0).as_millis(), 50);
    }
}
