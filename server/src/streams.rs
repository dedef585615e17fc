//! Byte streams that agents dial back: the server asks over the control link, the agent opens one WebSocket for each.

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::extract::ws::WebSocket;
use loom_api::{
    WeaverId,
    agent::{ServerMessage, StreamKind},
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use crate::{
    agents::{AgentError, Hub},
    sessions::Session,
};

/// How long an agent may take to dial back.
const DIAL_BACK: Duration = Duration::from_secs(10);
/// Streams that may wait for their agents, in all.
const MAX_PENDING: usize = 4096;
/// The same for one agent: one that does not answer keeps no other's streams out.
const MAX_PENDING_PER_AGENT: usize = 256;

/// Streams that were asked for and have not come yet.
pub struct Streams {
    agents: Arc<Hub>,
    pending: Mutex<HashMap<Uuid, Pending>>,
}

struct Pending {
    weaver: WeaverId,
    arrived: oneshot::Sender<Result<AgentStream, String>>,
}

/// A stream that an agent has dialled back. It is to end when the agent's `session` has lost its right.
pub struct AgentStream {
    pub socket: WebSocket,
    pub session: Session,
}

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The agent said why.
    #[error("{0}")]
    Refused(String),
    #[error("too many streams wait for their agents")]
    TooMany,
}

/// Where an agent's stream is wanted.
pub struct Wanted(Pending);

impl Wanted {
    /// Hands the stream over. Who waited may have gone; then it closes, and the agent sees that.
    pub fn arrived(self, stream: AgentStream) {
        let _ = self.0.arrived.send(Ok(stream));
    }
}

impl Streams {
    pub fn new(agents: Arc<Hub>) -> Self {
        Self { agents, pending: Mutex::default() }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<Uuid, Pending>> {
        self.pending.lock()
    }

    /// Asks a weaver's agent for a stream, and waits for it.
    ///
    /// # Errors
    ///
    /// When no agent is connected, or it does not answer, or cannot open the stream.
    pub async fn open(&self, weaver: WeaverId, kind: StreamKind) -> Result<AgentStream, StreamError> {
        let stream = Uuid::new_v4();
        let (arrived, wait) = oneshot::channel();
        {
            let mut pending = self.pending();
            let of_agent = pending.values().filter(|entry| entry.weaver == weaver).count();
            if pending.len() >= MAX_PENDING || of_agent >= MAX_PENDING_PER_AGENT {
                return Err(StreamError::TooMany);
            }
            pending.insert(stream, Pending { weaver, arrived });
        }
        // Removes the entry however this ends, also when the client goes and this is dropped.
        let _cleared = Cleared { streams: self, stream };
        if !self.agents.send(weaver, ServerMessage::OpenStream { stream, kind }) {
            return Err(AgentError::NotConnected.into());
        }
        match timeout(DIAL_BACK, wait).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(reason))) => Err(StreamError::Refused(reason)),
            Ok(Err(_)) => Err(AgentError::NotConnected.into()),
            Err(_) => Err(AgentError::NoAnswer.into()),
        }
    }

    /// An agent cannot open a stream; whether it was asked for it.
    pub fn failed(&self, weaver: WeaverId, stream: Uuid, reason: String) -> bool {
        let Some(Wanted(pending)) = self.take(weaver, stream) else { return false };
        // Who waited may have gone.
        let _ = pending.arrived.send(Err(reason));
        true
    }

    /// A weaver's agent is no longer connected: who waits for it waits in vain.
    pub fn lost(&self, weaver: WeaverId) {
        self.pending().retain(|_, pending| pending.weaver != weaver);
    }

    /// The stream that an agent dials, if it was asked of that agent. It can be taken once.
    pub fn take(&self, weaver: WeaverId, stream: Uuid) -> Option<Wanted> {
        let mut pending = self.pending();
        pending.get(&stream).filter(|entry| entry.weaver == weaver)?;
        pending.remove(&stream).map(Wanted)
    }
}

struct Cleared<'a> {
    streams: &'a Streams,
    stream: Uuid,
}

impl Drop for Cleared<'_> {
    fn drop(&mut self) {
        self.streams.pending().remove(&self.stream);
    }
}
