//! People's terminals: a WebSocket from a client is bridged to one that the weaver's agent dials back.
//!
//! With the subprotocol `loom.attach.v2` frames pass unchanged. Without one, the plain protocol of text frames is
//! translated here ([`Plain`]). Each direction waits for its receiver before it reads on, so nothing piles up.

use axum::{
    extract::{
        Path, Query, State, WebSocketUpgrade,
        ws::{CloseFrame, Message, WebSocket},
    },
    response::Response,
};
use bytes::Bytes;
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use loom_api::{
    ErrorCode,
    agent::StreamKind,
    attach::{AttachQuery, ClientControl, MAX_FRAME, SUBPROTOCOL, ServerControl},
};

use super::{
    auth::UserCaller,
    weavers::{find_running, or_gone},
};
use crate::{
    problem::{Answer, Problem},
    sessions::SessionKind,
    state::AppState,
};

/// WebSocket close code (RFC 6455 §7.4, IANA): the service restarts; come back.
const SERVICE_RESTART: u16 = 1012;
/// The program has ended, and nothing more comes.
const NORMAL: u16 = 1000;

/// Joins a weaver's main terminal.
#[utoipa::path(get, path = "/api/weavers/{id}/attach", tag = "weavers", params(("id" = String, Path)),
    responses((status = 101, description = "a WebSocket; see docs/protocols.md"), (status = "4XX", body = loom_api::ErrorBody)),
    security(("bearer" = [])))]
pub async fn attach(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    query: Result<Query<AttachQuery>, axum::extract::rejection::QueryRejection>,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let Query(query) = query.map_err(|error| Problem::new(ErrorCode::InvalidRequest, error.body_text()))?;
    let row = find_running(&app, &caller, &reference).await?;
    let session = app.sessions.register(SessionKind::Attach, caller.principal(Some(row.org_id)))?;
    let weaver = row.id;
    // Opened before the upgrade, so that a weaver that is not ready is an ordinary error.
    let agent = or_gone(&app, weaver, app.streams.open(weaver, StreamKind::Attach(query)).await).await?;
    let upgrade = upgrade.protocols([SUBPROTOCOL]).max_message_size(MAX_FRAME).max_frame_size(MAX_FRAME);
    let plain = upgrade.selected_protocol().is_none();
    let stopping = app.stopping.clone();
    Ok(upgrade.on_upgrade(async move |client| {
        let _attached = app.metrics.attached();
        let bridge = Bridge { translate: plain.then(Plain::default) };
        tokio::select! {
            () = bridge.run(client, agent) => {}
            () = session.ended() => {}
            () = stopping.cancelled() => {} // both sockets close; the client comes back
        }
    }))
}

struct Bridge {
    translate: Option<Plain>,
}

impl Bridge {
    async fn run(self, client: WebSocket, agent: WebSocket) {
        let plain = self.translate.is_some();
        let (mut to_client, from_client) = client.split();
        let (mut to_agent, from_agent) = agent.split();
        let close = tokio::select! {
            () = upstream(from_client, &mut to_agent, plain) => None,
            code = downstream(from_agent, &mut to_client, self.translate) => Some(code),
        };
        // Closing frames are a courtesy; the other side may be gone.
        let _ = to_agent.close().await;
        if let Some(code) = close {
            let frame = CloseFrame { code, reason: axum::extract::ws::Utf8Bytes::default() };
            let _ = to_client.send(Message::Close(Some(frame))).await;
        }
    }
}

/// From the client to the agent, until the client has gone.
async fn upstream(mut client: SplitStream<WebSocket>, agent: &mut SplitSink<WebSocket, Message>, plain: bool) {
    while let Some(Ok(message)) = client.next().await {
        let message = match message {
            Message::Text(text) if plain => match plain_resize(&text) {
                Some(resize) => match serde_json::to_string(&resize) {
                    Ok(json) => Message::Text(json.into()),
                    Err(_) => return,
                },
                None => Message::Binary(Bytes::from(text)),
            },
            Message::Text(_) | Message::Binary(_) => message,
            Message::Close(_) => return,
            Message::Ping(_) | Message::Pong(_) => continue, // answered by the library
        };
        if agent.send(message).await.is_err() {
            return;
        }
    }
}

/// From the agent to the client, until the agent has gone; the code to close with.
async fn downstream(
    mut agent: SplitStream<WebSocket>,
    client: &mut SplitSink<WebSocket, Message>,
    mut plain: Option<Plain>,
) -> u16 {
    let mut ended = false;
    while let Some(Ok(message)) = agent.next().await {
        if let Message::Text(text) = &message {
            let control = serde_json::from_str(text);
            ended |= matches!(control, Ok(ServerControl::Exit { .. } | ServerControl::Error { .. }));
        }
        let message = match (&mut plain, message) {
            (Some(plain), Message::Binary(bytes)) => Message::Text(plain.text(&bytes).into()),
            (None, message @ (Message::Binary(_) | Message::Text(_))) => message,
            (_, Message::Close(_)) => break,
            _ => continue,
        };
        if client.send(message).await.is_err() {
            break;
        }
    }
    if ended { NORMAL } else { SERVICE_RESTART }
}

/// A client's text frame that is exactly a resize.
fn plain_resize(text: &str) -> Option<ClientControl> {
    // Anything else is input, also JSON that merely looks alike.
    if !text.starts_with('{') {
        return None;
    }
    serde_json::from_str(text).ok()
}

/// Bytes of a terminal as text frames: a character that is cut between two reads waits for its rest, and bytes that are
/// none become U+FFFD.
#[derive(Default)]
struct Plain {
    /// The beginning of a character: at most three bytes.
    cut: Vec<u8>,
}

impl Plain {
    fn text(&mut self, bytes: &[u8]) -> String {
        self.cut.extend_from_slice(bytes);
        let bytes = std::mem::take(&mut self.cut);
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let at_end = invalid.as_ptr_range().end == bytes.as_ptr_range().end;
            if at_end && is_beginning(invalid) {
                self.cut = invalid.to_vec();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        text
    }
}

/// Whether bytes that are no character may become one when more come.
fn is_beginning(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_cut_anywhere_arrives_whole() {
        let text = "a é € 𝄞 z";
        for cut in 0..text.len() {
            let mut plain = Plain::default();
            let (first, second) = text.as_bytes().split_at(cut);
            assert_eq!(plain.text(first) + &plain.text(second), text, "cut at {cut}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_and_lose_nothing_around_them() {
        let mut plain = Plain::default();
        assert_eq!(plain.text(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(plain.text(b"\xe2\x82"), "");
        assert_eq!(plain.text(b"x"), "\u{fffd}x");
    }

    #[test]
    fn only_an_exact_resize_is_one() {
        assert!(plain_resize(r#"{"type":"resize","rows":24,"cols":80}"#).is_some());
        for input in ["ls\r", r#"{"type":"resize"}"#, r#"{"type":"other","rows":1,"cols":1}"#, " {}", "{"] {
            assert!(plain_resize(input).is_none(), "{input}");
        }
    }
}
