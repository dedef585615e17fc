//! Weavers and their events.
//!
//! A weaver is changed by [`Store::transition`] only: read, changed by a pure transition of [`crate::weaver`] and
//! written back together with the event that tells of it, in one transaction of the one writer. Rows stay after the
//! weaver's end, for its events and its last output, until [`Store::forget_ended`].

use jiff::Timestamp;
use loom_api::{
    OrgId, UserId, WeaverId,
    weaver::{EventKind, ResourceSpec, WeaverEvent, WeaverStatus},
};
use sqlx::{FromRow, Sqlite, Transaction};

use super::{Store, millis, parsed, timestamp};
use crate::{
    provision::ResolvedImage,
    reconcile::queue::{Lane, Stage},
    weaver::{Agent, End, EndedBy, Event, Life, NewWeaver, Outcome, Weaver},
};

/// The part of the deployment's prefix that weavers live in.
const WEAVER_SUBNET: u16 = 0xa;
/// The most events that one request is given.
const MAX_EVENTS_READ: i64 = 10_000;
/// The most events of a weaver that its life's transitions did not write: an agent that reconnects for ever, or a
/// reason that changes for ever, must not fill the disk.
const MAX_EVENTS: i64 = 1_000;
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

/// What became of a request for a weaver.
#[derive(Debug)]
pub enum Added {
    New(Weaver),
    /// An earlier request with the same idempotency key made it.
    Earlier(Weaver),
    /// The idempotency key came with another request before.
    KeyUsed,
    NameTaken,
    /// As many as the limits allow have not ended.
    TooMany(Limit),
}

/// How many weavers may live at a time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub of_organisation: u32,
    pub of_user: u32,
}

/// The limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Organisation,
    User,
}

/// The key that a client sends with a request that it may repeat, and the hash of the request.
#[derive(Debug, Clone, Copy)]
pub struct Idempotency<'a> {
    pub key: &'a str,
    pub body_hash: &'a str,
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

/// A macro, because statements are whole at compile time.
macro_rules! select_weavers {
    ($rest:literal) => {
        concat!(
            "SELECT id, name, org_id, owner_id, image, repo, branch, command, pinned_image, image_command, \
             cpu_millicores, memory_mb, created_at, expires_at, status, reason, exit_code, ended_at, ended_by, \
             address, agent_version, wireguard_key, candidates FROM weavers ",
            $rest
        )
    };
}

#[derive(FromRow)]
struct RawWeaver {
    id: String,
    name: Option<String>,
    org_id: String,
    owner_id: String,
    image: String,
    repo: Option<String>,
    branch: Option<String>,
    command: Option<String>,
    pinned_image: Option<String>,
    image_command: Option<String>,
    cpu_millicores: i64,
    memory_mb: i64,
    created_at: i64,
    expires_at: i64,
    status: String,
    reason: Option<String>,
    exit_code: Option<i64>,
    ended_at: Option<i64>,
    ended_by: Option<String>,
    address: String,
    agent_version: Option<String>,
    wireguard_key: Option<String>,
    candidates: String,
}

