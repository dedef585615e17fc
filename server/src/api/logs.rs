//! The output of a weaver's main program: from its agent while it runs, and what was kept of it afterwards.

use axum::{
    body::Body,
    extract::{Query, State, rejection::QueryRejection, ws::Message},
    http::header,
    response::{IntoResponse as _, Response},
};
use futures_util::StreamExt as _;
use loom_api::{ErrorCode, agent::StreamKind};
use serde::Deserialize;

use super::{
    auth::UserCaller,
    extract::Path,
    weavers::{find_present, or_gone},
};
use crate::{
    problem::{Answer, Problem},
    sessions::{Session, SessionKind},
    state::AppState,
};

/// What logs are asked with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    /// Goes on with what comes.
    #[serde(default)]
    follow: bool,
}

/// The main program's output, as it wrote it to its terminal.
#[utoipa::path(get, path = "/api/weavers/{id}/logs", tag = "weavers",
    params(("id" = String, Path), ("follow" = Option<bool>, Query, description = "goes on until the program ends")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "4XX", body = loom_api::ErrorBody)),
    security(("bearer" = [])))]
pub async fn logs(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    query: Result<Query<LogsQuery>, QueryRejection>,
) -> Answer<Response> {
    let Query(query) = query.map_err(|error| Problem::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let row = find_present(&app, &caller, &reference).await?;
    let body = if row.has_ended() {
        Body::from(app.store.output(row.id).await?)
    } else {
        let session = app.sessions.register(SessionKind::Logs, caller.principal(Some(row.org_id)))?;
        let opened = app.streams.open(row.id, StreamKind::Logs { follow: query.follow }).await;
        let agent = or_gone(&app, row.id, opened).await?;
        // The stream ends where the agent closes it; a connection that is cut ends the same.
        Body::from_stream(
            agent
                .filter_map(async |frame| match frame {
                    Ok(Message::Binary(bytes)) => Some(Ok::<_, axum::Error>(bytes)),
                    Ok(_) => None,
                    Err(error) => Some(Err(error)),
                })
                .take_until(stopped(app, session)),
        )
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

async fn stopped(app: AppState, session: Session) {
    tokio::select! {
        () = app.stopping.cancelled() => {}
        () = session.ended() => {}
    }
}
