//! What each address may do about device logins.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::rate_limit::RateLimit;

/// Logins that an address may begin at once, and how soon another one.
const STARTS: (u32, Duration) = (20, Duration::from_secs(3));
/// Wrong codes and tokens that an address may send at once, and how soon another one.
const FAILURES: (u32, Duration) = (10, Duration::from_secs(6));

pub struct DeviceLimits {
    starts: Mutex<RateLimit>,
    failures: Mutex<RateLimit>,
}

impl Default for DeviceLimits {
    fn default() -> Self {
        let limit = |(burst, interval)| Mutex::new(RateLimit::new(burst, interval));
        Self { starts: limit(STARTS), failures: limit(FAILURES) }
    }
}

impl DeviceLimits {
    /// Counts a login that an address begins, or says how long it has to wait.
    pub fn start(&self, address: IpAddr) -> Result<(), Duration> {
        self.starts.lock().take(Instant::now(), address)
    }

    /// Counts a code and a token as wrong before they are looked at, or says how long the address has to wait.
    pub fn attempt(&self, address: IpAddr) -> Result<(), Duration> {
        self.failures.lock().take(Instant::now(), address)
    }

    /// They were right.
    pub fn succeeded(&self, address: IpAddr) {
        self.failures.lock().give_back(address);
    }
}
