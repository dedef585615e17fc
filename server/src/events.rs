//! The weavers' events: rows in the database, and notifications for those who wait for more.

use std::{collections::HashMap, sync::Arc};

use loom_api::WeaverId;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{metrics::Metrics, store::Store, weaver::Event};

/// Writes events and tells who listens. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    store: Store,
    metrics: Arc<Metrics>,
    /// One for each weaver that somebody listens to: an event of one weaver wakes nobody else.
    subscribers: Arc<Mutex<HashMap<WeaverId, watch::Sender<()>>>>,
}

impl Events {
    pub fn new(store: Store, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics, subscribers: Arc::default() }
    }

    /// Writes an event that is no transition of the weaver's life. A failure is logged: what happened has happened all
    /// the same.
    pub async fn write(&self, weaver: WeaverId, event: Event) {
        match self.store.add_event(weaver, &event).await {
            Ok(true) => self.announce(weaver, &event),
            Ok(false) => tracing::debug!(%weaver, "it has had too many events: one more is left out"),
            Err(error) => tracing::error!(%weaver, "an event could not be written: {error}"),
        }
    }

    /// Tells of an event that has been written.
    pub fn announce(&self, weaver: WeaverId, Event { kind, message }: &Event) {
        // Escaped: some of it is said by agents, and by servers that they talk to.
        tracing::info!(%weaver, ?kind, "{}", message.escape_debug());
        self.metrics.stage(weaver, *kind);
        let mut subscribers = self.subscribers.lock();
        if subscribers.get(&weaver).is_some_and(|sender| sender.send(()).is_err()) {
            subscribers.remove(&weaver);
        }
    }

    /// Changes at every event of a weaver.
    pub fn subscribe(&self, weaver: WeaverId) -> watch::Receiver<()> {
        let mut subscribers = self.subscribers.lock();
        subscribers.retain(|_, sender| !sender.is_closed());
        subscribers.entry(weaver).or_insert_with(|| watch::Sender::new(())).subscribe()
    }
}
