//! Where agents dial the streams that the server asked them for.

use axum::{extract::State, response::Response};
use loom_api::{ErrorCode, attach::MAX_FRAME};

use super::{
    auth::AgentCaller,
    extract::{Path, Upgrade},
};
use crate::{
    problem::{Answer, Problem},
    sessions::SessionKind,
    state::AppState,
    streams::AgentStream,
};

/// A stream that an agent dials back.
#[utoipa::path(get, path = "/api/agent/streams/{stream}", tag = "agent", params(("stream" = String, Path)),
    responses((status = 101, description = "a WebSocket with the stream's frames")), security(("bearer" = [])))]
pub async fn dial_back(
    State(app): State<AppState>,
    caller: AgentCaller,
    Path(stream): Path<String>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let unknown = || Problem::new(ErrorCode::NotFound, "nobody waits for this stream");
    let stream = stream.parse().map_err(|_| unknown())?;
    let wanted = app.streams.take(caller.weaver, stream).ok_or_else(unknown)?;
    let session = app.sessions.register(SessionKind::Agent, caller.principal)?;
    let upgrade = upgrade.max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME);
    Ok(upgrade.on_upgrade(async move |socket| wanted.arrived(AgentStream { socket, session })))
}
