//! Closes the difference between what should be (rows) and what is (pods), one weaver at a time.
//!
//! [`Reconciler::run`] looks at one weaver's row and pod and takes the next step, for each weaver that was woken, for
//! all of them at the start, and again after a while when it failed. A step may be taken at any time and again, and
//! remembers nothing. [`queue`] decides whose turn it is. [`Reconciler::end`] is the one way in which a weaver ends by
//! itself. [`deadlines`] ends those whose time is up.

pub mod deadlines;
pub mod queue;

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use loom_api::{WeaverId, weaver::EventKind};
use tokio::{
    sync::mpsc,
    task::{self, JoinError, JoinSet},
    time::{Instant, sleep_until},
};

use crate::{
    admission::Admission,
    agents::Hub,
    events::Events,
    fault,
    metrics::Metrics,
    provision::{PodPhase, PodSpec, ProvisionError, Provisioner},
    store::{Store, Transition},
    weaver::{Ending, Event, Unchanged, Weaver},
};
use queue::Queue;

/// Before the first new try after a failure; doubles to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Makes what is what should be. Cheap to clone.
#[derive(Clone)]
pub struct Reconciler(Arc<Parts>);

/// What it works with.
pub struct Parts {
    pub store: Store,
    pub provisioner: Arc<dyn Provisioner>,
    pub events: Events,
    pub admission: Arc<Admission>,
    pub agents: Arc<Hub>,
    pub metrics: Arc<Metrics>,
    /// Where weavers that must be looked at are named; the backend names them there, too.
    pub wakeups: mpsc::Sender<WeaverId>,
    /// Where weavers are named whose deadline is new.
    pub deadlines: mpsc::Sender<WeaverId>,
}

/// What a task of [`Reconciler::run`] does.
#[derive(Debug, Clone, Copy)]
enum Job {
    /// The next step of one weaver.
    Step(WeaverId),
    /// Finding every weaver that there is.
    Listing,
}

/// What [`Reconciler::run`] has to do.
#[derive(Default)]
struct Work {
    queue: Queue,
    failures: Failures,
    /// A listing gives what it has found.
    tasks: JoinSet<Result<Vec<WeaverId>>>,
    /// What each task does: one that panics cannot say so itself.
    jobs: HashMap<task::Id, Job>,
    /// When everything is to be listed, if it is.
    list_at: Option<Instant>,
}

impl std::ops::Deref for Reconciler {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl Reconciler {
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// Has a weaver looked at.
    pub async fn wake(&self, weaver: WeaverId) {
        // Nobody listens only when the server stops; the next one looks at everything.
        let _ = self.wakeups.send(weaver).await;
    }

