//! When a path is pinged, and what the answers say about it.
//!
//! A prober **seeks** an answer, in a burst that turns into a slow search, until a pong arrives; then it is **steady**
//! and pings at a pace that depends on the path's use. In both states a ping without an answer within
//! [`Prober::pong_timeout`] counts as lost; any pong resets the count. One lost ping makes a path *suspect* and is
//! followed by the next at once; [`LOST_PINGS`] in a row make it *lost*.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Gaps between the first pings: at 0, 50, 100, 200 and 500 ms. The first one or two open NAT mappings on both sides
/// (RFC 4787 §4.1), those after them get through.
pub const BURST_GAPS: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(50), Duration::from_millis(100), Duration::from_millis(300)];

/// The gap after the burst.
pub const SEEK_GAP: Duration = Duration::from_secs(1);

/// The number of such gaps before they double: a path that works at all usually works soon.
pub const SEEK_STEPS: u32 = 10;

/// A path that never works costs two packets a minute.
pub const MAX_SEEK_GAP: Duration = Duration::from_secs(30);

/// The pace on the path that carries data: with [`SUSPECT_GAP`] and [`LOST_PINGS`], data leaves a dead path within 2 s
/// at round trips up to 200 ms.
pub const BUSY_GAP: Duration = Duration::from_millis(500);

/// The pace on the chosen path while no data flows; below the 30 s that NAT mappings last in practice (RFC 4787 §4.3
/// requires 2 minutes, but many devices have less).
pub const IDLE_GAP: Duration = Duration::from_secs(15);

/// The pace on the other paths: keeps NAT mappings and knowledge fresh.
pub const STANDBY_GAP: Duration = Duration::from_secs(25);

/// The gap once a ping was lost.
pub const SUSPECT_GAP: Duration = Duration::from_millis(250);

/// A path is lost after so many lost pings in a row. Three, because one or two are lost by chance: at 10 % loss each way
/// once in 150 pings.
pub const LOST_PINGS: u32 = 3;

/// Minimum and maximum: the timeout is three round trips, but longer than a scheduling delay and no longer than users
/// tolerate. While no round trip is known it is the maximum.
pub const PONG_TIMEOUT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(1));

/// Pings remembered, so that a late pong still counts.
const REMEMBERED: usize = 8;

/// How a path is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// It carries data now.
    Busy,
    /// It is the chosen path, but no data flows.
    Idle,
    /// Another path is preferred.
    Standby,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No pings.
    Off,
    /// `step` pings were not answered; the next is due at `next`.
    Seeking { step: u32, next: Instant },
    /// Pings are answered.
    Steady,
}

struct Ping {
    sequence: u32,
    sent: Instant,
    lost: bool,
}

/// The prober of one path.
pub(crate) struct Prober {
    phase: Phase,
    sequence: u32,
    pings: VecDeque<Ping>,
    lost: u32,
    last_sent: Option<Instant>,
    hurried: Option<Instant>,
    last_rtt: Option<Duration>,
    smoothed_rtt: Option<Duration>,
}

impl Prober {
    pub(crate) fn new() -> Self {
        Self {
            phase: Phase::Off,
            sequence: 0,
            pings: VecDeque::with_capacity(REMEMBERED),
            lost: 0,
            last_sent: None,
            hurried: None,
            last_rtt: None,
            smoothed_rtt: None,
        }
    }

    /// Begins a burst, in any state.
    pub(crate) fn seek(&mut self, now: Instant) {
        self.phase = Phase::Seeking { step: 0, next: now };
        self.hurried = None;
    }

    /// Begins a burst, unless one has begun or pings are answered already.
    pub(crate) fn start(&mut self, now: Instant) {
        if self.phase == Phase::Off {
            self.seek(now);
        }
    }

