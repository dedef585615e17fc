//! A weaver's events as they come. A broken connection is replaced, and the stream continues after the last event.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt as _};
use loom_api::{
    ErrorCode, WeaverId,
    client::{Client, ClientError},
    weaver::WeaverEvent,
};

use crate::{
    backoff::Backoff,
    error::{CliError, Result},
};

/// A connection without an event for this long is replaced: it may be dead without any sign of it.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);

type Events = Pin<Box<dyn Stream<Item = Result<WeaverEvent, ClientError>> + Send>>;

pub(crate) struct EventStream {
    client: Client,
    weaver: WeaverId,
    after: i64,
    open: Option<Events>,
    backoff: Backoff,
}

impl EventStream {
    /// All events of a weaver, from the oldest. Connects at the first [`Self::next`].
    pub(crate) fn new(client: Client, weaver: WeaverId) -> Self {
        Self { client, weaver, after: 0, open: None, backoff: Backoff::default() }
    }

    /// Waits for the next event, however long it takes.
    ///
    /// # Errors
    ///
    /// When there will be none: the weaver is gone, or the login is no longer valid.
    pub(crate) async fn next(&mut self) -> Result<WeaverEvent> {
        loop {
            let Some(events) = &mut self.open else {
                match self.connect().await {
                    Ok(events) => self.open = Some(events),
                    Err(error) if is_final(&error) => {
                        return Err(CliError::from(error).doing("cannot follow the weaver's events"));
                    }
                    Err(_) => self.backoff.wait().await,
                }
                continue;
            };
            match tokio::time::timeout(QUIET_TIMEOUT, events.next()).await {
                Ok(Some(Ok(event))) => {
                    self.backoff.reset();
                    self.after = event.id;
                    return Ok(event);
                }
                Ok(Some(Err(error))) if is_final(&error) => {
                    return Err(CliError::from(error).doing("cannot follow the weaver's events any longer"));
                }
                Ok(Some(Err(_)) | None) => {
                    self.open = None;
                    self.backoff.wait().await;
                }
                Err(_) => self.open = None,
            }
        }
    }

    async fn connect(&self) -> Result<Events, ClientError> {
        let path = format!("/api/weavers/{}/events?follow=true&after={}", self.weaver, self.after);
        Ok(Box::pin(self.client.events(&path).await?))
    }
}

/// Whether a retry would fail the same way.
pub(crate) fn is_final(error: &ClientError) -> bool {
    match error {
        ClientError::BadUrl { .. } => true,
        ClientError::Api(error) => !matches!(
            error.code,
            ErrorCode::Internal | ErrorCode::KubernetesError | ErrorCode::AgentUnreachable | ErrorCode::Unknown
        ),
        ClientError::Unreachable { failure, .. } => !failure.is_transient(),
        ClientError::Protocol { .. } => false,
    }
}
