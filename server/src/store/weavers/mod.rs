//! Weavers. [`creation`] adds one, [`row`] is how one is written down.
//!
//! A weaver is changed by [`Store::transition`] only: read, changed by a pure transition of [`crate::weaver`] and
//! written back together with the event that tells of it, in one transaction of the one writer. Rows stay after the
//! weaver's end, for its events and its last output, until [`Store::forget_ended`].

mod creation;
mod row;

use jiff::Timestamp;
use loom_api::{OrgId, UserId, WeaverId};

pub use creation::{Added, Idempotency, Limit, Limits};
pub(super) use row::{read, write};

use super::{Store, events::insert_event, millis, parsed, timestamp};
use crate::{
    reconcile::queue::{Lane, Stage},
    weaver::{Event, Weaver},
};
pub(super) use row::unless_unreadable;
use row::{RawWeaver, columns, readable, readable_json, select_many_weavers, select_weavers};

/// The most bytes of a main program's output that are kept.
pub const MAX_TAIL: usize = 64 << 10;
/// How many weavers a reference is said to fit, at most.
pub const MAX_FITTING: usize = 10;

/// What became of a transition.
#[derive(Debug)]
pub enum Transition<R> {
    /// The weaver as it is now, and what was written of it.
    Done(Weaver, Option<Event>),
    /// It does not apply to the weaver as it is.
    Refused(Weaver, R),
    NoSuchWeaver,
}

/// Which weavers of an organisation a list shows: newest first, from a place on.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// Those too that were deleted or whose time was up.
    pub with_removed: bool,
    /// Only older ones than this.
    pub before: Option<WeaverId>,
    pub limit: u32,
}

/// When a weaver is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    pub weaver: WeaverId,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
}

impl Store {
    /// A weaver by its id.
    pub async fn weaver(&self, id: WeaverId) -> sqlx::Result<Option<Weaver>> {
        let raw: Option<RawWeaver> =
            sqlx::query_as(select_weavers!("WHERE id = ?")).bind(id.to_string()).fetch_optional(self.reader()).await?;
        raw.map(TryInto::try_into).transpose()
    }

    /// A weaver's environment, encrypted, until the weaver ends.
    pub async fn sealed_env(&self, id: WeaverId) -> sqlx::Result<Vec<u8>> {
        sqlx::query_scalar("SELECT sealed FROM environments WHERE weaver_id = ?")
            .bind(id.to_string())
            .fetch_one(self.reader())
            .await
    }

    /// The end of what a weaver's main program wrote; empty when there is none.
    pub async fn output(&self, id: WeaverId) -> sqlx::Result<Vec<u8>> {
        let tail = sqlx::query_scalar("SELECT tail FROM outputs WHERE weaver_id = ?")
            .bind(id.to_string())
            .fetch_optional(self.reader())
            .await?;
        Ok(tail.unwrap_or_default())
    }