    /// Drops unanswered pings, because the peer had no keys to answer them with.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.pings.clear();
        self.lost = 0;
        match self.phase {
            Phase::Steady => self.ping_now(now),
            Phase::Seeking { .. } | Phase::Off => self.seek(now),
        }
    }

    /// Pings at once, unless that was just done.
    pub(crate) fn ping_now(&mut self, now: Instant) {
        if self.last_sent.is_some_and(|sent| now.saturating_duration_since(sent) < SUSPECT_GAP) {
            return;
        }
        match &mut self.phase {
            Phase::Off => {}
            Phase::Seeking { next, .. } => *next = now.min(*next),
            Phase::Steady => self.hurried = Some(now),
        }
    }

    /// Treats the path as if it had lost a ping, because something may have broken it.
    pub(crate) fn suspect(&mut self, now: Instant) {
        self.lost = self.lost.max(1);
        self.ping_now(now);
    }

    pub(crate) const fn is_suspect(&self) -> bool {
        self.lost > 0
    }

    pub(crate) const fn is_lost(&self) -> bool {
        self.lost >= LOST_PINGS
    }

    /// The last measured round trip; [`Self::smoothed_rtt`] is the one that decides.
    pub(crate) const fn last_rtt(&self) -> Option<Duration> {
        self.last_rtt
    }

    pub(crate) const fn smoothed_rtt(&self) -> Option<Duration> {
        self.smoothed_rtt
    }

    /// When [`Prober::ping`] or [`Prober::expire`] is due.
    pub(crate) fn next_timeout(&self, pace: Pace) -> Option<Instant> {
        let expiry = self.pings.iter().find(|ping| !ping.lost).map(|ping| ping.sent + self.pong_timeout());
        [self.next_ping(pace), expiry].into_iter().flatten().min()
    }

    /// The sequence number of the ping that is due, if one is.
    pub(crate) fn ping(&mut self, now: Instant, pace: Pace) -> Option<u32> {
        if self.next_ping(pace)? > now {
            return None;
        }
        if let Phase::Seeking { step, next } = &mut self.phase {
            *next = now + seek_gap(*step);
            *step += 1;
        }
        self.hurried = None;
        self.last_sent = Some(now);
        self.sequence = self.sequence.wrapping_add(1);
        if self.pings.len() == REMEMBERED {
            self.pings.pop_front();
        }
        self.pings.push_back(Ping { sequence: self.sequence, sent: now, lost: false });
        Some(self.sequence)
    }

    /// Counts the pings that have timed out. Returns whether there was one.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let pong_timeout = self.pong_timeout();
        let mut any = false;
        for ping in self.pings.iter_mut().filter(|ping| !ping.lost) {
            if now.saturating_duration_since(ping.sent) < pong_timeout {
                break;
            }
            ping.lost = true;
            self.lost = self.lost.saturating_add(1);
            any = true;
        }
        any
    }

    /// Processes a pong. Returns false if it answers no ping of ours.
    pub(crate) fn pong(&mut self, now: Instant, sequence: u32) -> bool {
        let Some(at) = self.pings.iter().position(|ping| ping.sequence == sequence) else {
            return false;
        };
        let rtt = now.saturating_duration_since(self.pings[at].sent);
        self.pings.drain(..=at);
        self.measured(rtt);
        self.lost = 0;
        self.phase = Phase::Steady;
        true
    }

    /// Records a round trip, measured by a ping or a handshake. Smoothed as in TCP (RFC 6298 §2.3).
    pub(crate) fn measured(&mut self, rtt: Duration) {
        self.last_rtt = Some(rtt);
        self.smoothed_rtt = Some(self.smoothed_rtt.map_or(rtt, |smoothed| (smoothed * 7 + rtt) / 8));
    }

    /// How long to wait for a pong.
    fn pong_timeout(&self) -> Duration {
        self.smoothed_rtt.map_or(PONG_TIMEOUT.1, |rtt| (rtt * 3).clamp(PONG_TIMEOUT.0, PONG_TIMEOUT.1))
    }

    /// When a ping is due at this pace.
    pub(crate) fn next_ping(&self, pace: Pace) -> Option<Instant> {
        let gap = match pace {
            _ if self.is_suspect() => SUSPECT_GAP,
            Pace::Busy => BUSY_GAP,
            Pace::Idle => IDLE_GAP,
            Pace::Standby => STANDBY_GAP,
        };
        match self.phase {
            Phase::Off => None,
            Phase::Seeking { next, .. } => Some(next),
            Phase::Steady => {
                let regular = self.last_sent.map(|sent| sent + gap);
                [regular, self.hurried].into_iter().flatten().min()
            }
        }
    }
}

