//! Weavers and their events.
//!
//! A weaver's row is changed by compare-and-swap on its `version`: who decides from an old row changes nothing and
//! looks again. Rows stay after the weaver's end, for its events and its last output, until [`Store::forget_ended`].

use std::net::{Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use loom_api::{
    OrgId, UserId, WeaverId, WireGuardKey,
    weaver::{EventKind, ResourceSpec, WeaverEvent, WeaverStatus},
};
use sqlx::FromRow;

use super::{Store, millis, parsed, timestamp};

/// The part of the deployment's prefix that weavers live in.
const WEAVER_SUBNET: u16 = 0xa;
/// The most rows that one request is given.
const MOST: i64 = 10_000;

/// Who ended a weaver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    /// A user deleted it.
    User,
    /// Its deadline passed.
    Deadline,
    /// Its main program ended, or it failed.
    Itself,
}

/// A weaver to be.
#[derive(Debug)]
pub struct NewWeaver {
    /// Its id.
    pub id: WeaverId,
    /// See [`loom_api::weaver::Weaver`] for these.
    pub name: Option<String>,
    /// Its organisation.
    pub org_id: OrgId,
    /// Who makes it.
    pub owner_id: UserId,
    /// The image.
    pub image: String,
    /// The repository.
    pub repo: Option<String>,
    /// The branch.
    pub branch: Option<String>,
    /// The main program.
    pub command: Option<Vec<String>>,
    /// The environment, sealed.
    pub sealed_env: Vec<u8>,
    /// What it may use.
    pub resources: ResourceSpec,
    /// Now.
    pub created_at: Timestamp,
    /// Its end.
    pub expires_at: Timestamp,
}

/// A weaver's row.
#[derive(Debug, Clone, PartialEq)]
pub struct WeaverRow {
    /// Its id.
    pub id: WeaverId,
    /// Grows with every change.
    pub version: i64,
    /// Its name.
    pub name: Option<String>,
    /// Its organisation.
    pub org_id: OrgId,
    /// Who made it.
    pub owner_id: UserId,
    /// The image.
    pub image: String,
    /// The repository.
    pub repo: Option<String>,
    /// The branch.
    pub branch: Option<String>,
    /// The main program.
    pub command: Option<Vec<String>>,
    /// The image by its digest, once that is known.
    pub pinned_image: Option<String>,
    /// The program that the image runs, once that is known.
    pub image_command: Option<Vec<String>>,
    /// The environment, sealed.
    pub sealed_env: Vec<u8>,
    /// What it may use.
    pub resources: ResourceSpec,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its end.
    pub expires_at: Timestamp,
    /// Whether there should be a pod.
    pub wanted: bool,
    /// How it is.
    pub status: WeaverStatus,
    /// Why.
    pub reason: Option<String>,
    /// The main program's exit code.
    pub exit_code: Option<i32>,
    /// The end of the main program's output.
    pub tail: Option<Vec<u8>>,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// Who ended it.
    pub ended_by: Option<EndedBy>,
    /// Its address inside the tunnel.
    pub address: Ipv6Addr,
    /// Its agent's version, once that has registered.
    pub agent_version: Option<String>,
    /// Its agent's WireGuard key, once that has registered.
    pub wireguard_key: Option<WireGuardKey>,
    /// UDP addresses where its agent can perhaps be reached.
    pub candidates: Vec<SocketAddr>,
}

#[derive(FromRow)]
struct RawWeaver {
    id: String,
    version: i64,
    name: Option<String>,
    org_id: String,
    owner_id: String,
    image: String,
    repo: Option<String>,
    branch: Option<String>,
    command: Option<String>,
    pinned_image: Option<String>,
    image_command: Option<String>,
    sealed_env: Vec<u8>,
    cpu_millicores: i64,
    memory_mb: i64,
    created_at: i64,
    expires_at: i64,
    wanted: i64,
    status: String,
    reason: Option<String>,
    exit_code: Option<i64>,
    tail: Option<Vec<u8>>,
    ended_at: Option<i64>,
    ended_by: Option<String>,
    address: String,
    agent_version: Option<String>,
    wireguard_key: Option<String>,
    candidates: String,
}