    /// Keeps the end of what a weaver's main program wrote, at most [`MAX_TAIL`] bytes; the first to be kept stays.
    pub async fn keep_output(&self, id: WeaverId, output: &[u8]) -> sqlx::Result<()> {
        if output.is_empty() || self.is_low_on_space() {
            return Ok(());
        }
        sqlx::query("INSERT INTO outputs (weaver_id, tail) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(id.to_string())
            .bind(&output[output.len().saturating_sub(MAX_TAIL)..])
            .execute(self.writer())
            .await
            .map(drop)
    }

    /// A page of an organisation's weavers. A row that cannot be read is logged and left out.
    pub async fn weavers_of(&self, org: OrgId, page: Page) -> sqlx::Result<Vec<Weaver>> {
        let rows: Vec<String> = sqlx::query_scalar(select_many_weavers!(
            "WHERE org_id = ?1 AND (?2 IS NULL OR id < ?2) \
             AND (?3 OR ended_by IS NULL OR ended_by = 'itself') ORDER BY id DESC LIMIT ?4"
        ))
        .bind(org.to_string())
        .bind(page.before.map(|id| id.to_string()))
        .bind(page.with_removed)
        .bind(i64::from(page.limit))
        .fetch_all(self.reader())
        .await?;
        Ok(readable_json(&rows))
    }

    /// The weavers of a user's organisations that have a name, newest first, at most [`MAX_FITTING`] and one more.
    pub async fn weavers_named(&self, user: UserId, name: &str) -> sqlx::Result<Vec<Weaver>> {
        // Live ones first: with very many ended ones of the name, it is still found.
        let raw: Vec<RawWeaver> = sqlx::query_as(select_weavers!(
            "WHERE org_id IN (SELECT org_id FROM memberships WHERE user_id = ?) AND name = ? \
             ORDER BY ended_at IS NOT NULL, ended_by IS NOT 'itself', id DESC LIMIT ?"
        ))
        .bind(user.to_string())
        .bind(name)
        .bind(fitting_limit())
        .fetch_all(self.reader())
        .await?;
        Ok(readable(raw))
    }

    /// The weavers of a user's organisations whose UUID begins so and that are shown, newest first, at most
    /// [`MAX_FITTING`] and one more.
    pub async fn weavers_beginning(&self, user: UserId, prefix: &str) -> sqlx::Result<Vec<Weaver>> {
        let raw: Vec<RawWeaver> = sqlx::query_as(select_weavers!(
            "WHERE org_id IN (SELECT org_id FROM memberships WHERE user_id = ?1) AND id >= ?2 AND id < ?2 || '~' \
             AND (ended_by IS NULL OR ended_by = 'itself') ORDER BY id DESC LIMIT ?3"
        ))
        .bind(user.to_string())
        .bind(format!("W-{prefix}"))
        .bind(fitting_limit())
        .fetch_all(self.reader())
        .await?;
        Ok(readable(raw))
    }

    /// How many weavers have not ended, by status.
    pub async fn count_by_status(&self) -> sqlx::Result<Vec<(String, i64)>> {
        sqlx::query_as("SELECT status, COUNT(*) FROM weavers WHERE ended_at IS NULL GROUP BY status")
            .fetch_all(self.reader())
            .await
    }

    /// All weavers that have not ended, as far as their rows can be read.
    pub async fn live_weavers(&self) -> sqlx::Result<Vec<WeaverId>> {
        let ids: Vec<String> =
            sqlx::query_scalar("SELECT id FROM weavers WHERE ended_at IS NULL").fetch_all(self.reader()).await?;
        Ok(ids.iter().filter_map(|id| unless_unreadable(id, parsed(id))).collect())
    }

    /// Where the next step of a weaver is to wait. Only an order of work depends on it, so a failure is no error.
    pub async fn lane(&self, id: WeaverId) -> Lane {
        let row: sqlx::Result<Option<(String, bool, bool)>> =
            sqlx::query_as("SELECT org_id, ended_at IS NOT NULL, agent_version IS NOT NULL FROM weavers WHERE id = ?")
                .bind(id.to_string())
                .fetch_optional(self.reader())
                .await;
        let Ok(Some((organisation, has_ended, has_agent))) = row else {
            return Lane { organisation: None, stage: Stage::Ending };
        };
        let stage = match (has_ended, has_agent) {
            (true, _) => Stage::Ending,
            (false, true) => Stage::Running,
            (false, false) => Stage::Starting,
        };
        Lane { organisation: parsed(&organisation).ok(), stage }
    }

    /// The deadlines of all weavers that have not ended, as far as their rows can be read.
    pub async fn deadlines(&self) -> sqlx::Result<Vec<Deadline>> {
        let rows: Vec<(String, i64, i64)> =
            sqlx::query_as("SELECT id, created_at, expires_at FROM weavers WHERE ended_at IS NULL")
                .fetch_all(self.reader())
                .await?;
        let deadline = |id: &str, created_at, expires_at| {
            Ok(Deadline { weaver: parsed(id)?, created_at: timestamp(created_at)?, expires_at: timestamp(expires_at)? })
        };
        let readable = rows
            .into_iter()
            .filter_map(|(id, created_at, expires_at)| unless_unreadable(&id, deadline(&id, created_at, expires_at)));
        Ok(readable.collect())
    }

    /// Changes a weaver by a transition of its life, and writes it with the event that the transition returns.
    ///
    /// It is tried on what a reader sees first: agents state every half minute what is written already, and a thousand
    /// of them must not queue for the one writer to be told so.
    pub async fn transition<R>(
        &self,
        id: WeaverId,
        change: impl Fn(&mut Weaver) -> Result<Option<Event>, R>,
    ) -> sqlx::Result<Transition<R>> {
        let Some(mut seen) = self.weaver(id).await? else { return Ok(Transition::NoSuchWeaver) };
        if let Err(refusal) = change(&mut seen) {
            return Ok(Transition::Refused(seen, refusal));
        }
        let mut transaction = self.begin_write().await?;
        let Some(mut weaver) = read(&mut transaction, id).await? else { return Ok(Transition::NoSuchWeaver) };
        let event = match change(&mut weaver) {
            Ok(event) => event,
            Err(refusal) => return Ok(Transition::Refused(weaver, refusal)),
        };
        write(&mut transaction, &weaver).await?;
        if weaver.has_ended() {
            // Nobody starts it again, and its environment may hold passwords.
            sqlx::query("DELETE FROM environments WHERE weaver_id = ?")
                .bind(id.to_string())
                .execute(&mut *transaction)
                .await?;
        }
        if let Some(event) = &event {
            insert_event(&mut transaction, id, event).await?;
        }
        transaction.commit().await?;
        Ok(Transition::Done(weaver, event))
    }

    /// Forgets weavers that ended before `time`, with everything that hangs on them.
    pub async fn forget_ended(&self, time: Timestamp) -> sqlx::Result<u64> {
        let mut transaction = self.begin_write().await?;
        macro_rules! forget {
            ($table:literal, $column:literal) => {
                sqlx::query(concat!(
                    "DELETE FROM ",
                    $table,
                    " WHERE ",
                    $column,
                    " IN (SELECT id FROM weavers WHERE ended_at IS NOT NULL AND ended_at < ?)"
                ))
                .bind(millis(time))
                .execute(&mut *transaction)
                .await?
                .rows_affected()
            };
        }
        forget!("events", "weaver_id");
        forget!("grants", "weaver_id");
        forget!("tokens", "weaver_id");
        forget!("idempotency_keys", "weaver_id");
        forget!("environments", "weaver_id");
        forget!("outputs", "weaver_id");
        forget!("wireguard_keys", "weaver_id");
        let forgotten = forget!("weavers", "id");
        transaction.commit().await?;
        Ok(forgotten)
    }
}

fn fitting_limit() -> i64 {
    i64::try_from(MAX_FITTING + 1).unwrap_or(i64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use jiff::SignedDuration;

    pub(crate) use super::creation::tests::added;
    pub(in crate::store) use super::creation::tests::user;
    use super::{super::tests::temporary, *};
    use crate::weaver::Ending;

    /// Lets a weaver's main program exit.
    pub(in crate::store) async fn end(store: &Store, id: WeaverId, now: Timestamp) {
        let ending = Ending::Exited { code: 3, out_of_memory: false };
        let done = store.transition(id, |weaver| weaver.ended(now, &ending).map(Some)).await.expect("written");
        assert!(matches!(done, Transition::Done(..)), "{done:?}");
    }

    #[tokio::test]
    async fn what_changes_nothing_does_not_wait_for_the_writer() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, None).await.id;
        let runs = |weaver: &mut Weaver| weaver.ran().map(Some);
        assert!(matches!(store.transition(id, runs).await.expect("written"), Transition::Done(..)));
        let _writer = store.begin_write().await.expect("begun");
        let again = tokio::time::timeout(std::time::Duration::from_secs(10), store.transition(id, runs)).await;
        assert!(matches!(again.expect("at once").expect("read"), Transition::Refused(..)));
    }

