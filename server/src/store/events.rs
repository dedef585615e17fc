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
/// The most events of a weaver that its life's transitions did not write: an agent that reconnects for ever, or a
/// reason that changes for ever, must not fill the disk.
const MAX_EVENTS: i64 = 1_000;

impl Store {
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

/// Writes an event in the transaction that made it happen.
pub(super) async fn insert_event(
    transaction: &mut Transaction<'_, Sqlite>,
    weaver: WeaverId,
    event: &Event,
) -> sqlx::Result<()> {
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
        for _ in 1..MAX_EVENTS {
            assert!(store.add_event(id, &event).await.expect("written"));
        }
        assert!(!store.add_event(id, &event).await.expect("full"));
        end(&store, id, Timestamp::now()).await;
        let last = store.events(id, MAX_EVENTS).await.expect("read").pop().expect("one more");
        assert_eq!(last.kind, EventKind::Exited);
    }
}