impl Store {
    /// Records a weaver, and with it the idempotency key it was asked for with.
    ///
    /// # Errors
    ///
    /// The database's; a unique violation when the name is taken or the key was used meanwhile.
    pub async fn add_weaver(&self, new: &NewWeaver, idempotency: Option<(&str, &str)>) -> sqlx::Result<()> {
        let mut transaction = self.begin_write().await?;
        sqlx::query(
            "INSERT INTO weavers (id, name, org_id, owner_id, image, repo, branch, command, sealed_env, cpu_millicores, \
             memory_mb, created_at, expires_at, status, address) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'Pending', ?)",
        )
        .bind(new.id.to_string())
        .bind(&new.name)
        .bind(new.org_id.to_string())
        .bind(new.owner_id.to_string())
        .bind(&new.image)
        .bind(&new.repo)
        .bind(&new.branch)
        .bind(new.command.as_ref().map(|command| serde_json::json!(command).to_string()))
        .bind(&new.sealed_env)
        .bind(i64::from(new.resources.cpu_millicores))
        .bind(i64::from(new.resources.memory_mb))
        .bind(millis(new.created_at))
        .bind(millis(new.expires_at))
        .bind(self.address(WEAVER_SUBNET, new.id.uuid().as_bytes()).to_string())
        .execute(&mut *transaction)
        .await?;
        if let Some((key, body_hash)) = idempotency {
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
        transaction.commit().await
    }

    /// The weaver that was made with an idempotency key, and the hash of the request.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn idempotent(&self, user: UserId, key: &str) -> sqlx::Result<Option<(WeaverId, String)>> {
        let row: Option<(String, String)> =
            sqlx::query_as("SELECT weaver_id, body_hash FROM idempotency_keys WHERE user_id = ? AND key = ?")
                .bind(user.to_string())
                .bind(key)
                .fetch_optional(self.reader())
                .await?;
        row.map(|(id, hash)| Ok((parsed(&id)?, hash))).transpose()
    }