    /// Works until it is dropped: on every weaver that is named in `wakeups`, and on all at the start.
    pub async fn run(self, mut wakeups: mpsc::Receiver<WeaverId>) {
        let mut work = Work { list_at: Some(Instant::now()), ..Work::default() };
        loop {
            self.begin_due(&mut work).await;
            let next = [work.queue.next_due(), work.list_at].into_iter().flatten().min();
            tokio::select! {
                woken = wakeups.recv() => match woken {
                    Some(weaver) => work.queue.push(Instant::now(), weaver, self.store.lane(weaver).await),
                    None => return,
                },
                Some(ended) = work.tasks.join_next_with_id() => self.task_ended(&mut work, ended),
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    /// Begins all that there is time and place for.
    async fn begin_due(&self, work: &mut Work) {
        let now = Instant::now();
        while let Some(weaver) = work.queue.pop_due(now) {
            work.queue.push(now, weaver, self.store.lane(weaver).await);
        }
        while let Some((weaver, since)) = work.queue.start() {
            self.metrics.reconcile_lag.observe(since.elapsed().as_secs_f64());
            let this = self.clone();
            let task = work.tasks.spawn(async move { this.step(weaver).await.map(|()| Vec::new()) });
            work.jobs.insert(task.id(), Job::Step(weaver));
        }
        if work.list_at.take_if(|at| *at <= now).is_some() {
            let this = self.clone();
            let task = work.tasks.spawn(async move { this.everything().await });
            work.jobs.insert(task.id(), Job::Listing);
        }
    }

    fn task_ended(&self, work: &mut Work, ended: Result<(task::Id, Result<Vec<WeaverId>>), JoinError>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result),
            Err(error) => {
                self.metrics.panics.inc();
                (error.id(), Err(error).context("a fault of the server's own"))
            }
        };
        let now = Instant::now();
        match (work.jobs.remove(&id), result) {
            (Some(Job::Step(weaver)), result) => {
                if work.queue.done(weaver) {
                    work.queue.later(now, weaver);
                }
                let Err(error) = result else { return work.failures.forget(weaver) };
                let wait = work.failures.next_wait(weaver);
                self.metrics.reconcile_failures.inc();
                tracing::warn!(%weaver, "tried again in {wait:?}: {error:#}");
                work.queue.later(now + wait, weaver);
            }
            (Some(Job::Listing), Ok(all)) => {
                for weaver in all {
                    work.queue.later(now, weaver);
                }
            }
            (Some(Job::Listing), Err(error)) => {
                tracing::error!("what exists is listed again in {MAX_BACKOFF:?}: {error:#}");
                work.list_at = Some(now + MAX_BACKOFF);
            }
            (None, _) => {}
        }
    }

    /// Every weaver that has not ended, or has a pod.
    async fn everything(&self) -> Result<Vec<WeaverId>> {
        let mut all = self.store.live_weavers().await.context("listing the weavers")?;
        // What is known of is looked at already, even when the backend does not answer yet.
        for weaver in &all {
            self.wake(*weaver).await;
        }
        all.extend(self.provisioner.list().await.context("listing the pods")?);
        Ok(all)
    }

    /// Takes the next step for one weaver.
    async fn step(&self, weaver: WeaverId) -> Result<()> {
        let row = self.store.weaver(weaver).await?;
        if row.as_ref().is_some_and(Weaver::has_ended) {
            // Also when whoever ended it did not come so far.
            self.admission.end(weaver).await?;
        }
        let Some(row) = row.filter(|row| !row.has_ended()) else {
            // Deleted, ended, or never ours: there must be nothing. The agent may report until its pod is gone:
            // without a link it would wait for one.
            let gone = self.provisioner.remove(weaver).await?;
            fault::point("pod-removed");
            if gone {
                self.agents.end(weaver);
            }
            return Ok(());
        };
        let pod = match self.provisioner.observe(weaver).await {
            Ok(pod) => pod,
            Err(error) => return self.later(&row, "it is not known how its pod is", error).await,
        };
        match pod {
            None if row.agent.is_some() => {
                let reason = "its pod is gone: it was removed from outside of Loom".to_owned();
                self.end(weaver, Ending::Failed { reason }).await
            }
            None => self.make(&row).await,
            Some(pod) if pod.is_leaving && !pod.phase.is_final() => {
                let reason = pod.reason.unwrap_or_else(|| "its pod is being removed from outside of Loom".to_owned());
                self.end(weaver, Ending::Failed { reason }).await
            }
            Some(pod) => match (pod.phase, pod.exit_code) {
                (phase @ (PodPhase::Pending | PodPhase::Running), _) => {
                    if let Some(reason) = pod.reason.filter(|_| phase == PodPhase::Pending) {
                        self.note(&row, &reason).await?;
                    }
                    // Also when it is there: so that it is watched.
                    Ok(self.provisioner.ensure(&pod_spec(&row)).await?)
                }
                (_, Some(code)) if pod.reason.is_none() => {
                    self.end(weaver, Ending::Exited { code, out_of_memory: false }).await
                }
                (_, _) => {
                    let reason = pod.reason.unwrap_or_else(|| "its pod failed".to_owned());
                    self.end(weaver, Ending::Failed { reason }).await
                }
            },
        }
    }

    async fn make(&self, row: &Weaver) -> Result<()> {
        if row.resolved.is_none() && !self.resolve(row).await? {
            // Its row was changed, which is looked at anew.
            self.wake(row.id).await;
            return Ok(());
        }
        match self.provisioner.ensure(&pod_spec(row)).await {
            Ok(()) => {
                fault::point("pod-made");
                self.events.write(row.id, Event::new(EventKind::Started, "its processes have been started")).await;
                // It may have been deleted while it was made; then it has to go again.
                self.wake(row.id).await;
                Ok(())
            }
            Err(ProvisionError::Refused(reason)) => self.end(row.id, Ending::Failed { reason }).await,
            Err(error) => self.later(row, "it cannot be started yet", error).await,
        }
    }

    /// Says why the next step of a weaver that is being made has to wait, and fails with that.
    async fn later(&self, row: &Weaver, what: &str, error: ProvisionError) -> Result<()> {
        // One that runs has nothing to wait for.
        if row.agent.is_none() {
            self.note(row, &format!("{what}: {error}")).await?;
        }
        Err(error.into())
    }

    /// Finds out what the image is, and writes it down before there is a pod: what a weaver runs must not change with the
    /// image's name. Whether the pod can be made from the row as it is.
    async fn resolve(&self, row: &Weaver) -> Result<bool> {
        let image = match self.provisioner.resolve(&row.image).await {
            Ok(Some(image)) => image,
            Ok(None) => return Ok(true),
            // Then the image need not say what it runs; whether there is one, the node will see.
            Err(ProvisionError::Refused(reason)) if row.command.is_some() => {
                tracing::info!(weaver = %row.id, "its image is not pinned: {reason}");
                return Ok(true);
            }
            Err(ProvisionError::Refused(reason)) => {
                self.end(row.id, Ending::Failed { reason }).await?;
                return Ok(false);
            }
            Err(error) => return self.later(row, "its image is not known yet", error).await.map(|()| false),
        };
        if row.command.is_none() && image.command.is_empty() {
            let reason = format!("the image {} names no program to run: give one, with loom new … -- CMD", row.image);
            self.end(row.id, Ending::Failed { reason }).await?;
            return Ok(false);
        }
        // One that has ended meanwhile is cleaned up by whoever ended it.
        self.store.transition(row.id, |row| row.image_resolved(&image).map(|()| None)).await?;
        fault::point("image-pinned");
        Ok(false)
    }

    /// Says why a weaver is not there yet, once for each reason.
    async fn note(&self, row: &Weaver, reason: &str) -> Result<()> {
        if row.life.reason() != Some(reason) {
            self.transition(row.id, |row| row.waits(reason)).await?;
        }
        Ok(())
    }

    /// A weaver has been recorded: tells of it, and has it made.
    pub async fn added(&self, weaver: WeaverId, event: &Event) {
        self.events.announce(weaver, event);
        self.wake(weaver).await;
        self.time(weaver).await;
    }

    /// The deadline of a weaver has been moved.
    pub async fn extended(&self, weaver: WeaverId, event: Option<Event>) {
        if let Some(event) = event {
            self.events.announce(weaver, &event);
        }
        self.time(weaver).await;
    }

    async fn time(&self, weaver: WeaverId) {
        // Nobody listens only when the server stops; the next one reads every deadline.
        let _ = self.deadlines.send(weaver).await;
    }

    /// A weaver's main program runs.
    pub async fn ran(&self, weaver: WeaverId) -> Result<()> {
        self.transition(weaver, Weaver::ran).await?;
        Ok(())
    }

    /// Ends a weaver, once: later ends of the same weaver change nothing.
    pub async fn end(&self, weaver: WeaverId, ending: Ending) -> Result<()> {
        if self.transition(weaver, |row| row.ended(Timestamp::now(), &ending)).await? {
            self.clean_up(weaver).await?;
        }
        Ok(())
    }

    /// Ends a weaver because a user says so, or hides one that has ended.
    pub async fn delete(&self, weaver: WeaverId, user: &str) -> Result<()> {
        self.transition(weaver, |row| row.deleted(Timestamp::now(), user)).await?;
        fault::point("end-recorded");
        self.clean_up(weaver).await
    }

    /// Ends a weaver whose deadline has passed.
    pub async fn expire(&self, weaver: WeaverId) -> Result<()> {
        if self.transition(weaver, |row| row.expired(Timestamp::now())).await? {
            self.clean_up(weaver).await?;
        }
        Ok(())
    }

    /// Writes a step of a weaver's life and tells of it; whether there was one.
    async fn transition(
        &self,
        weaver: WeaverId,
        change: impl Fn(&mut Weaver) -> Result<Event, Unchanged>,
    ) -> Result<bool> {
        match self.store.transition(weaver, |row| change(row).map(Some)).await? {
            Transition::Done(_, event) => {
                if let Some(event) = event {
                    self.events.announce(weaver, &event);
                }
                Ok(true)
            }
            Transition::Refused(..) | Transition::NoSuchWeaver => Ok(false),
        }
    }

    /// Has the pod of an ended weaver removed, and cuts it off until then.
    async fn clean_up(&self, weaver: WeaverId) -> Result<()> {
        // First: a step cuts it off too, and is taken again until it succeeds.
        self.wake(weaver).await;
        self.admission.end(weaver).await?;
        Ok(())
    }
}

fn pod_spec(row: &Weaver) -> PodSpec {
    let image = row.resolved.as_ref().map_or(&row.image, |image| &image.pinned).clone();
    PodSpec { weaver: row.id, image, resources: row.resources }
}

/// How often each weaver's steps have failed in a row.
#[derive(Default)]
struct Failures(HashMap<WeaverId, u32>);

impl Failures {
    fn next_wait(&mut self, weaver: WeaverId) -> Duration {
        let count = self.0.entry(weaver).or_default();
        let wait = (MIN_BACKOFF * 2_u32.saturating_pow(*count)).min(MAX_BACKOFF);
        *count = (*count + 1).min(16);
        wait
    }

    fn forget(&mut self, weaver: WeaverId) {
        self.0.remove(&weaver);
    }
}
