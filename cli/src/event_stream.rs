//! A weaver's events as they come, whatever becomes of the connection: a broken one is replaced, and goes on where it
//! was.

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

/// After so long without an event the connection is replaced: it may have died without a word.
const QUIET: Duration = Duration::from_secs(60);

type Events = Pin<Box<dyn Stream<Item = Result<WeaverEvent, ClientError>> + Send>>;

/// One weaver's events, from the oldest on.
pub(crate) struct EventStream {
    client: Client,
    weaver: WeaverId,
    after: i64,
    open: Option<Events>,
    backoff: Backoff,
}

impl EventStream {
    /// All events of a weaver. Connects with the first [`Self::next`].
    pub(crate) fn new(client: Client, weaver: WeaverId) -> Self {
        Self { client, weaver, after: 0, open: None, backoff: Backoff::default() }
    }

    /// The next event, however long it takes.
    ///
    /// # Errors
    ///
    /// When the server says that there will be none: the weaver or the login is no more.
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
            match tokio::time::timeout(QUIET, events.next()).await {
                Ok(Some(Ok(event))) => {
                    self.backoff.reset();
                    self.after = event.id;
                    return Ok(event);
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

/// Whether another try would end the same.
pub(crate) fn is_final(error: &ClientError) -> bool {
    match error {
        ClientError::BadUrl { .. } => true,
        ClientError::Api(error) => !matches!(
            error.code,
            ErrorCode::Internal | ErrorCode::KubernetesError | ErrorCode::AgentUnreachable | ErrorCode::Unknown
        ),
        ClientError::Unreachable { failure, .. } => !failure.is_passing(),
        ClientError::Protocol { .. } => false,
    }
}