    /// A weaver by its id.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn weaver(&self, id: WeaverId) -> sqlx::Result<Option<WeaverRow>> {
        let raw: Option<RawWeaver> = sqlx::query_as("SELECT * FROM weavers WHERE id = ?")
            .bind(id.to_string())
            .fetch_optional(self.reader())
            .await?;
        raw.map(TryInto::try_into).transpose()
    }

    /// The weavers of an organisation, oldest first.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn weavers_of(&self, org: OrgId) -> sqlx::Result<Vec<WeaverRow>> {
        let raw: Vec<RawWeaver> = sqlx::query_as("SELECT * FROM weavers WHERE org_id = ? ORDER BY created_at LIMIT ?")
            .bind(org.to_string())
            .bind(MOST)
            .fetch_all(self.reader())
            .await?;
        raw.into_iter().map(TryInto::try_into).collect()
    }

    /// How many weavers of an organisation have not ended.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn live_weavers(&self, org: OrgId) -> sqlx::Result<i64> {
        sqlx::query_scalar("SELECT COUNT(*) FROM weavers WHERE org_id = ? AND ended_at IS NULL")
            .bind(org.to_string())
            .fetch_one(self.reader())
            .await
    }

    /// How many weavers have not ended, by status.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn count_by_status(&self) -> sqlx::Result<Vec<(String, i64)>> {
        sqlx::query_as("SELECT status, COUNT(*) FROM weavers WHERE ended_at IS NULL GROUP BY status")
            .fetch_all(self.reader())
            .await
    }

    /// All weavers that have not ended.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn all_live(&self) -> sqlx::Result<Vec<WeaverRow>> {
        let raw: Vec<RawWeaver> = sqlx::query_as("SELECT * FROM weavers WHERE ended_at IS NULL ORDER BY created_at")
            .fetch_all(self.reader())
            .await?;
        raw.into_iter().map(TryInto::try_into).collect()
    }

    /// Writes back what was changed in a row, unless it was changed by another meanwhile: then nothing, and `false`.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn update_weaver(&self, row: &mut WeaverRow) -> sqlx::Result<bool> {
        let candidates = serde_json::to_string(&row.candidates).map_err(|error| sqlx::Error::Encode(error.into()))?;
        let done = sqlx::query(
            "UPDATE weavers SET version = version + 1, expires_at = ?, wanted = ?, status = ?, reason = ?, exit_code = ?, \
             tail = ?, ended_at = ?, ended_by = ?, agent_version = ?, wireguard_key = ?, candidates = ?, \
             pinned_image = ?, image_command = ? \
             WHERE id = ? AND version = ?",
        )
        .bind(millis(row.expires_at))
        .bind(i64::from(row.wanted))
        .bind(row.status.to_string())
        .bind(&row.reason)
        .bind(row.exit_code.map(i64::from))
        .bind(&row.tail)
        .bind(row.ended_at.map(millis))
        .bind(row.ended_by.map(EndedBy::as_str))
        .bind(&row.agent_version)
        .bind(row.wireguard_key.map(|key| key.to_string()))
        .bind(candidates)
        .bind(&row.pinned_image)
        .bind(row.image_command.as_ref().map(|command| serde_json::json!(command).to_string()))
        .bind(row.id.to_string())
        .bind(row.version)
        .execute(self.writer())
        .await?;
        let swapped = done.rows_affected() == 1;
        row.version += i64::from(swapped);
        Ok(swapped)
    }

    /// Changes a weaver: reads it, lets `change` decide, and writes it back, again and again until nobody came between.
    /// `change` says whether there is anything to write. The row as it is afterwards, if there is one.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn change_weaver(
        &self,
        id: WeaverId,
        mut change: impl FnMut(&mut WeaverRow) -> bool,
    ) -> sqlx::Result<Option<WeaverRow>> {
        loop {
            let Some(mut row) = self.weaver(id).await? else { return Ok(None) };
            if !change(&mut row) || self.update_weaver(&mut row).await? {
                return Ok(Some(row));
            }
        }
    }

    /// Forgets weavers that ended before `time`, with everything that hangs on them.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn forget_ended(&self, time: Timestamp) -> sqlx::Result<u64> {
        let mut transaction = self.begin_write().await?;
        macro_rules! forget {
            ($table:literal, $column:literal) => {
                sqlx::query(concat!(
                    "DELETE FROM ",
                    $table,
                    " WHERE ",
                    $column,
                    " IN (SELECT id FROM weavers WHERE ended_at IS NOT NULL AND wanted = 0 AND ended_at < ?)"
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
        let forgotten = forget!("weavers", "id");
        transaction.commit().await?;
        Ok(forgotten)
    }

    /// Writes an event.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn add_event(&self, weaver: WeaverId, kind: EventKind, message: &str) -> sqlx::Result<()> {
        let kind = serde_json::to_value(kind).map_err(|error| sqlx::Error::Encode(error.into()))?;
        sqlx::query("INSERT INTO events (weaver_id, at, kind, message) VALUES (?, ?, ?, ?)")
            .bind(weaver.to_string())
            .bind(millis(Timestamp::now()))
            .bind(kind.as_str().unwrap_or("unknown"))
            .bind(message)
            .execute(self.writer())
            .await
            .map(drop)
    }

    /// The events of a weaver after the one with the number `after`, in order.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn events(&self, weaver: WeaverId, after: i64) -> sqlx::Result<Vec<WeaverEvent>> {
        let rows: Vec<(i64, i64, String, String)> = sqlx::query_as(
            "SELECT id, at, kind, message FROM events WHERE weaver_id = ? AND id > ? ORDER BY id LIMIT ?",
        )
        .bind(weaver.to_string())
        .bind(after)
        .bind(MOST)
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

impl EndedBy {
    const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Deadline => "deadline",
            Self::Itself => "itself",
        }
    }
}

impl TryFrom<RawWeaver> for WeaverRow {
    type Error = sqlx::Error;