impl Store {
    /// Records a weaver, unless the name, the limits or the idempotency key are against it. All of it is looked at in
    /// the transaction that writes, so requests at the same time cannot get past it.
    pub async fn add_weaver(
        &self,
        new: &NewWeaver,
        idempotency: Option<Idempotency<'_>>,
        limits: Limits,
        created: &Event,
    ) -> sqlx::Result<Added> {
        let mut transaction = self.begin_write().await?;
        if let Some(idempotency) = idempotency
            && let Some(earlier) = earlier(&mut transaction, new.owner_id, idempotency).await?
        {
            return Ok(earlier);
        }
        if let Some(limit) = reached(&mut transaction, new, limits).await? {
            return Ok(Added::TooMany(limit));
        }
        let added = self.insert_weaver(&mut transaction, new).await;
        match added {
            Err(error) if error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation) => {
                return Ok(Added::NameTaken);
            }
            added => added?,
        }
        if let Some(Idempotency { key, body_hash }) = idempotency {
            sqlx::query(
                "INSERT INTO idempotency_keys (user_id, key, body_hash, weaver_id, created_at) VALUES (?, ?, ?, ?, ?)",
            )
            .bind(new.owner_id.to_string())
            .bind(key)
            .bind(body_hash)
            .bind(new.id.to_string())
            .bind(millis(new.created_at))
            .execute(&mut *transaction)
            .await?;
        }
        insert_event(&mut transaction, new.id, created).await?;
        let weaver = read(&mut transaction, new.id).await?.ok_or(sqlx::Error::RowNotFound)?;
        transaction.commit().await?;
        Ok(Added::New(weaver))
    }

    async fn insert_weaver(&self, transaction: &mut Transaction<'_, Sqlite>, new: &NewWeaver) -> sqlx::Result<()> {
        sqlx::query(
            "INSERT INTO weavers (id, name, org_id, owner_id, image, repo, branch, command, cpu_millicores, \
             memory_mb, created_at, expires_at, status, address) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'Pending', ?)",
        )
        .bind(new.id.to_string())
        .bind(&new.name)
        .bind(new.org_id.to_string())
        .bind(new.owner_id.to_string())
        .bind(&new.image)
        .bind(&new.repo)
        .bind(&new.branch)
        .bind(new.command.as_ref().map(|command| serde_json::json!(command).to_string()))
        .bind(i64::from(new.resources.cpu_millicores))
        .bind(i64::from(new.resources.memory_mb))
        .bind(millis(new.created_at))
        .bind(millis(new.expires_at))
        .bind(self.address(WEAVER_SUBNET, new.id.uuid().as_bytes()).to_string())
        .execute(&mut **transaction)
        .await?;
        sqlx::query("INSERT INTO environments (weaver_id, sealed) VALUES (?, ?)")
            .bind(new.id.to_string())
            .bind(&new.sealed_env)
            .execute(&mut **transaction)
            .await
            .map(drop)
    }

    /// A weaver by its id.
    pub async fn weaver(&self, id: WeaverId) -> sqlx::Result<Option<Weaver>> {
        let raw: Option<RawWeaver> =
            sqlx::query_as(select_weavers!("WHERE id = ?")).bind(id.to_string()).fetch_optional(self.reader()).await?;
        raw.map(TryInto::try_into).transpose()
    }

    /// A weaver's environment, encrypted.
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
        let raw: Vec<RawWeaver> = sqlx::query_as(select_weavers!(
            "WHERE org_id = ?1 AND (?2 IS NULL OR id < ?2) \
             AND (?3 OR ended_by IS NULL OR ended_by = 'itself') ORDER BY id DESC LIMIT ?4"
        ))
        .bind(org.to_string())
        .bind(page.before.map(|id| id.to_string()))
        .bind(page.with_removed)
        .bind(i64::from(page.limit))
        .fetch_all(self.reader())
        .await?;
        Ok(readable(raw))
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

    /// All weavers that have not ended.
    pub async fn live_weavers(&self) -> sqlx::Result<Vec<WeaverId>> {
        let ids: Vec<String> =
            sqlx::query_scalar("SELECT id FROM weavers WHERE ended_at IS NULL").fetch_all(self.reader()).await?;
        ids.iter().map(|id| parsed(id)).collect()
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

    /// The deadlines of all weavers that have not ended.
    pub async fn deadlines(&self) -> sqlx::Result<Vec<Deadline>> {
        let rows: Vec<(String, i64, i64)> =
            sqlx::query_as("SELECT id, created_at, expires_at FROM weavers WHERE ended_at IS NULL")
                .fetch_all(self.reader())
                .await?;
        rows.into_iter()
            .map(|(id, created_at, expires_at)| {
                Ok(Deadline {
                    weaver: parsed(&id)?,
                    created_at: timestamp(created_at)?,
                    expires_at: timestamp(expires_at)?,
                })
            })
            .collect()
    }

    /// Changes a weaver by a transition of its life, and writes it with the event that the transition returns.
    pub async fn transition<R>(
        &self,
        id: WeaverId,
        change: impl FnOnce(&mut Weaver) -> Result<Option<Event>, R>,
    ) -> sqlx::Result<Transition<R>> {
        let mut transaction = self.begin_write().await?;
        let Some(mut weaver) = read(&mut transaction, id).await? else { return Ok(Transition::NoSuchWeaver) };
        let event = match change(&mut weaver) {
            Ok(event) => event,
            Err(refusal) => return Ok(Transition::Refused(weaver, refusal)),
        };
        write(&mut transaction, &weaver).await?;
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

    /// Writes an event that no transition of the weaver's life wrote; whether there was room for one more.
    pub async fn add_event(&self, weaver: WeaverId, event: &Event) -> sqlx::Result<bool> {
        if self.is_low_on_space() {
            return Ok(false);
        }
        let mut transaction = self.begin_write().await?;
        let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM events WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .fetch_one(&mut *transaction)
            .await?;
        if count >= MAX_EVENTS {
            return Ok(false);
        }
        insert_event(&mut transaction, weaver, event).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// The events of a weaver after the one with the number `after`, in order.
    pub async fn events(&self, weaver: WeaverId, after: i64) -> sqlx::Result<Vec<WeaverEvent>> {
        let rows: Vec<(i64, i64, String, String)> = sqlx::query_as(
            "SELECT id, at, kind, message FROM events WHERE weaver_id = ? AND id > ? ORDER BY id LIMIT ?",
        )
        .bind(weaver.to_string())
        .bind(after)
        .bind(MAX_EVENTS_READ)
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(id, at, kind, message)| {
                let kind = serde_json::from_value(kind.into()).unwrap_or(EventKind::Unknown);
                Ok(WeaverEvent { id, weaver_id: weaver, at: timestamp(at)?, kind, message })
            })
            .collect()
    }
}

/// What an earlier request with the same key came to.
async fn earlier(
    transaction: &mut Transaction<'_, Sqlite>,
    user: UserId,
    Idempotency { key, body_hash }: Idempotency<'_>,
) -> sqlx::Result<Option<Added>> {
    let row: Option<(String, String)> =
        sqlx::query_as("SELECT weaver_id, body_hash FROM idempotency_keys WHERE user_id = ? AND key = ?")
            .bind(user.to_string())
            .bind(key)
            .fetch_optional(&mut **transaction)
            .await?;
    Ok(match row {
        Some((id, hash)) if hash == body_hash => read(transaction, parsed(&id)?).await?.map(Added::Earlier),
        Some(_) => Some(Added::KeyUsed),
        None => None,
    })
}

async fn reached(
    transaction: &mut Transaction<'_, Sqlite>,
    new: &NewWeaver,
    limits: Limits,
) -> sqlx::Result<Option<Limit>> {
    let in_organisation: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM weavers WHERE org_id = ? AND ended_at IS NULL")
        .bind(new.org_id.to_string())
        .fetch_one(&mut **transaction)
        .await?;
    if in_organisation >= i64::from(limits.of_organisation) {
        return Ok(Some(Limit::Organisation));
    }
    let of_user: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM weavers WHERE owner_id = ? AND ended_at IS NULL")
        .bind(new.owner_id.to_string())
        .fetch_one(&mut **transaction)
        .await?;
    Ok((of_user >= i64::from(limits.of_user)).then_some(Limit::User))
}

pub(super) async fn read(transaction: &mut Transaction<'_, Sqlite>, id: WeaverId) -> sqlx::Result<Option<Weaver>> {
    let raw: Option<RawWeaver> =
        sqlx::query_as(select_weavers!("WHERE id = ?")).bind(id.to_string()).fetch_optional(&mut **transaction).await?;
    raw.map(TryInto::try_into).transpose()
}

pub(super) async fn write(transaction: &mut Transaction<'_, Sqlite>, weaver: &Weaver) -> sqlx::Result<()> {
    let agent = weaver.agent.as_ref();
    let candidates = agent.map_or(&[][..], |agent| &agent.candidates);
    let candidates = serde_json::to_string(candidates).map_err(|error| sqlx::Error::Encode(error.into()))?;
    let end = weaver.life.end();
    let resolved = weaver.resolved.as_ref();
    sqlx::query(
        "UPDATE weavers SET expires_at = ?, status = ?, reason = ?, exit_code = ?, ended_at = ?, ended_by = ?, \
         agent_version = ?, wireguard_key = ?, candidates = ?, pinned_image = ?, image_command = ? WHERE id = ?",
    )
    .bind(millis(weaver.expires_at))
    .bind(weaver.life.status().to_string())
    .bind(weaver.life.reason())
    .bind(weaver.life.exit_code().map(i64::from))
    .bind(end.map(|end| millis(end.at)))
    .bind(end.map(|end| end.by.as_str()))
    .bind(agent.map(|agent| &agent.version))
    .bind(agent.map(|agent| agent.wireguard_key.to_string()))
    .bind(candidates)
    .bind(resolved.map(|image| &image.pinned))
    .bind(resolved.map(|image| serde_json::json!(image.command).to_string()))
    .bind(weaver.id.to_string())
    .execute(&mut **transaction)
    .await
    .map(drop)
}

async fn insert_event(transaction: &mut Transaction<'_, Sqlite>, weaver: WeaverId, event: &Event) -> sqlx::Result<()> {
    let kind = serde_json::to_value(event.kind).map_err(|error| sqlx::Error::Encode(error.into()))?;
    sqlx::query("INSERT INTO events (weaver_id, at, kind, message) VALUES (?, ?, ?, ?)")
        .bind(weaver.to_string())
        .bind(millis(Timestamp::now()))
        .bind(kind.as_str().unwrap_or("unknown"))
        .bind(&event.message)
        .execute(&mut **transaction)
        .await
        .map(drop)
}

fn fitting_limit() -> i64 {
    i64::try_from(MAX_FITTING + 1).unwrap_or(i64::MAX)
}

/// Rows that can be read: one that cannot must not take the others with it.
fn readable(rows: Vec<RawWeaver>) -> Vec<Weaver> {
    let weavers = rows.into_iter().filter_map(|raw| {
        let id = raw.id.clone();
        Weaver::try_from(raw).inspect_err(|error| tracing::error!(weaver = id, "its row cannot be read: {error}")).ok()
    });
    weavers.collect()
}

impl EndedBy {
    const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Deadline => "deadline",
            Self::Itself => "itself",
        }
    }
}

