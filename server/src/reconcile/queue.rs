//! Which weaver is worked on next.
//!
//! Work on a weaver is mostly waiting: for a registry, the API server, a program that does not want to end. So each
//! organisation has a few places for each kind of wait, and none of one organisation's waits takes a place from another
//! organisation, or from another kind.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use loom_api::{OrgId, WeaverId};
use tokio::time::Instant;

/// Weavers of one lane that are worked on at the same time.
const MAX_CONCURRENT: usize = 8;

/// What a weaver's next step waits for, as far as one can tell before it is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// The image's registry, and then the backend.
    Starting,
    /// The backend: it is to be looked at.
    Running,
    /// The end of its processes.
    Ending,
}

/// The weavers that wait for the same places; those without a row have no organisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane {
    pub organisation: Option<OrgId>,
    pub stage: Stage,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// For later.
    due: BTreeSet<(Instant, WeaverId)>,
    lanes: HashMap<Lane, Waiting>,
    /// The lane that each one waits in.
    waiting: HashMap<WeaverId, Lane>,
    working: HashMap<WeaverId, Lane>,
    /// Those that were rung for while they were worked on.
    again: HashSet<WeaverId>,
}

#[derive(Debug, Default)]
struct Waiting {
    weavers: VecDeque<(Instant, WeaverId)>,
    busy: usize,
}

impl Queue {
    /// Puts a weaver aside until `at`.
    pub(super) fn later(&mut self, at: Instant, weaver: WeaverId) {
        self.due.insert((at, weaver));
    }

    /// Lines a weaver up, unless it is in line; if it is being worked on, it is looked at again afterwards. One that has
    /// ended while it waited for its start does not wait for other starts any more.
    pub(super) fn push(&mut self, now: Instant, weaver: WeaverId, lane: Lane) {
        if self.working.contains_key(&weaver) {
            self.again.insert(weaver);
            return;
        }
        match self.waiting.insert(weaver, lane) {
            Some(before) if before == lane => return,
            Some(before) => {
                if let Some(waiting) = self.lanes.get_mut(&before) {
                    waiting.weavers.retain(|(_, other)| *other != weaver);
                    self.remove_if_empty(before);
                }
            }
            None => {}
        }
        self.lanes.entry(lane).or_default().weavers.push_back((now, weaver));
    }

    /// A weaver whose time has come.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<WeaverId> {
        self.due.first().filter(|(at, _)| *at <= now)?;
        self.due.pop_first().map(|(_, weaver)| weaver)
    }

    /// When the next one's time comes.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// A weaver to work on, and since when it has waited.
    pub(super) fn start(&mut self) -> Option<(WeaverId, Instant)> {
        let free = self.lanes.iter_mut().find(|(_, lane)| lane.busy < MAX_CONCURRENT && !lane.weavers.is_empty());
        let (lane, waiting) = free?;
        let (since, weaver) = waiting.weavers.pop_front()?;
        waiting.busy += 1;
        self.waiting.remove(&weaver);
        self.working.insert(weaver, *lane);
        Some((weaver, since))
    }

    /// Work on a weaver is over; whether it must be looked at again.
    pub(super) fn done(&mut self, weaver: WeaverId) -> bool {
        if let Some(lane) = self.working.remove(&weaver)
            && let Some(waiting) = self.lanes.get_mut(&lane)
        {
            waiting.busy -= 1;
            self.remove_if_empty(lane);
        }
        self.again.remove(&weaver)
    }

    fn remove_if_empty(&mut self, lane: Lane) {
        if self.lanes.get(&lane).is_some_and(|waiting| waiting.busy == 0 && waiting.weavers.is_empty()) {
            self.lanes.remove(&lane);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn lane(organisation: OrgId, stage: Stage) -> Lane {
        Lane { organisation: Some(organisation), stage }
    }

    #[test]
    fn one_organisation_s_stubborn_removals_keep_no_other_start_waiting() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let (stubborn, other) = (OrgId::generate(), OrgId::generate());
        for _ in 0..40 {
            queue.push(now, WeaverId::generate(), lane(stubborn, Stage::Ending));
        }
        let busy = std::iter::from_fn(|| queue.start()).count();
        assert_eq!(busy, MAX_CONCURRENT);
        for organisation in [stubborn, other] {
            let weaver = WeaverId::generate();
            queue.push(now, weaver, lane(organisation, Stage::Starting));
            assert_eq!(queue.start().map(|(next, _)| next), Some(weaver));
        }
    }

    #[test]
    fn one_that_ends_while_it_waits_for_its_start_does_not_wait_for_other_starts() {
        let (mut queue, now, organisation) = (Queue::default(), Instant::now(), OrgId::generate());
        let weavers: Vec<_> = std::iter::repeat_with(WeaverId::generate).take(MAX_CONCURRENT + 2).collect();
        for weaver in &weavers {
            queue.push(now, *weaver, lane(organisation, Stage::Starting));
        }
        assert_eq!(std::iter::from_fn(|| queue.start()).count(), MAX_CONCURRENT);
        let [ended, next] = [weavers[MAX_CONCURRENT], weavers[MAX_CONCURRENT + 1]];
        queue.push(now, ended, lane(organisation, Stage::Ending));
        assert_eq!(queue.start().map(|(weaver, _)| weaver), Some(ended));
        assert!(queue.start().is_none());
        queue.done(weavers[0]);
        assert_eq!(queue.start().map(|(weaver, _)| weaver), Some(next), "and nothing is left of it there");
    }

    #[test]
    fn a_weaver_is_worked_on_once_at_a_time_and_again_when_it_was_rung_for() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let (weaver, lane) = (WeaverId::generate(), lane(OrgId::generate(), Stage::Starting));
        queue.push(now, weaver, lane);
        queue.push(now, weaver, lane);
        assert!(queue.start().is_some() && queue.start().is_none());
        queue.push(now, weaver, lane);
        assert!(queue.start().is_none());
        assert!(queue.done(weaver) && !queue.done(weaver));
        assert!(queue.lanes.is_empty() && queue.working.is_empty(), "nothing is kept of it");
    }

    #[test]
    fn what_is_put_aside_comes_at_its_time() {
        let (mut queue, now, weaver) = (Queue::default(), Instant::now(), WeaverId::generate());
        queue.later(now + Duration::from_secs(1), weaver);
        assert_eq!(queue.pop_due(now), None);
        assert_eq!(queue.next_due(), Some(now + Duration::from_secs(1)));
        assert_eq!(queue.pop_due(now + Duration::from_secs(1)), Some(weaver));
    }
}
