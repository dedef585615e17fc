//! Closes the difference between what should be (rows) and what is (pods), one weaver at a time.
//!
//! [`reconcile`] looks at one weaver's row and pod and takes the next step; it may be called at any time and again, and
//! remembers nothing. [`run`] calls it for each weaver whose bell rang, for all of them at the start, and again after a
//! while when it failed. [`end`] is the one way in which a weaver ends by itself. [`deadlines`] ends those whose time
//! is up.

pub mod deadlines;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
use jiff::Timestamp;
use loom_api::{
    WeaverId,
    agent::ServerMessage,
    weaver::{EventKind, WeaverStatus},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    app::AppState,
    fault,
    provision::{PodPhase, PodSpec, ProvisionError},
    store::{EndedBy, WeaverRow},
};

/// Weavers that are worked on at the same time.
const WORKERS: usize = 8;
/// Before the first new try after a failure; doubles to [`MOST_BACK_OFF`].
const BACK_OFF: Duration = Duration::from_millis(500);
/// See [`BACK_OFF`].
const MOST_BACK_OFF: Duration = Duration::from_secs(10);

/// The reconciler's door bell. Cheap to clone.
#[derive(Clone)]
pub struct Reconciler(mpsc::Sender<WeaverId>);

impl Reconciler {
    /// A bell that rings in `queue`.
    #[must_use]
    pub const fn new(queue: mpsc::Sender<WeaverId>) -> Self {
        Self(queue)
    }

    /// Has a weaver looked at.
    pub async fn ring(&self, weaver: WeaverId) {
        // The reconciler is gone only when the server stops; the next one looks at everything.
        let _ = self.0.send(weaver).await;
    }
}

/// How a weaver ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Its main program ended.
    Exited {
        /// The exit code, or 128 plus the signal.
        code: i32,
        /// The end of its output.
        tail: Vec<u8>,
        /// Whether it was killed because the weaver's memory was used up.
        out_of_memory: bool,
    },
    /// It could not become, or stay, what was asked for.
    Failed {
        /// Why, in words.
        reason: String,
    },
}