fn contradiction(what: String) -> sqlx::Error {
    sqlx::Error::Decode(what.into())
}

/// The state that the columns stand for, or what contradicts what.
fn life(raw: &RawWeaver) -> sqlx::Result<Life> {
    let (Some(at), Some(by)) = (raw.ended_at, raw.ended_by.as_deref()) else {
        return match (raw.status.as_str(), raw.exit_code, raw.ended_at, &raw.ended_by) {
            ("Pending", None, None, None) => Ok(Life::Pending { waits_for: raw.reason.clone() }),
            ("Running", None, None, None) => Ok(Life::Running),
            (status, code, ..) => {
                Err(contradiction(format!("the status {status:?} and the exit code {code:?} of one without an end")))
            }
        };
    };
    let by = match by {
        "user" => EndedBy::User,
        "deadline" => EndedBy::Deadline,
        "itself" => EndedBy::Itself,
        other => return Err(contradiction(format!("{other:?} ends no weaver"))),
    };
    let succeeded = WeaverStatus::Succeeded.to_string();
    let outcome = match raw.exit_code.map(i32::try_from) {
        Some(Ok(code)) => Outcome::Exited(code),
        Some(Err(_)) => return Err(contradiction(format!("the exit code {:?}", raw.exit_code))),
        None if raw.status == succeeded => Outcome::Stopped,
        None => Outcome::Failed,
    };
    if outcome.status().to_string() != raw.status {
        let (status, code) = (&raw.status, raw.exit_code);
        return Err(contradiction(format!("the status {status:?} and the exit code {code:?} of one that has ended")));
    }
    Ok(Life::Ended(End { at: timestamp(at)?, by, outcome, reason: raw.reason.clone().unwrap_or_default() }))
}

