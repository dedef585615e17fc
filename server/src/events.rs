//! What happens to weavers: rows, and a bell for those who wait for more.

use std::sync::Arc;

use loom_api::{WeaverId, weaver::EventKind};
use tokio::sync::broadcast;

use crate::{metrics::Metrics, store::Store};

/// Bells that a slow listener may miss before it looks into the database again, which it does anyway.
const BACKLOG: usize = 256;

/// Writes events and tells who listens.
#[derive(Clone)]
pub struct Events {
    store: Store,
    metrics: Arc<Metrics>,
    bell: broadcast::Sender<WeaverId>,
}

impl Events {
    /// Events in a store.
    #[must_use]
    pub fn new(store: Store, metrics: Arc<Metrics>) -> Self {
        Self { store, metrics, bell: broadcast::Sender::new(BACKLOG) }
    }

    /// Writes an event. A failure is logged: what happened has happened all the same.
    pub async fn write(&self, weaver: WeaverId, kind: EventKind, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(%weaver, ?kind, "{message}");
        self.metrics.stage(weaver, kind);
        if let Err(error) = self.store.add_event(weaver, kind, &message).await {
            tracing::error!(%weaver, "an event could not be written: {error}");
        }
        // Nobody listening is no fault.
        let _ = self.bell.send(weaver);
    }

    /// Rings at every event of any weaver.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<WeaverId> {
        self.bell.subscribe()
    }
}
