//! Ends what depends on rights that are gone: of a token that was revoked or has expired, a user who was suspended or
//! removed, a membership that has ended.
//!
//! Whoever takes a right away, the API or `loom-server` in another process, advances the identity revision in the
//! database. It is read a few times a second, and when it has changed, everything that needs rights is compared with
//! the rights that there are now. So nothing is missed, whatever failed or was restarted in between.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::{admission::Admission, reconcile::Reconciler, sessions::Sessions, store::Store};

/// Between two looks. What has lost its rights ends within a second.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Before a look that failed is repeated.
const RETRY: Duration = Duration::from_secs(1);

pub struct Revocation {
    pub store: Store,
    pub sessions: Arc<Sessions>,
    pub admission: Arc<Admission>,
    pub reconciler: Reconciler,
}

impl Revocation {
    /// Works until it is dropped.
    pub async fn run(self) {
        let mut tick = interval(CHECK_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut completed = None;
        loop {
            tick.tick().await;
            if let Err(error) = self.look(&mut completed).await {
                tracing::error!("what lost its rights is ended again in {RETRY:?}: {error:#}");
                completed = None;
                sleep(RETRY).await;
            }
        }
    }

    /// Does what the newest revision asks for, unless that was `completed` before.
    async fn look(&self, completed: &mut Option<i64>) -> anyhow::Result<()> {
        self.store.remove_expired_tokens().await?;
        let revision = self.store.identity_revision().await?;
        if *completed == Some(revision) && !self.sessions.needs_check(revision) {
            return Ok(());
        }
        let rights = self.store.rights().await?;
        let ended = self.sessions.end_without_rights(&rights);
        if ended > 0 {
            tracing::info!(ended, "connections have lost their rights");
        }
        if *completed != Some(rights.revision) {
            self.take_back_grants().await?;
            *completed = Some(rights.revision);
        }
        Ok(())
    }

    async fn take_back_grants(&self) -> anyhow::Result<()> {
        // What fails must not keep the others.
        let mut failures = Vec::new();
        for lost in self.store.lost_grants().await? {
            tracing::info!(weaver = %lost.weaver, device = %lost.device, "a device is shut out");
            let done = self.admission.shut_out(lost.user, lost.weaver, lost.device).await;
            failures.extend(done.context("a grant").err());
        }
        for (user, device) in self.store.orphaned_devices().await? {
            failures.extend(self.admission.revoke_device(user, device).await.context("a device").err());
        }
        for weaver in self.store.orphaned_weavers().await? {
            let done = self.reconciler.delete(weaver, "the operator, who removed its owner").await;
            failures.extend(done.with_context(|| format!("the weaver {weaver}")).err());
        }
        let count = failures.len();
        failures.pop().map_or(Ok(()), |last| Err(last.context(format!("{count} failed, the last of them"))))
    }
}
