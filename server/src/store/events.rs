//! What happened to weavers, for their users: a bounded list for each.

use jiff::Timestamp;
use loom_api::{
    WeaverId,
    weaver::{EventKind, WeaverEvent},
};
use sqlx::{Sqlite, Transaction};

use super::{Store, millis, timestamp};
use crate::weaver::Event;

/// The most events that one request is given.
const MAX_EVENTS_READ: i64 = 10_000;
/// The most events of one kind that a weaver has, besides those that its life's transitions write: an agent that
/// reconnects forever must not fill the disk, nor keep the warning out that the weaver is about to end.
const MAX_OF_KIND: i64 = 500;

impl Store {
    /// Writes an event that no transition of the weaver's life wrote; whether there was room for one more.
    pub async fn add_event(&self, weaver: WeaverId, event: &Event) -> sqlx::Result<bool> {
        if self.is_low_on_space() {
            return Ok(false);
        }
        let mut transaction = self.begin_write().await?;
        let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM events WHERE weaver_id = ? AND kind = ?")
            .bind(weaver.to_string())
            .bind(kind_text(event.kind)?)
            .fetch_one(&mut *transaction)
            .await?;
        if count >= MAX_OF_KIND {
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

/// Writes an event in the transaction that made it happen.
pub(super) async fn insert_event(
    transaction: &mut Transaction<'_, Sqlite>,
    weaver: WeaverId,
    event: &Event,
) -> sqlx::Result<()> {
    sqlx::query("INSERT INTO events (weaver_id, at, kind, message) VALUES (?, ?, ?, ?)")
        .bind(weaver.to_string())
        .bind(millis(Timestamp::now()))
        .bind(kind_text(event.kind)?)
        .bind(&event.message)
        .execute(&mut **transaction)
        .await
        .map(drop)
}

/// A kind as the database and the API have it.
fn kind_text(kind: EventKind) -> sqlx::Result<String> {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(text)) => Ok(text),
        other => Err(sqlx::Error::Encode(format!("{kind:?} is written as {other:?}").into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{
        tests::temporary,
        weavers::tests::{added, end, user},
    };

    #[tokio::test]
    async fn events_of_one_weaver_are_bounded_and_its_end_is_written_all_the_same() {
        let (_directory, store) = temporary().await;
        let id = added(&store, user(&store).await, None).await.id;
        let event = Event::new(EventKind::AgentConnected, "again");
        for _ in 0..MAX_OF_KIND {
            assert!(store.add_event(id, &event).await.expect("written"));
        }
        assert!(!store.add_event(id, &event).await.expect("full"));
        let warning = Event::new(EventKind::Expiring, "soon");
        assert!(store.add_event(id, &warning).await.expect("written"), "another kind has room");
        end(&store, id, Timestamp::now()).await;
        let last = store.events(id, 0).await.expect("read").pop().expect("one more");
        assert_eq!(last.kind, EventKind::Exited);
    }
}