/// The gap after the ping number `step`, counted from 0.
fn seek_gap(step: u32) -> Duration {
    if let Some(gap) = BURST_GAPS.get(step as usize) {
        return *gap;
    }
    let doublings = (step - BURST_GAPS.len() as u32).saturating_sub(SEEK_STEPS);
    SEEK_GAP.saturating_mul(1 << doublings.min(8)).min(MAX_SEEK_GAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the prober until `end` without any answer; the times of its pings.
    fn unanswered(prober: &mut Prober, start: Instant, pace: Pace, length: Duration) -> Vec<u64> {
        let mut times = Vec::new();
        while let Some(at) = prober.next_timeout(pace).filter(|at| *at <= start + length) {
            prober.expire(at);
            if prober.ping(at, pace).is_some() {
                times.push((at - start).as_millis() as u64);
            }
        }
        times
    }

    fn steady(start: Instant, rtt: Duration) -> Prober {
        let mut prober = Prober::new();
        prober.seek(start);
        let sequence = prober.ping(start, Pace::Busy).expect("a burst begins at once");
        assert!(prober.pong(start + rtt, sequence));
        prober
    }

    #[test]
    fn the_burst_turns_into_a_slow_search() {
        let start = Instant::now();
        let mut prober = Prober::new();
        prober.seek(start);

        let times = unanswered(&mut prober, start, Pace::Standby, Duration::from_secs(600));

        assert_eq!(times[..7], [0, 50, 100, 200, 500, 1500, 2500]);
        let gaps: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted());
        assert_eq!(gaps.last(), Some(&30_000));
        assert!(times.len() < 45, "{}", times.len());
    }

    #[test]
    fn a_dead_busy_path_is_lost_within_two_seconds_at_up_to_200_ms() {
        for rtt in [1, 20, 80, 200] {
            let start = Instant::now();
            let mut prober = steady(start, Duration::from_millis(rtt));
            // Dead from the moment of the last pong.
            let dead = start + Duration::from_millis(rtt);
            let mut at = dead;
            while !prober.is_lost() {
                at = prober.next_timeout(Pace::Busy).expect("a steady prober has a next step");
                prober.expire(at);
                prober.ping(at, Pace::Busy);
            }
            assert!(at - dead <= Duration::from_secs(2), "{rtt} ms: lost after {:?}", at - dead);
        }
    }

    #[test]
    fn a_late_pong_still_counts() {
        let start = Instant::now();
        let mut prober = steady(start, Duration::from_millis(10));
        let ping = start + BUSY_GAP;
        let sequence = prober.ping(ping, Pace::Busy).expect("due");
        assert!(prober.expire(ping + PONG_TIMEOUT.0));
        assert!(prober.is_suspect());

        assert!(prober.pong(ping + Duration::from_millis(400), sequence));

        assert!(!prober.is_suspect());
        assert!(!prober.pong(ping + Duration::from_millis(401), sequence), "only once");
    }

    #[test]
    fn the_pace_follows_the_use() {
        let start = Instant::now();
        let mut prober = steady(start, Duration::from_millis(10));

        assert_eq!(prober.next_timeout(Pace::Busy), Some(start + BUSY_GAP));
        assert_eq!(prober.next_timeout(Pace::Idle), Some(start + IDLE_GAP));
        assert_eq!(prober.next_timeout(Pace::Standby), Some(start + STANDBY_GAP));
        prober.ping_now(start + Duration::from_secs(1));
        assert_eq!(prober.next_timeout(Pace::Standby), Some(start + Duration::from_secs(1)));
    }
}
