//! Which of two working paths is better.
//!
//! Direct beats relayed, whatever the round trips: the relay's capacity is shared, and its TCP adds stalls that pings do
//! not show. Otherwise the round trip decides, with hysteresis, so that noise does not move the data; initially IPv6
//! breaks ties, because it has no NAT mapping to lose.

use std::{cmp::Ordering, time::Duration};

use super::PathKind;

/// The properties of a working path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Score {
    pub(crate) kind: PathKind,
    pub(crate) rtt: Option<Duration>,
}

/// A challenger must be faster by this much at least…
pub const HYSTERESIS: Duration = Duration::from_millis(10);

/// …and by this part of the incumbent's round trip, one fifth.
pub const HYSTERESIS_PART: u32 = 5;

/// An order for the first choice: the best first.
pub(crate) fn compare(a: &Score, b: &Score) -> Ordering {
    let key = |score: &Score| {
        let ipv4 = matches!(score.kind, PathKind::Direct(address) if address.is_ipv4());
        (score.kind == PathKind::Relay, score.rtt.unwrap_or(Duration::MAX), ipv4)
    };
    key(a).cmp(&key(b))
}

/// Whether the challenger is so much better that data should move over.
pub(crate) fn beats(challenger: &Score, incumbent: &Score) -> bool {
    match (challenger.kind, incumbent.kind) {
        (PathKind::Direct(_), PathKind::Relay) => true,
        (PathKind::Relay, _) => false,
        (PathKind::Direct(_), PathKind::Direct(_)) => match (challenger.rtt, incumbent.rtt) {
            (Some(new), Some(old)) => new + HYSTERESIS.max(old / HYSTERESIS_PART) <= old,
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direct(rtt: u64) -> Score {
        Score { kind: PathKind::Direct(([10, 0, 0, 1], 1).into()), rtt: Some(Duration::from_millis(rtt)) }
    }

    fn relay(rtt: u64) -> Score {
        Score { kind: PathKind::Relay, rtt: Some(Duration::from_millis(rtt)) }
    }

    #[test]
    fn direct_beats_the_relay_whatever_the_round_trips() {
        assert!(beats(&direct(300), &relay(5)));
        assert!(!beats(&relay(5), &direct(300)));
        assert_eq!(compare(&direct(300), &relay(5)), Ordering::Less);
    }

    #[test]
    fn small_gains_move_nothing() {
        for (new, old, moves) in [(5, 14, false), (5, 15, true), (85, 100, false), (80, 100, true), (170, 200, false)] {
            assert_eq!(beats(&direct(new), &direct(old)), moves, "{new} ms against {old} ms");
        }
    }

    #[test]
    fn no_two_paths_beat_each_other() {
        let all: Vec<Score> = (0..60).map(|n| if n % 7 == 0 { relay(n) } else { direct(n * 5) }).collect();
        for a in &all {
            for b in &all {
                assert!(!(beats(a, b) && beats(b, a)), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn ipv6_breaks_the_tie() {
        let v6 = Score { kind: PathKind::Direct("[fd00::1]:1".parse().expect("an address")), ..direct(5) };

        assert_eq!(compare(&v6, &direct(5)), Ordering::Less);
    }
}
