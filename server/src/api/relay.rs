//! The relay's WebSockets: one for each WireGuard key, which its token must own.

use std::time::Duration;

use anyhow::Context as _;
use axum::{
    extract::{
        Query, State,
        ws::{Message, WebSocket},
    },
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::{Bytes, BytesMut};
use futures_util::{
    SinkExt as _, StreamExt as _,
    stream::{SplitSink, SplitStream},
};
use loom_api::{ErrorCode, WireGuardKey};
use loom_tunnel::relay::frame::{self, Frame, SUBPROTOCOL};
use serde::Deserialize;
use tokio::time::{Instant, interval};

use super::{
    auth::Caller,
    extract::Upgrade,
    websocket::{Close, PING, SILENCE},
};
use crate::{
    problem::{Answer, Problem},
    relay::Connection,
    sessions::SessionKind,
    state::AppState,
    store::KeyOwner,
};

/// Between two notices to one sender that a peer is absent.
const ABSENT_NOTICE: Duration = Duration::from_secs(1);
/// How much of a connection is read at once, in bytes. Each connection has a buffer of that size, busy or not.
const READ_BUFFER: usize = 16 << 10;

/// What a relay connection is opened with.
#[derive(Deserialize)]
pub struct RelayQuery {
    /// The connection's own WireGuard public key, URL-safe base64 without padding.
    key: String,
}

/// A relay connection.
#[utoipa::path(get, path = "/api/relay", tag = "tunnels", params(("key" = String, Query)),
    responses((status = 101, description = "a WebSocket of relay frames; see docs/protocols.md"), (status = "4XX", body = loom_api::ErrorBody)),
    security(("bearer" = [])))]
pub async fn relay(
    State(app): State<AppState>,
    caller: Caller,
    query: Result<Query<RelayQuery>, axum::extract::rejection::QueryRejection>,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let invalid =
        || Problem::new(ErrorCode::InvalidRequest, "key must be the base64 (URL-safe, no padding) of 32 bytes");
    let Query(query) = query.map_err(|_| invalid())?;
    let key: Option<[u8; 32]> = URL_SAFE_NO_PAD.decode(query.key).ok().and_then(|key| key.try_into().ok());
    let key = WireGuardKey(key.ok_or_else(invalid)?);
    if !owns(&app, &caller, key).await? {
        return Err(Problem::new(ErrorCode::Forbidden, "this WireGuard key is not the caller's"));
    }
    let principal = match &caller {
        Caller::User(user) => user.principal(None),
        Caller::Agent(agent) => agent.principal,
    };
    let session = app.sessions.register(SessionKind::Relay, principal)?;
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(frame::MAX_MESSAGE)
        .max_frame_size(frame::MAX_MESSAGE)
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(frame::MAX_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        let connection = app.relay.connect(key);
        let (mut sink, stream) = socket.split();
        let mut close = None;
        let result = tokio::select! {
            result = read(&app, key, &connection, stream) => result,
            result = write(&connection, &mut sink) => result,
            () = app.stopping.cancelled() => {
                close = Some(Close::Restart);
                Ok(())
            }
            lost = session.lost() => {
                close = Some(Close::Refused(lost.into()));
                Ok(())
            }
        };
        app.relay.disconnect(&key, &connection);
        if let Some(close) = close {
            close.tell(&mut sink, None).await;
        }
        if let Err(error) = result {
            tracing::debug!("a relay connection ended: {error:#}");
        }
    }))
}

async fn owns(app: &AppState, caller: &Caller, key: WireGuardKey) -> Answer<bool> {
    let caller = match caller {
        Caller::User(user) => KeyOwner::User(user.user.id),
        Caller::Agent(agent) => KeyOwner::Weaver(agent.weaver),
    };
    Ok(app.store.key_owner(key).await? == Some(caller))
}

/// Forwards what one connection sends.
async fn read(
    app: &AppState,
    own: WireGuardKey,
    connection: &Connection,
    mut stream: SplitStream<WebSocket>,
) -> anyhow::Result<()> {
    let relay = &app.relay;
    let mut noticed: Option<Instant> = None;
    loop {
        let message =
            tokio::time::timeout(SILENCE, stream.next()).await.context("nothing was heard")?.context("closed")??;
        let Message::Binary(message) = message else { continue };
        // What cannot be read, or may not be sent, is dropped like any lost packet.
        let Ok(Frame::Packets { peer: to, .. }) = frame::decode(&message) else { continue };
        let to = WireGuardKey(to);
        if !relay.may_talk(&own, &to) {
            continue;
        }
        app.metrics.relay_bytes.inc_by(message.len() as u64);
        if let Some(receiver) = relay.connection(&to) {
            let mut forwarded = BytesMut::from(&message[..]);
            frame::set_peer(&mut forwarded, own.as_bytes())?;
            receiver.push(forwarded.freeze());
        } else if noticed.is_none_or(|at| at.elapsed() > ABSENT_NOTICE) {
            noticed = Some(Instant::now());
            let mut absent = Vec::with_capacity(frame::HEADER_LEN);
            frame::encode_peer_absent(to.as_bytes(), &mut absent);
            connection.push(absent.into());
        }
    }
}

/// Sends what waits for one connection, all of it before it is flushed.
async fn write(connection: &Connection, sink: &mut SplitSink<WebSocket, Message>) -> anyhow::Result<()> {
    let mut ping = interval(PING);
    loop {
        tokio::select! {
            messages = connection.take() => {
                let Some(messages) = messages else { return Ok(()) };
                for message in messages {
                    sink.feed(Message::Binary(message)).await?;
                }
                sink.flush().await?;
            }
            _ = ping.tick() => sink.send(Message::Ping(Bytes::new())).await?,
        }
    }
}