/// Works until it is dropped: on every weaver that rings, and on all at the start.
pub async fn run(app: AppState, mut bell: mpsc::Receiver<WeaverId>) {
    let mut due: BTreeMap<(Instant, WeaverId), ()> = BTreeMap::new();
    for weaver in everything(&app).await {
        due.insert((Instant::now(), weaver), ());
    }
    let mut failures: HashMap<WeaverId, u32> = HashMap::new();
    let (mut working, mut again): (HashSet<WeaverId>, HashSet<WeaverId>) = Default::default();
    let mut workers = JoinSet::new();
    loop {
        while workers.len() < WORKERS
            && let Some(entry) = due.first_entry()
            && entry.key().0 <= Instant::now()
        {
            let (at, weaver) = entry.remove_entry().0;
            if !working.insert(weaver) {
                again.insert(weaver);
                continue;
            }
            app.metrics.reconcile_lag.observe(at.elapsed().as_secs_f64());
            let app = app.clone();
            workers.spawn(async move { (weaver, reconcile(&app, weaver).await) });
        }
        let next = due.first_key_value().map(|((at, _), ())| *at);
        tokio::select! {
            rang = bell.recv() => match rang {
                Some(weaver) => drop(due.insert((Instant::now(), weaver), ())),
                None => return,
            },
            Some(done) = workers.join_next() => {
                let Ok((weaver, result)) = done else { continue };
                working.remove(&weaver);
                if again.remove(&weaver) {
                    due.insert((Instant::now(), weaver), ());
                }
                match result {
                    Ok(()) => drop(failures.remove(&weaver)),
                    Err(error) => {
                        let count = failures.entry(weaver).or_default();
                        let wait = (BACK_OFF * 2_u32.saturating_pow(*count)).min(MOST_BACK_OFF);
                        *count = (*count + 1).min(16);
                        app.metrics.reconcile_failures.inc();
                        tracing::warn!(%weaver, "tried again in {wait:?}: {error:#}");
                        due.insert((Instant::now() + wait, weaver), ());
                    }
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() && workers.len() < WORKERS => {}
        }
    }
}

/// Every weaver that has a row without an end, or a pod.
async fn everything(app: &AppState) -> HashSet<WeaverId> {
    let mut all = HashSet::new();
    match app.store.all_live().await {
        Ok(rows) => all.extend(rows.into_iter().map(|row| row.id)),
        Err(error) => tracing::error!("the weavers could not be listed: {error}"),
    }
    match app.provisioner.list().await {
        Ok(pods) => all.extend(pods),
        Err(error) => tracing::error!("the pods could not be listed: {error}"),
    }
    all
}

/// Takes the next step for one weaver.
///
/// # Errors
///
/// When it could not be taken now.
pub async fn reconcile(app: &AppState, weaver: WeaverId) -> Result<()> {
    let row = app.store.weaver(weaver).await?;
    let Some(row) = row.filter(|row| row.wanted) else {
        // Deleted, ended, or never ours: there must be nothing. The agent may say its last words, or it would wait for
        // us to hear them.
        let gone = app.provisioner.remove(weaver).await?;
        fault::point("pod-removed");
        if gone {
            app.agents.disconnect(weaver);
        }
        return Ok(());
    };
    let pod = match app.provisioner.observe(weaver).await {
        Ok(pod) => pod,
        Err(error) => return later(app, &row, "it is not known how its pod is", error).await,
    };
    match pod {
        None if row.agent_version.is_some() => {
            let reason = "its pod is gone: it was removed from outside of Loom".to_owned();
            end(app, weaver, End::Failed { reason }).await
        }
        None => make(app, &row).await,
        Some(pod) if pod.is_leaving && !pod.phase.is_final() => {
            let reason = pod.reason.unwrap_or_else(|| "its pod is being removed from outside of Loom".to_owned());
            end(app, weaver, End::Failed { reason }).await
        }
        Some(pod) => match (pod.phase, pod.exit_code) {
            (phase @ (PodPhase::Pending | PodPhase::Running), _) => {
                if let Some(reason) = pod.reason.filter(|_| phase == PodPhase::Pending) {
                    note(app, &row, reason).await?;
                }
                // Also when it is there: so that it is watched.
                Ok(app.provisioner.ensure(&pod_spec(&row)).await?)
            }
            (_, Some(code)) if pod.reason.is_none() => {
                end(app, weaver, End::Exited { code, tail: Vec::new(), out_of_memory: false }).await
            }
            (_, _) => {
                let reason = pod.reason.unwrap_or_else(|| "its pod failed".to_owned());
                end(app, weaver, End::Failed { reason }).await
            }
        },
    }
}

fn pod_spec(row: &WeaverRow) -> PodSpec {
    let image = row.pinned_image.as_ref().unwrap_or(&row.image).clone();
    PodSpec { weaver: row.id, image, resources: row.resources }
}

async fn make(app: &AppState, row: &WeaverRow) -> Result<()> {
    if row.pinned_image.is_none() && !resolve(app, row).await? {
        // Its row was changed, which is looked at anew.
        app.reconciler.ring(row.id).await;
        return Ok(());
    }
    match app.provisioner.ensure(&pod_spec(row)).await {
        Ok(()) => {
            fault::point("pod-made");
            app.events.write(row.id, EventKind::Started, "its processes have been started").await;
            // It may have been deleted while it was made; then it has to go again.
            app.reconciler.ring(row.id).await;
            Ok(())
        }
        Err(ProvisionError::Refused(reason)) => end(app, row.id, End::Failed { reason }).await,
        Err(error) => later(app, row, "it cannot be started yet", error).await,
    }
}

/// Says why the next step of a weaver that is being made has to wait, and fails with that.
async fn later(app: &AppState, row: &WeaverRow, what: &str, error: ProvisionError) -> Result<()> {
    // One that runs has nothing to wait for.
    if row.agent_version.is_none() {
        note(app, row, format!("{what}: {error}")).await?;
    }
    Err(error.into())
}

/// Finds out what the image is, and writes it down before there is a pod: what a weaver runs must not change with the
/// image's name. Whether the pod can be made from the row as it is.
async fn resolve(app: &AppState, row: &WeaverRow) -> Result<bool> {
    let image = match app.provisioner.resolve(&row.image).await {
        Ok(Some(image)) => image,
        Ok(None) => return Ok(true),
        // Then the image need not say what it runs; whether there is one, the node will see.
        Err(ProvisionError::Refused(reason)) if row.command.is_some() => {
            tracing::info!(weaver = %row.id, "its image is not pinned: {reason}");
            return Ok(true);
        }
        Err(ProvisionError::Refused(reason)) => {
            end(app, row.id, End::Failed { reason }).await?;
            return Ok(false);
        }
        Err(error) => return later(app, row, "its image is not known yet", error).await.map(|()| false),
    };
    if row.command.is_none() && image.command.is_empty() {
        let reason = format!("the image {} names no program to run: give one, with loom new … -- CMD", row.image);
        end(app, row.id, End::Failed { reason }).await?;
        return Ok(false);
    }
    let found = |row: &mut WeaverRow| {
        row.pinned_image = Some(image.pinned.clone());
        row.image_command = Some(image.command.clone());
        row.ended_at.is_none()
    };
    app.store.change_weaver(row.id, found).await?;
    fault::point("image-pinned");
    Ok(false)
}

/// Says why a weaver is not there yet, once for each reason.
async fn note(app: &AppState, row: &WeaverRow, reason: String) -> Result<()> {
    if row.reason.as_deref() == Some(&reason) {
        return Ok(());
    }
    app.events.write(row.id, EventKind::Backend, reason.clone()).await;
    let noted = |row: &mut WeaverRow| {
        row.reason = Some(reason.clone());
        row.ended_at.is_none()
    };
    app.store.change_weaver(row.id, noted).await?;
    Ok(())
}

/// Ends a weaver, once: later ends of the same weaver change nothing but a missing output.
///
/// # Errors
///
/// The database's.
pub async fn end(app: &AppState, weaver: WeaverId, end: End) -> Result<()> {
    let mut first = false;
    let change = |row: &mut WeaverRow| {
        first = row.ended_at.is_none();
        if !first {
            return false;
        }
        match &end {
            End::Exited { code, tail, out_of_memory } => {
                row.status = if *code == 0 { WeaverStatus::Succeeded } else { WeaverStatus::Failed };
                row.reason = Some(if *out_of_memory {
                    let limit = row.resources.memory_mb;
                    format!("the main program was killed because it ran out of memory: its limit is {limit} MiB")
                } else {
                    format!("the main program exited with code {code}")
                });
                row.exit_code = Some(*code);
                row.tail = Some(tail.clone());
            }
            End::Failed { reason } => {
                row.status = WeaverStatus::Failed;
                row.reason = Some(reason.clone());
            }
        }
        row.ended_at = Some(Timestamp::now());
        row.ended_by = Some(EndedBy::Itself);
        row.wanted = false;
        true
    };
    let row = app.store.change_weaver(weaver, change).await?;
    if first && let Some(row) = row {
        let kind = if matches!(end, End::Exited { .. }) { EventKind::Exited } else { EventKind::Failed };
        app.events.write(weaver, kind, row.reason.unwrap_or_default()).await;
        clean_up(app, weaver).await?;
    }
    Ok(())
}

/// Ends a weaver because a user or its deadline says so. Whether it had not ended before.
///
/// # Errors
///
/// The database's.
pub async fn remove(app: &AppState, weaver: WeaverId, by: EndedBy, reason: String) -> Result<bool> {
    let mut first = false;
    let change = |row: &mut WeaverRow| {
        // One that ended by itself may still be deleted: then it is no longer shown.
        first = row.ended_by.is_none_or(|by| by == EndedBy::Itself);
        if first {
            row.ended_at.get_or_insert_with(Timestamp::now);
            row.ended_by = Some(by);
            row.reason = Some(reason.clone());
            if !row.status.is_final() {
                row.status = WeaverStatus::Succeeded;
            }
            row.wanted = false;
        }
        first
    };
    app.store.change_weaver(weaver, change).await?;
    fault::point("end-recorded");
    if first {
        let kind = if by == EndedBy::Deadline { EventKind::Expired } else { EventKind::Deleted };
        app.events.write(weaver, kind, reason).await;
    }
    clean_up(app, weaver).await?;
    Ok(first)
}

/// Cuts an ended weaver off, and has its pod removed.
async fn clean_up(app: &AppState, weaver: WeaverId) -> Result<()> {
    // At once: until its pod is gone, the weaver could still be reached.
    let grants = app.store.remove_grants(weaver).await?;
    fault::point("grants-removed");
    for public_key in grants {
        app.agents.send(weaver, ServerMessage::Revoke { public_key });
    }
    app.relay.load(&app.store).await?;
    app.reconciler.ring(weaver).await;
    Ok(())
}
