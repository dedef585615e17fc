//! Byte streams that agents dial back: the server asks over the control link, the agent opens one WebSocket for each.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use axum::{
    extract::{Path, State, WebSocketUpgrade, ws::WebSocket},
    response::Response,
};
use loom_api::{
    ErrorCode, WeaverId,
    agent::{ServerMessage, StreamKind},
    attach::MAX_FRAME,
};
use tokio::{sync::oneshot, time::timeout};
use uuid::Uuid;

use crate::{
    agents::not_connected,
    api::weavers::gone,
    app::AppState,
    auth::AgentCaller,
    problem::{Answer, Problem},
};

/// How long an agent may take to dial back.
const DIAL_BACK: Duration = Duration::from_secs(10);
/// Streams that may wait for their agents, in all.
const MOST_PENDING: usize = 4096;

/// Streams that were asked for and have not come yet.
#[derive(Default)]
pub struct Streams(Mutex<HashMap<Uuid, Pending>>);

struct Pending {
    weaver: WeaverId,
    arrived: oneshot::Sender<Result<WebSocket, String>>,
}

impl Streams {
    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Pending>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks a weaver's agent for a stream, and waits for it.
    ///
    /// # Errors
    ///
    /// `weaver_gone` when the weaver has ended meanwhile, `weaver_not_ready` when no agent is connected or it cannot open
    /// the stream, `agent_unreachable` when it does not answer.
    pub async fn open(&self, app: &AppState, weaver: WeaverId, kind: StreamKind) -> Answer<WebSocket> {
        let stream = Uuid::new_v4();
        let (arrived, wait) = oneshot::channel();
        {
            let mut pending = self.pending();
            if pending.len() >= MOST_PENDING {
                return Err(
                    Problem::new(ErrorCode::Internal, "too many streams wait for their agents").hint("try again")
                );
            }
            pending.insert(stream, Pending { weaver, arrived });
        }
        // Removes the entry however this ends, also when the client goes and this is dropped.
        let _cleared = Cleared { streams: self, stream };
        if !app.agents.send(weaver, ServerMessage::OpenStream { stream, kind }) {
            return Err(without_agent(app, weaver).await);
        }
        match timeout(DIAL_BACK, wait).await {
            Ok(Ok(Ok(socket))) => Ok(socket),
            Ok(Ok(Err(reason))) => Err(Problem::new(ErrorCode::WeaverNotReady, reason)),
            Ok(Err(_)) => Err(without_agent(app, weaver).await),
            Err(_) => {
                Err(Problem::new(ErrorCode::AgentUnreachable, "the weaver's agent did not answer").hint("try again"))
            }
        }
    }

    /// An agent cannot open a stream.
    pub fn failed(&self, weaver: WeaverId, stream: Uuid, reason: String) {
        if let Some(pending) = self.take(weaver, stream) {
            // Who waited may have gone.
            let _ = pending.arrived.send(Err(reason));
        }
    }

    /// A weaver's agent is no longer connected: who waits for it waits in vain.
    pub fn lost(&self, weaver: WeaverId) {
        self.pending().retain(|_, pending| pending.weaver != weaver);
    }

    /// The stream that an agent dials, if it was asked of that agent. It can be taken once.
    fn take(&self, weaver: WeaverId, stream: Uuid) -> Option<Pending> {
        let mut pending = self.pending();
        if pending.get(&stream).is_some_and(|entry| entry.weaver == weaver) { pending.remove(&stream) } else { None }
    }
}

async fn without_agent(app: &AppState, weaver: WeaverId) -> Problem {
    match app.store.weaver(weaver).await {
        Ok(Some(row)) if row.ended_at.is_some() => gone(&row),
        _ => not_connected(),
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

/// A stream that an agent dials back.
#[utoipa::path(get, path = "/api/agent/streams/{stream}", tag = "agent", params(("stream" = String, Path)),
    responses((status = 101, description = "a WebSocket with the stream's frames")), security(("bearer" = [])))]
pub async fn dial_back(
    State(app): State<AppState>,
    AgentCaller(weaver): AgentCaller,
    Path(stream): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let unknown = || Problem::new(ErrorCode::NotFound, "nobody waits for this stream");
    let stream = stream.parse().map_err(|_| unknown())?;
    let pending = app.streams.take(weaver, stream).ok_or_else(unknown)?;
    let upgrade = upgrade.max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME);
    Ok(upgrade.on_upgrade(async move |socket| {
        // Who waited may have gone; then the socket closes, and the agent sees that.
        let _ = pending.arrived.send(Ok(socket));
    }))
}
