//! How often each address may do something: a few times at once, then at a steady rate (the generic cell rate
//! algorithm, ITU-T I.371 annex A).
//!
//! Memory is bounded. Addresses beyond the bound share one allowance, so that a crowd of them cannot make room for
//! itself by pushing others out.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Addresses that are counted one by one.
const MAX_ADDRESSES: usize = 10_000;
/// Between two searches for addresses that need no counting any more, while there is no room.
const SWEEP: Duration = Duration::from_secs(1);
/// The shared allowance of the others.
const SHARED_ADDRESS: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Counts what addresses do.
#[derive(Debug)]
pub struct RateLimit {
    /// One more is allowed after so long.
    interval: Duration,
    /// How far ahead of the steady rate an address may be.
    tolerance: Duration,
    /// When each address will have its whole allowance back.
    full_at: HashMap<IpAddr, Instant>,
    swept: Option<Instant>,
}

impl RateLimit {
    /// `burst` at once, and one more after each `interval`.
    #[must_use]
    pub fn new(burst: u32, interval: Duration) -> Self {
        let tolerance = interval * burst.saturating_sub(1);
        Self { interval, tolerance, full_at: HashMap::new(), swept: None }
    }

    /// Counts one for an address.
    ///
    /// # Errors
    ///
    /// When it has none left: how long until it has. Nothing is counted then.
    pub fn take(&mut self, now: Instant, address: IpAddr) -> Result<(), Duration> {
        let address = self.counted(now, address);
        let full_at = self.full_at.get(&address).copied().unwrap_or(now).max(now);
        match full_at.saturating_duration_since(now).saturating_sub(self.tolerance) {
            Duration::ZERO => {
                self.full_at.insert(address, full_at + self.interval);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// Takes one back that was counted for an address.
    pub fn give_back(&mut self, address: IpAddr) {
        let address = if self.full_at.contains_key(&address) { address } else { SHARED_ADDRESS };
        if let Some(full_at) = self.full_at.get_mut(&address) {
            *full_at = full_at.checked_sub(self.interval).unwrap_or(*full_at);
        }
    }

    /// What an address is counted as.
    fn counted(&mut self, now: Instant, address: IpAddr) -> IpAddr {
        if self.full_at.contains_key(&address) || self.full_at.len() < MAX_ADDRESSES {
            return address;
        }
        if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.full_at.retain(|_, full| *full > now);
        }
        if self.full_at.len() < MAX_ADDRESSES { address } else { SHARED_ADDRESS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(number).into()
    }

    #[test]
    fn a_burst_is_allowed_and_then_a_steady_rate_for_each_address() {
        let mut limit = RateLimit::new(3, Duration::from_secs(6));
        let start = Instant::now();
        for _ in 0..3 {
            limit.take(start, address(1)).expect("within the burst");
        }
        assert_eq!(limit.take(start, address(1)), Err(Duration::from_secs(6)));
        assert_eq!(limit.take(start + Duration::from_secs(5), address(1)), Err(Duration::from_secs(1)));
        assert_eq!(limit.take(start, address(2)), Ok(()), "others are not concerned");
        assert_eq!(limit.take(start + Duration::from_secs(6), address(1)), Ok(()));
        assert!(limit.take(start + Duration::from_secs(6), address(1)).is_err());
        limit.give_back(address(1));
        assert_eq!(limit.take(start + Duration::from_secs(6), address(1)), Ok(()));
        let later = start + Duration::from_secs(60);
        assert!((0..3).all(|_| limit.take(later, address(1)).is_ok()), "rest gives the burst back");
    }

    #[test]
    fn a_crowd_of_addresses_takes_bounded_memory_and_shares_an_allowance() {
        let mut limit = RateLimit::new(2, Duration::from_secs(6));
        let start = Instant::now();
        let crowd = MAX_ADDRESSES as u32 * 3;
        let admitted = (0..crowd).filter(|number| limit.take(start, address(*number)).is_ok()).count();
        assert_eq!(admitted, MAX_ADDRESSES + 2);
        assert_eq!(limit.full_at.len(), MAX_ADDRESSES + 1);
        assert_eq!(limit.take(start + Duration::from_secs(13), address(crowd)), Ok(()), "room comes back");
        assert_eq!(limit.full_at.len(), 1);
    }
}
