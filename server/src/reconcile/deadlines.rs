//! Ends weavers when their time is up, on the second, and warns before.
//!
//! Deadlines are rows', absolute; what is kept here is a copy that says when to look next. One weaver's is read again
//! when it was created or extended, and all of them at every sweep, which catches what was missed.

use std::{collections::HashMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use loom_api::{WeaverId, weaver::EventKind};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::Reconciler;
use crate::{store::Deadline, weaver::Event};

/// Before the end, when people are warned; the last first.
const WARNINGS: [SignedDuration; 3] =
    [SignedDuration::from_mins(1), SignedDuration::from_mins(5), SignedDuration::from_mins(15)];
/// How long an ended weaver's events and output are kept.
const RETENTION: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Before an end that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// No deadline is waited for more finely than this.
const MIN_WAIT: Duration = Duration::from_millis(10);

/// The weavers that live, as far as is known here.
pub struct Deadlines {
    reconciler: Reconciler,
    /// Weavers whose deadline is new.
    changed: mpsc::Receiver<WeaverId>,
    sweep_interval: Duration,
    known: HashMap<WeaverId, Timed>,
}

struct Timed {
    deadline: Deadline,
    /// The threshold that was warned of last.
    warned: Option<SignedDuration>,
}

impl Deadlines {
    pub fn new(reconciler: Reconciler, changed: mpsc::Receiver<WeaverId>, sweep_interval: Duration) -> Self {
        Self { reconciler, changed, sweep_interval, known: HashMap::new() }
    }

    /// Works until it is dropped.
    pub async fn run(mut self) {
        let mut swept: Option<Instant> = None;
        loop {
            if swept.is_none_or(|at| at.elapsed() >= self.sweep_interval) {
                swept = Some(Instant::now());
                if let Err(error) = self.sweep().await {
                    tracing::error!("the sweep failed and is repeated in {:?}: {error:#}", self.sweep_interval);
                }
            }
            let until_sweep = self.sweep_interval.saturating_sub(swept.map_or(Duration::ZERO, |at| at.elapsed()));
            let wait = self.act().await.min(until_sweep).max(MIN_WAIT);
            match timeout(wait, self.changed.recv()).await {
                Ok(Some(weaver)) => self.read(weaver).await,
                Ok(None) => return,
                Err(_) => {}
            }
        }
    }

    /// Reads all deadlines, and forgets what is too old.
    async fn sweep(&mut self) -> anyhow::Result<()> {
        let live = self.reconciler.store.deadlines().await?;
        let mut before = std::mem::take(&mut self.known);
        self.known = live
            .into_iter()
            .map(|deadline| {
                let warned = before.remove(&deadline.weaver).and_then(|timed| timed.warned);
                (deadline.weaver, Timed { deadline, warned })
            })
            .collect();
        self.reconciler.store.forget_ended(Timestamp::now() - RETENTION).await?;
        self.reconciler.admission.forget_unused().await?;
        Ok(())
    }

    async fn read(&mut self, weaver: WeaverId) {
        match self.reconciler.store.weaver(weaver).await {
            Ok(Some(row)) if !row.has_ended() => {
                let deadline = Deadline { weaver, created_at: row.created_at, expires_at: row.expires_at };
                let warned = self.known.remove(&weaver).and_then(|timed| timed.warned);
                self.known.insert(weaver, Timed { deadline, warned });
            }
            Ok(_) => drop(self.known.remove(&weaver)),
            // The next sweep reads it.
            Err(error) => tracing::error!(%weaver, "its deadline cannot be read: {error}"),
        }
    }

    /// Ends and warns what is due; how long until the next is.
    async fn act(&mut self) -> Duration {
        let now = Timestamp::now();
        let due: Vec<_> = self.known.values().map(|timed| timed.deadline).filter(|it| it.expires_at <= now).collect();
        let mut next = self.sweep_interval;
        for Deadline { weaver, .. } in due {
            match self.reconciler.expire(weaver).await {
                Ok(()) => self.read(weaver).await,
                Err(error) => {
                    tracing::error!(%weaver, "it should have ended by now, and is tried again in {RETRY:?}: {error:#}");
                    next = next.min(RETRY);
                }
            }
        }
        let mut warnings = Vec::new();
        for timed in self.known.values_mut() {
            let left = timed.deadline.expires_at.duration_since(now);
            if !left.is_positive() {
                continue; // its end failed
            }
            if let Some(minutes) = timed.next_warning(left) {
                let message = format!("it ends in {minutes} min, at {}", timed.deadline.expires_at);
                warnings.push((timed.deadline.weaver, Event::new(EventKind::Expiring, message)));
            }
            let until =
                WARNINGS.iter().map(|before| left - *before).filter(|until| until.is_positive()).min().unwrap_or(left);
            next = next.min(until.unsigned_abs());
        }
        for (weaver, warning) in warnings {
            self.reconciler.events.write(weaver, warning).await;
        }
        next
    }
}

impl Timed {
    /// Each threshold is warned of once, by its minutes. A weaver created or extended inside one gets no warning for it.
    fn next_warning(&mut self, left: SignedDuration) -> Option<i64> {
        let lifetime = self.deadline.expires_at.duration_since(self.deadline.created_at);
        let Some(threshold) = WARNINGS.into_iter().find(|threshold| left <= *threshold) else {
            self.warned = None;
            return None;
        };
        if lifetime <= threshold || self.warned == Some(threshold) {
            return None;
        }
        self.warned = Some(threshold);
        Some(threshold.as_mins())
    }
}
