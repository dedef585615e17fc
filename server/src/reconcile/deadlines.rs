//! Ends weavers when their time is up, on the second, and warns before.
//!
//! The deadline is a row's, absolute; so this remembers only what it has already warned of. It looks at all live
//! weavers when a deadline may have changed, when the next one is due, and at every sweep, whichever comes first.

use std::{collections::HashMap, time::Duration};

use jiff::{SignedDuration, Timestamp};
use loom_api::{WeaverId, weaver::EventKind};
use tokio::{
    sync::broadcast,
    time::{Instant, timeout},
};

use super::remove;
use crate::{
    app::AppState,
    store::{EndedBy, WeaverRow},
};

/// Before the end, when people are warned; the last first.
const WARNINGS: [SignedDuration; 3] =
    [SignedDuration::from_mins(1), SignedDuration::from_mins(5), SignedDuration::from_mins(15)];
/// How long an ended weaver's events and output are kept.
const KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);
/// No deadline is waited for more finely than this.
const FINEST: Duration = Duration::from_millis(10);

/// Works until it is dropped.
pub async fn run(app: AppState) {
    // Created and extended weavers announce themselves by an event.
    let mut bell = app.events.subscribe();
    let mut warned = HashMap::new();
    let mut forgot: Option<Instant> = None;
    loop {
        if forgot.is_none_or(|at| at.elapsed() >= app.config.cleanup_interval) {
            forgot = Some(Instant::now());
            if let Err(error) = app.store.forget_ended(Timestamp::now() - KEPT).await {
                tracing::error!("ended weavers could not be forgotten: {error}");
            }
        }
        let wait = match look(&app, &mut warned).await {
            Ok(wait) => wait.min(app.config.cleanup_interval).max(FINEST),
            Err(error) => {
                tracing::error!("the deadlines could not be looked at: {error:#}");
                app.config.cleanup_interval
            }
        };
        if let Ok(Err(broadcast::error::RecvError::Closed)) = timeout(wait, bell.recv()).await {
            return;
        }
        // What rang meanwhile is seen by the same look.
        while let Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) = bell.try_recv() {}
    }
}

/// Ends and warns what is due; how long until the next is.
async fn look(app: &AppState, warned: &mut HashMap<WeaverId, SignedDuration>) -> anyhow::Result<Duration> {
    let now = Timestamp::now();
    let mut next = app.config.cleanup_interval;
    let rows = app.store.all_live().await?;
    warned.retain(|weaver, _| rows.iter().any(|row| row.id == *weaver));
    for row in rows {
        if row.expires_at <= now {
            remove(app, row.id, EndedBy::Deadline, format!("its time was up at {}", row.expires_at)).await?;
            continue;
        }
        let left = row.expires_at.duration_since(now);
        warn(app, &row, left, warned).await;
        let until =
            WARNINGS.iter().map(|before| left - *before).filter(|until| until.is_positive()).min().unwrap_or(left);
        next = next.min(until.unsigned_abs());
    }
    Ok(next)
}

/// Warns once at each threshold that a weaver passes. One that is made, or extended, below a threshold is not warned of
/// it.
async fn warn(app: &AppState, row: &WeaverRow, left: SignedDuration, warned: &mut HashMap<WeaverId, SignedDuration>) {
    let lifetime = row.expires_at.duration_since(row.created_at);
    let Some(threshold) = WARNINGS.into_iter().find(|threshold| left <= *threshold) else {
        warned.remove(&row.id);
        return;
    };
    if lifetime <= threshold || warned.get(&row.id) == Some(&threshold) {
        return;
    }
    warned.insert(row.id, threshold);
    let minutes = threshold.as_mins();
    app.events.write(row.id, EventKind::Expiring, format!("it ends in {minutes} min, at {}", row.expires_at)).await;
}
