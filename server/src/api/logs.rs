//! The output of a weaver's main program: from its agent while it runs, and what was kept of it afterwards.

use std::io;

use axum::{
    body::Body,
    extract::{Query, State, rejection::QueryRejection, ws::Message},
    http::header,
    response::{IntoResponse as _, Response},
};
use futures_util::{Stream, StreamExt as _, future::ready};
use loom_api::{ErrorCode, agent::StreamKind};
use serde::Deserialize;

use super::{
    auth::UserCaller,
    extract::Path,
    weavers::{find_present, or_gone},
};
use crate::{
    problem::{Answer, Problem},
    sessions::SessionKind,
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
        // The output ends where the agent closes the stream.
        let output = agent.socket.filter_map(async |frame| match frame {
            Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        });
        let agent = agent.session;
        // Where it is cut short, an error cuts the connection, so that it does not look like the output's end.
        let cut = futures_util::stream::once(async move {
            let reason = tokio::select! {
                () = app.stopping.cancelled() => "the server stops",
                _ = session.lost() => "the caller has lost the right to it",
                _ = agent.lost() => "the agent's token was replaced",
            };
            Err(axum::Error::new(io::Error::other(reason)))
        });
        Body::from_stream(until_either_ends(output, cut))
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response())
}

/// Items of both, until one of them has no more.
fn until_either_ends<T>(one: impl Stream<Item = T>, other: impl Stream<Item = T>) -> impl Stream<Item = T> {
    let (one, other) = (one.map(Some).chain(once(None)), other.map(Some).chain(once(None)));
    futures_util::stream::select(one, other).take_while(|item| ready(item.is_some())).filter_map(ready)
}

fn once<T>(item: T) -> impl Stream<Item = T> {
    futures_util::stream::once(ready(item))
}