    fn try_from(raw: RawWeaver) -> sqlx::Result<Self> {
        let json_error = |error: serde_json::Error| sqlx::Error::Decode(error.into());
        let list = |json: Option<String>| {
            json.map(|json| serde_json::from_str::<Vec<String>>(&json)).transpose().map_err(json_error)
        };
        let number = |value: i64| u32::try_from(value).map_err(|error| sqlx::Error::Decode(error.into()));
        Ok(Self {
            id: parsed(&raw.id)?,
            version: raw.version,
            name: raw.name,
            org_id: parsed(&raw.org_id)?,
            owner_id: parsed(&raw.owner_id)?,
            image: raw.image,
            repo: raw.repo,
            branch: raw.branch,
            command: list(raw.command)?,
            pinned_image: raw.pinned_image,
            image_command: list(raw.image_command)?,
            sealed_env: raw.sealed_env,
            resources: ResourceSpec { cpu_millicores: number(raw.cpu_millicores)?, memory_mb: number(raw.memory_mb)? },
            created_at: timestamp(raw.created_at)?,
            expires_at: timestamp(raw.expires_at)?,
            wanted: raw.wanted != 0,
            status: serde_json::from_value(raw.status.into()).unwrap_or(WeaverStatus::Unknown),
            reason: raw.reason,
            exit_code: raw.exit_code.and_then(|code| i32::try_from(code).ok()),
            tail: raw.tail,
            ended_at: raw.ended_at.map(timestamp).transpose()?,
            ended_by: match raw.ended_by.as_deref() {
                Some("user") => Some(EndedBy::User),
                Some("deadline") => Some(EndedBy::Deadline),
                Some(_) => Some(EndedBy::Itself),
                None => None,
            },
            address: parsed(&raw.address)?,
            agent_version: raw.agent_version,
            wireguard_key: raw.wireguard_key.map(|key| parsed(&key)).transpose()?,
            candidates: serde_json::from_str(&raw.candidates).map_err(json_error)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::{super::tests::temporary, *};

    /// A weaver of a new user's.
    async fn add(store: &Store, name: Option<&str>) -> (UserId, WeaverId) {
        let owner = store.add_user(&format!("u{}", UserId::generate().uuid().simple())).await.expect("added");
        let org_id = store.organisations(owner).await.expect("listed")[0].id;
        let new = NewWeaver {
            id: WeaverId::generate(),
            name: name.map(ToOwned::to_owned),
            org_id,
            owner_id: owner,
            image: "image".to_owned(),
            repo: None,
            branch: None,
            command: Some(vec!["sh".to_owned()]),
            sealed_env: vec![1, 2, 3],
            resources: ResourceSpec { cpu_millicores: 500, memory_mb: 512 },
            created_at: Timestamp::now(),
            expires_at: Timestamp::now() + SignedDuration::from_hours(4),
        };
        store.add_weaver(&new, Some(("key", "hash"))).await.expect("added");
        (owner, new.id)
    }

    #[tokio::test]
    async fn a_change_from_an_old_row_changes_nothing() {
        let (_directory, store) = temporary().await;
        let (_, id) = add(&store, Some("one")).await;
        let mut first = store.weaver(id).await.expect("read").expect("there");
        let mut second = first.clone();
        first.reason = Some("first".to_owned());
        assert!(store.update_weaver(&mut first).await.expect("written"));
        second.reason = Some("second".to_owned());
        assert!(!store.update_weaver(&mut second).await.expect("refused"));
        assert_eq!(store.weaver(id).await.expect("read"), Some(first));
    }

    #[tokio::test]
    async fn an_ended_weaver_is_forgotten_with_its_events_only_after_its_time() {
        let (_directory, store) = temporary().await;
        let (owner, id) = add(&store, None).await;
        store.add_event(id, EventKind::Created, "made").await.expect("written");
        assert_eq!(store.events(id, 0).await.expect("read").len(), 1);
        assert_eq!(store.idempotent(owner, "key").await.expect("read"), Some((id, "hash".to_owned())));
        let now = Timestamp::now();
        store
            .change_weaver(id, |row| {
                row.wanted = false;
                row.ended_at = Some(now);
                true
            })
            .await
            .expect("ended");
        assert_eq!(store.forget_ended(now).await.expect("nothing yet"), 0);
        assert_eq!(store.forget_ended(now + SignedDuration::from_secs(1)).await.expect("forgotten"), 1);
        assert_eq!(store.weaver(id).await.expect("read"), None);
    }
}
