//! A weaver's events: those so far, or a stream of them.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
    http::HeaderMap,
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt as _};
use loom_api::{ErrorBody, ErrorCode, WeaverId, weaver::WeaverEvent};
use serde::Deserialize;

use super::{auth::UserCaller, extract::Path, weavers::find, websocket::PING};
use crate::{
    problem::{Answer, Problem},
    sessions::{Session, SessionKind},
    state::AppState,
};

/// What events are asked with.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Goes on with what comes.
    #[serde(default)]
    follow: bool,
    /// Only those after this number.
    #[serde(default)]
    after: i64,
}

/// A weaver's events.
#[utoipa::path(get, path = "/api/weavers/{id}/events", tag = "weavers",
    params(("id" = String, Path), ("follow" = Option<bool>, Query, description = "server-sent events, without an end"),
           ("after" = Option<i64>, Query, description = "only those after this number")),
    responses((status = 200, body = Vec<WeaverEvent>), (status = "4XX", body = ErrorBody)), security(("bearer" = [])))]
pub async fn events(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    headers: HeaderMap,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Answer<Response> {
    let Query(query) = query.map_err(|error| Problem::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let row = find(&app, &caller, &reference).await?;
    let weaver = row.id;
    // A client that comes back says where it was (WHATWG HTML §9.2.4).
    let last = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let after = last.unwrap_or(query.after);
    if !query.follow {
        return Ok(Json(app.store.events(weaver, after).await?).into_response());
    }
    let session = Arc::new(app.sessions.register(SessionKind::Events, caller.principal(Some(row.org_id)))?);
    let lost = {
        let session = Arc::clone(&session);
        async move { session.lost().await }
    };
    let last = futures_util::stream::iter(std::iter::from_fn(move || last_event(&session)).take(1));
    let events = follow(app, weaver, after).take_until(lost).chain(last);
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(PING)).into_response())
}

/// What a client is told whose right to the events is lost.
fn last_event(session: &Session) -> Option<Result<Event, Infallible>> {
    let error = session.has_lost()?.into();
    Event::default().event("error").json_data(ErrorBody { error }).ok().map(Ok)
}

/// Events as they come, until the client goes or the server stops.
fn follow(app: AppState, weaver: WeaverId, after: i64) -> impl Stream<Item = Result<Event, Infallible>> {
    // Before the first look, so that nothing falls between the two.
    let bell = app.events.subscribe(weaver);
    let state = (app, bell, after, Vec::new().into_iter());
    futures_util::stream::unfold(state, move |(app, mut bell, mut after, mut ready)| async move {
        loop {
            if let Some(event) = ready.next() {
                let event: WeaverEvent = event;
                after = event.id;
                let line = Event::default().id(event.id.to_string()).json_data(event).ok()?;
                return Some((Ok(line), (app, bell, after, ready)));
            }
            ready = app.store.events(weaver, after).await.ok()?.into_iter();
            if ready.len() > 0 {
                continue;
            }
            let stopping = app.stopping.clone();
            tokio::select! {
                rang = bell.changed() => rang.ok()?,
                () = stopping.cancelled() => return None,
            }
        }
    })
}
