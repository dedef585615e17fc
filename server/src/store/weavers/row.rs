//! How a weaver is written down: the columns of its row, and the state that they stand for.

use loom_api::{
    WeaverId,
    weaver::{ResourceSpec, WeaverStatus},
};
use serde::Deserialize;
use sqlx::{FromRow, Sqlite, Transaction};

use super::super::{millis, parsed, timestamp};
use crate::{
    provision::ResolvedImage,
    weaver::{Agent, End, EndedBy, Life, Outcome, Weaver},
};

/// The columns of a [`RawWeaver`], in the order of its fields. Macros, because statements are whole at compile time.
macro_rules! columns {
    () => {
        "id, name, org_id, owner_id, image, repo, branch, command, pinned_image, image_command, \
         cpu_millicores, memory_mb, created_at, expires_at, status, reason, exit_code, ended_at, ended_by, \
         address, agent_version, wireguard_key, candidates"
    };
}

/// A statement that reads [`RawWeaver`]s.
macro_rules! select_weavers {
    ($rest:literal) => {
        concat!("SELECT ", columns!(), " FROM weavers ", $rest)
    };
}

/// The same for many: each row comes as one JSON array. As 23 values of its own it costs SQLite two allocations for each,
/// all of them under one lock of the whole process.
macro_rules! select_many_weavers {
    ($rest:literal) => {
        concat!("SELECT json_array(", columns!(), ") FROM weavers ", $rest)
    };
}

pub(super) use {columns, select_many_weavers, select_weavers};

#[derive(FromRow, Deserialize)]
pub(super) struct RawWeaver {
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

pub(in crate::store) async fn read(
    transaction: &mut Transaction<'_, Sqlite>,
    id: WeaverId,
) -> sqlx::Result<Option<Weaver>> {
    let raw: Option<RawWeaver> =
        sqlx::query_as(select_weavers!("WHERE id = ?")).bind(id.to_string()).fetch_optional(&mut **transaction).await?;
    raw.map(TryInto::try_into).transpose()
}

pub(in crate::store) async fn write(transaction: &mut Transaction<'_, Sqlite>, weaver: &Weaver) -> sqlx::Result<()> {
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

/// Rows that can be read: one that cannot must not take the others with it.
pub(super) fn readable(rows: Vec<RawWeaver>) -> Vec<Weaver> {
    let weavers = rows.into_iter().filter_map(|raw| {
        let id = raw.id.clone();
        unless_unreadable(&id, Weaver::try_from(raw))
    });
    weavers.collect()
}

/// What was read of a weaver's row. A row that cannot be read is logged, and left out of the list that it is for.
pub(in crate::store) fn unless_unreadable<T>(weaver: &str, read: sqlx::Result<T>) -> Option<T> {
    read.inspect_err(|error| tracing::error!(weaver, "its row cannot be read: {error}")).ok()
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

/// The same for rows of [`select_many_weavers`].
pub(super) fn readable_json(rows: &[String]) -> Vec<Weaver> {
    let raw = rows.iter().filter_map(|row| {
        serde_json::from_str(row).inspect_err(|error| tracing::error!("a weaver's row cannot be read: {error}")).ok()
    });
    readable(raw.collect())
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
    use jiff::Timestamp;
    use loom_api::weaver::EventKind;

    use super::{
        super::{
            Page, Transition,
            creation::tests::{added, user},
        },
        *,
    };
    use crate::{
        store::tests::temporary,
        weaver::{Ending, Event, Unchanged},
    };

    #[tokio::test]
    async fn a_weaver_reads_as_it_was_written_in_every_state() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, Some("one")).await.id;
        let now = Timestamp::from_millisecond(1_700_000_000_000).expect("a time");
        let image = ResolvedImage { pinned: "image@sha256:00".to_owned(), command: vec!["run".to_owned()] };
        let key = loom_api::WireGuardKey([7; 32]);
        type Step<'a> = Box<dyn Fn(&mut Weaver) -> Result<Option<Event>, Unchanged> + 'a>;
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
    }

    #[tokio::test]
    async fn a_row_that_contradicts_itself_is_an_error_for_itself_only() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let (good, bad) = (added(&store, owner, None).await.id, added(&store, owner, None).await.id);
        for damage in [
            "expires_at = 9223372036854775807",
            "expires_at = created_at, status = 'Dancing'",
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
            assert!(store.live_weavers().await.expect("listed").contains(&good), "{damage}");
            let deadlines = store.deadlines().await.expect("listed");
            assert!(deadlines.iter().any(|deadline| deadline.weaver == good), "{damage}");
        }
    }
}