impl TryFrom<RawWeaver> for Weaver {
    type Error = sqlx::Error;

    fn try_from(raw: RawWeaver) -> sqlx::Result<Self> {
        let json_error = |error: serde_json::Error| sqlx::Error::Decode(error.into());
        let list = |json: &str| serde_json::from_str::<Vec<String>>(json).map_err(json_error);
        let number = |value: i64| u32::try_from(value).map_err(|error| sqlx::Error::Decode(error.into()));
        let agent = match (&raw.agent_version, &raw.wireguard_key) {
            (Some(version), Some(key)) => Some(Agent {
                version: version.clone(),
                wireguard_key: parsed(key)?,
                candidates: serde_json::from_str(&raw.candidates).map_err(json_error)?,
            }),
            (None, None) => None,
            _ => return Err(contradiction("an agent with a version or a key alone".to_owned())),
        };
        let resolved = match (&raw.pinned_image, &raw.image_command) {
            (Some(pinned), Some(command)) => Some(ResolvedImage { pinned: pinned.clone(), command: list(command)? }),
            _ => None,
        };
        Ok(Self {
            id: parsed(&raw.id)?,
            org_id: parsed(&raw.org_id)?,
            owner_id: parsed(&raw.owner_id)?,
            command: raw.command.as_deref().map(list).transpose()?,
            resolved,
            resources: ResourceSpec { cpu_millicores: number(raw.cpu_millicores)?, memory_mb: number(raw.memory_mb)? },
            created_at: timestamp(raw.created_at)?,
            expires_at: timestamp(raw.expires_at)?,
            life: life(&raw)?,
            address: parsed(&raw.address)?,
            agent,
            name: raw.name,
            image: raw.image,
            repo: raw.repo,
            branch: raw.branch,
        })
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::{super::tests::temporary, *};
    use crate::weaver::{Ending, Unchanged};

    const LIMITS: Limits = Limits { of_organisation: 3, of_user: 100 };

    async fn user(store: &Store) -> (UserId, OrgId) {
        let user = store.add_user(&format!("u{}", UserId::generate().uuid().simple())).await.expect("added");
        (user, store.organisations(user).await.expect("listed")[0].id)
    }

    async fn add(store: &Store, (owner_id, org_id): (UserId, OrgId), name: Option<&str>, key: Option<&str>) -> Added {
        let now = Timestamp::now();
        let new = NewWeaver {
            id: WeaverId::generate(),
            name: name.map(ToOwned::to_owned),
            org_id,
            owner_id,
            image: "image".to_owned(),
            repo: None,
            branch: None,
            command: Some(vec!["sh".to_owned()]),
            sealed_env: vec![1, 2, 3],
            resources: ResourceSpec { cpu_millicores: 500, memory_mb: 512 },
            created_at: now,
            expires_at: now + SignedDuration::from_hours(4),
        };
        let idempotency = key.map(|key| Idempotency { key, body_hash: "hash" });
        store.add_weaver(&new, idempotency, LIMITS, &Event::new(EventKind::Created, "made")).await.expect("answered")
    }

    async fn added(store: &Store, owner: (UserId, OrgId), name: Option<&str>) -> Weaver {
        match add(store, owner, name, None).await {
            Added::New(weaver) => weaver,
            other => panic!("{other:?}"),
        }
    }

    async fn end(store: &Store, id: WeaverId, now: Timestamp) {
        let ending = Ending::Exited { code: 3, out_of_memory: false };
        let done = store.transition(id, |weaver| weaver.ended(now, &ending).map(Some)).await.expect("written");
        assert!(matches!(done, Transition::Done(..)), "{done:?}");
    }

    #[tokio::test]
    async fn a_weaver_reads_as_it_was_written_in_every_state() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, Some("one")).await.id;
        let now = Timestamp::from_millisecond(1_700_000_000_000).expect("a time");
        let image = ResolvedImage { pinned: "image@sha256:00".to_owned(), command: vec!["run".to_owned()] };
        let key = loom_api::WireGuardKey([7; 32]);
        type Step<'a> = Box<dyn FnOnce(&mut Weaver) -> Result<Option<Event>, Unchanged> + 'a>;
        let steps: Vec<Step<'_>> = vec![
            Box::new(|weaver| weaver.waits("no node fits").map(Some)),
            Box::new(|weaver| weaver.image_resolved(&image).map(|()| None)),
            Box::new(|weaver| weaver.registered("1.0", key).map(|()| None)),
            Box::new(|weaver| weaver.reachable_at(&["[::1]:9".parse().expect("an address")]).map(|()| None)),
            Box::new(|weaver| weaver.ran().map(Some)),
            Box::new(|weaver| weaver.ended(now, &Ending::Exited { code: 3, out_of_memory: false }).map(Some)),
            Box::new(|weaver| weaver.deleted(now, "ada").map(Some)),
        ];
        for step in steps {
            let Transition::Done(written, _) = store.transition(id, step).await.expect("written") else {
                panic!("refused")
            };
            assert_eq!(store.weaver(id).await.expect("read"), Some(written));
        }
        let kinds: Vec<_> = store.events(id, 0).await.expect("read").into_iter().map(|event| event.kind).collect();
        use EventKind::{Backend, Created, Deleted, Exited, Ready};
        assert_eq!(kinds, [Created, Backend, Ready, Exited, Deleted]);
        assert_eq!(store.sealed_env(id).await.expect("read"), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_row_that_contradicts_itself_is_an_error_for_itself_only() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let (good, bad) = (added(&store, owner, None).await.id, added(&store, owner, None).await.id);
        for damage in [
            "status = 'Dancing'",
            "status = 'Running', exit_code = 1",
            "status = 'Failed', ended_at = 1, ended_by = 'itself', exit_code = 99999999999",
            "status = 'Succeeded', ended_at = 1, ended_by = 'itself', exit_code = 1",
            "status = 'Failed', ended_at = 1, ended_by = 'magic', exit_code = NULL",
        ] {
            let statement = format!("UPDATE weavers SET {damage} WHERE id = ?");
            sqlx::query(sqlx::AssertSqlSafe(statement))
                .bind(bad.to_string())
                .execute(store.writer())
                .await
                .expect(damage);
            assert!(store.weaver(bad).await.is_err(), "{damage}");
            let page = Page { with_removed: true, before: None, limit: 10 };
            let listed = store.weavers_of(owner.1, page).await.expect("listed");
            assert_eq!(listed.into_iter().map(|weaver| weaver.id).collect::<Vec<_>>(), [good], "{damage}");
        }
    }

    #[tokio::test]
    async fn limits_hold_for_requests_at_the_same_time() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let requests = (0..24).map(|_| add(&store, owner, None, None));
        let answers = futures_util::future::join_all(requests).await;
        let made = answers.iter().filter(|answer| matches!(answer, Added::New(_))).count();
        assert_eq!(made, 3);
        let refused = answers.iter().filter(|answer| matches!(answer, Added::TooMany(Limit::Organisation))).count();
        assert_eq!(refused, 21);
    }

    #[tokio::test]
    async fn an_idempotency_key_makes_one_weaver() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let answers =
            futures_util::future::join_all((0..8).map(|_| add(&store, owner, Some("once"), Some("key")))).await;
        let ids: std::collections::HashSet<_> = answers
            .iter()
            .map(|answer| match answer {
                Added::New(weaver) | Added::Earlier(weaver) => weaver.id,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ids.len(), 1);
        assert!(matches!(add(&store, owner, Some("once"), None).await, Added::NameTaken));
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
    async fn events_of_one_weaver_are_bounded_and_its_end_is_written_all_the_same() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, None).await.id;
        let event = Event::new(EventKind::AgentConnected, "again");
        for _ in 1..MAX_EVENTS {
            assert!(store.add_event(id, &event).await.expect("written"));
        }
        assert!(!store.add_event(id, &event).await.expect("full"));
        end(&store, id, Timestamp::now()).await;
        let last = store.events(id, MAX_EVENTS).await.expect("read").pop().expect("one more");
        assert_eq!(last.kind, EventKind::Exited);
    }

    #[tokio::test]
    async fn an_ended_weaver_is_forgotten_with_its_events_only_after_its_time() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, None).await.id;
        let now = Timestamp::now();
        store.keep_output(id, &vec![7; MAX_TAIL + 1]).await.expect("kept");
        store.keep_output(id, b"later").await.expect("nothing to do");
        assert_eq!(store.output(id).await.expect("read").len(), MAX_TAIL);
        end(&store, id, now).await;
        assert_eq!(store.forget_ended(now).await.expect("nothing yet"), 0);
        assert_eq!(store.forget_ended(now + SignedDuration::from_secs(1)).await.expect("forgotten"), 1);
        assert_eq!(store.weaver(id).await.expect("read"), None);
        assert!(store.output(id).await.expect("read").is_empty());
    }
}
