//! How long to wait before another try: from a tenth of a second to two, spread so that many clients do not come at
//! once.

use std::time::Duration;

/// The first wait.
const FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(2);

/// Waits that grow until something works again.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// Waits before the next try.
    pub(crate) async fn wait(&mut self) {
        let random = uuid::Uuid::new_v4().as_u128() as u32;
        tokio::time::sleep(self.step(random)).await;
    }

    /// Starts over with the shortest wait, after a success.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Between half of the step and all of it, by `random`; the step then doubles.
    fn step(&mut self, random: u32) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(LONGEST);
        step / 2 + (step / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_two_seconds_and_begin_anew() {
        let mut backoff = Backoff::default();
        let longest: Vec<u128> = (0..7).map(|_| backoff.step(u32::MAX).as_millis()).collect();
        assert_eq!(longest, [100, 200, 400, 800, 1600, 2000, 2000]);
        backoff.reset();
        assert_eq!(backoff.step(0).as_millis(), 50);
    }
}