    #[tokio::test]
    async fn lists_are_paged_newest_first_and_references_are_found_among_many() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let mut ids = Vec::new();
        for _ in 0..5 {
            let weaver = added(&store, owner, Some("same")).await;
            end(&store, weaver.id, Timestamp::now()).await;
            ids.push(weaver.id);
        }
        ids.sort();
        ids.reverse();
        let mut listed: Vec<WeaverId> = Vec::new();
        loop {
            let page = Page { with_removed: false, before: listed.last().copied(), limit: 2 };
            let page = store.weavers_of(owner.1, page).await.expect("listed");
            listed.extend(page.iter().map(|weaver| weaver.id));
            if page.len() < 2 {
                break;
            }
        }
        assert_eq!(listed, ids);
        assert_eq!(store.weavers_named(owner.0, "same").await.expect("found").len(), 5);
        let uuid = ids[2].uuid().to_string();
        let found = store.weavers_beginning(owner.0, &uuid[..30]).await.expect("found");
        assert!(found.iter().any(|weaver| weaver.id == ids[2]));
        let stranger = user(&store).await;
        assert!(store.weavers_beginning(stranger.0, &uuid).await.expect("found").is_empty());
        assert!(store.weavers_named(stranger.0, "same").await.expect("found").is_empty());
    }

    #[tokio::test]
    async fn an_ended_weaver_loses_its_environment_at_once_and_its_events_after_their_time() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, None).await.id;
        let now = Timestamp::now();
        store.keep_output(id, &vec![7; MAX_TAIL + 1]).await.expect("kept");
        store.keep_output(id, b"later").await.expect("nothing to do");
        assert_eq!(store.output(id).await.expect("read").len(), MAX_TAIL);
        assert_eq!(store.sealed_env(id).await.expect("it lives"), [1, 2, 3]);
        end(&store, id, now).await;
        assert!(matches!(store.sealed_env(id).await, Err(sqlx::Error::RowNotFound)));
        assert_eq!(store.forget_ended(now).await.expect("nothing yet"), 0);
        assert_eq!(store.forget_ended(now + SignedDuration::from_secs(1)).await.expect("forgotten"), 1);
        assert_eq!(store.weaver(id).await.expect("read"), None);
        assert!(store.output(id).await.expect("read").is_empty());
    }
}
