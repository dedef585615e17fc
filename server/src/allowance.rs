//! How much each weaver's agent may still ask of the server.
//!
//! An allowance belongs to the weaver and not to a link, so that an agent gains nothing by connecting again.

use std::{collections::HashMap, time::Duration};

use loom_api::WeaverId;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Messages of an agent that are read at once. A start takes about ten.
const BURST: f64 = 100.0;
/// Messages of an agent that are read each second in the long run.
const PER_SECOND: f64 = 2.0;

/// The allowances of the weavers whose agents have connected since the server's start.
#[derive(Default)]
pub struct Allowances(Mutex<HashMap<WeaverId, Allowance>>);

impl Allowances {
    /// Takes the cost of a request, or returns false if the agent has to come back later.
    pub fn take(&self, weaver: WeaverId, cost: u32) -> bool {
        let now = Instant::now();
        let mut all = self.0.lock();
        let allowance = all.entry(weaver).or_insert_with(|| Allowance::new(now));
        let allowed = allowance.pause(now).is_zero();
        if allowed {
            allowance.spend(cost);
        }
        allowed
    }

    /// How long nothing more is read from an agent.
    pub fn pause(&self, weaver: WeaverId) -> Duration {
        let now = Instant::now();
        self.0.lock().get_mut(&weaver).map_or(Duration::ZERO, |allowance| allowance.pause(now))
    }

    /// Takes what a message has cost.
    pub fn spend(&self, weaver: WeaverId, cost: u32) {
        if let Some(allowance) = self.0.lock().get_mut(&weaver) {
            allowance.spend(cost);
        }
    }

    /// Forgets a weaver that has ended.
    pub fn forget(&self, weaver: WeaverId) {
        self.0.lock().remove(&weaver);
    }
}

/// [`BURST`] messages at once, and [`PER_SECOND`] in the long run.
struct Allowance {
    left: f64,
    at: Instant,
}

impl Allowance {
    const fn new(now: Instant) -> Self {
        Self { left: BURST, at: now }
    }

    fn spend(&mut self, cost: u32) {
        self.left -= f64::from(cost);
    }

    /// How long nothing more is read.
    fn pause(&mut self, now: Instant) -> Duration {
        let earned = now.saturating_duration_since(self.at).as_secs_f64() * PER_SECOND;
        self.left = (self.left + earned).min(BURST);
        self.at = now;
        if self.left >= 1.0 { Duration::ZERO } else { Duration::from_secs_f64((1.0 - self.left) / PER_SECOND) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_says_too_much_is_read_more_slowly() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        let mut said = 0;
        while allowance.pause(start).is_zero() {
            allowance.spend(1);
            said += 1;
        }
        assert_eq!(f64::from(said), BURST);
        let pause = allowance.pause(start);
        assert!(pause > Duration::ZERO && allowance.pause(start + pause * 2).is_zero());
        allowance.spend(0);
        assert!(allowance.pause(start + pause * 2).is_zero(), "what costs nothing is never refused");
    }

    #[test]
    fn connecting_again_brings_no_new_allowance() {
        let (allowances, weaver) = (Allowances::default(), WeaverId::generate());
        let links = (0..1000).take_while(|_| allowances.take(weaver, 2)).count();
        assert_eq!(links, 50);
        assert!(!allowances.pause(weaver).is_zero());
        assert!(allowances.take(WeaverId::generate(), 2), "another weaver has its own");
        allowances.forget(weaver);
        assert!(allowances.0.lock().len() == 1, "nothing is kept of one that has ended");
    }
}
