//! The relay: ciphertext between a weaver's agent and a device that hold a grant, when UDP cannot go straight.
//!
//! A connection is one WebSocket and stands for one WireGuard key, which its token must own. The relay checks a
//! message's frame (`loom_tunnel::relay::frame` has the layout), exchanges the key, and forwards the rest as it is. It
//! holds nothing: after a restart both sides come back, and their WireGuard sessions go on.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    extract::{
        Query, State, WebSocketUpgrade,
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
use jiff::Timestamp;
use loom_api::{ErrorCode, WireGuardKey};
use loom_tunnel::relay::frame::{self, Frame, SUBPROTOCOL};
use serde::Deserialize;
use tokio::{
    sync::Notify,
    time::{Instant, interval},
};

use crate::{
    app::AppState,
    auth::{AgentCaller, Caller},
    problem::{Answer, Problem},
    store::Store,
};

/// What may wait for one receiver, in bytes; the oldest is dropped beyond that. A relay that holds more only adds
/// delay.
const QUEUE_BYTES: usize = 1 << 20;
/// Between two pings of a connection: under the minute after which proxies cut it.
const PING: Duration = Duration::from_secs(15);
/// After so long without a word a connection is dead.
const SILENCE: Duration = Duration::from_secs(40);
/// Between two notices to one sender that a peer is absent.
const ABSENT_NOTICE: Duration = Duration::from_secs(1);
/// How much of a connection is read at once, in bytes. Each connection has a buffer of that size, busy or not.
const READ_BUFFER: usize = 16 << 10;

type Key = [u8; 32];

/// Who is connected, and who may talk to whom.
#[derive(Default)]
pub struct Relay {
    connections: RwLock<HashMap<Key, Arc<Connection>>>,
    /// Both ways round, until when.
    grants: RwLock<HashMap<(Key, Key), Timestamp>>,
    serial: AtomicU64,
}

struct Connection {
    serial: u64,
    queue: Mutex<Queue>,
    ready: Notify,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
}

impl Relay {
    /// Learns from the database who may talk to whom.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn load(&self, store: &Store) -> sqlx::Result<()> {
        let mut pairs = HashMap::new();
        let agents: HashMap<_, _> =
            store.all_live().await?.into_iter().filter_map(|row| Some((row.id, row.wireguard_key?))).collect();
        for grant in store.all_grants().await? {
            if let Some(agent) = agents.get(&grant.weaver) {
                pairs.insert((agent.0, grant.device.0), grant.expires_at);
                pairs.insert((grant.device.0, agent.0), grant.expires_at);
            }
        }
        *self.grants.write().unwrap_or_else(PoisonError::into_inner) = pairs;
        Ok(())
    }

    fn may_talk(&self, from: &Key, to: &Key) -> bool {
        let grants = self.grants.read().unwrap_or_else(PoisonError::into_inner);
        grants.get(&(*from, *to)).is_some_and(|until| Timestamp::now() < *until)
    }

    fn connection(&self, key: &Key) -> Option<Arc<Connection>> {
        self.connections.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn connect(&self, key: Key) -> Arc<Connection> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection { serial, queue: Mutex::default(), ready: Notify::new() });
        let older =
            self.connections.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&connection));
        if let Some(older) = older {
            older.close();
        }
        connection
    }

    fn disconnect(&self, key: &Key, serial: u64) {
        let mut connections = self.connections.write().unwrap_or_else(PoisonError::into_inner);
        if connections.get(key).is_some_and(|connection| connection.serial == serial) {
            connections.remove(key);
        }
    }
}

impl Connection {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, message: Bytes) {
        let mut queue = self.queue();
        queue.bytes += message.len();
        queue.messages.push_back(message);
        while queue.bytes > QUEUE_BYTES
            && let Some(oldest) = queue.messages.pop_front()
        {
            queue.bytes -= oldest.len();
        }
        drop(queue);
        self.ready.notify_one();
    }

    fn close(&self) {
        self.queue().closed = true;
        self.ready.notify_one();
    }

    /// All that waits; nothing once the connection was replaced by a newer one.
    async fn take(&self) -> Option<VecDeque<Bytes>> {
        loop {
            {
                let mut queue = self.queue();
                if queue.closed {
                    return None;
                }
                if !queue.messages.is_empty() {
                    queue.bytes = 0;
                    return Some(std::mem::take(&mut queue.messages));
                }
            }
            self.ready.notified().await;
        }
    }
}

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
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let invalid =
        || Problem::new(ErrorCode::InvalidRequest, "key must be the base64 (URL-safe, no padding) of 32 bytes");
    let Query(query) = query.map_err(|_| invalid())?;
    let key: Key = URL_SAFE_NO_PAD.decode(query.key).ok().and_then(|key| key.try_into().ok()).ok_or_else(invalid)?;
    if !owns(&app, &caller, WireGuardKey(key)).await? {
        return Err(Problem::new(ErrorCode::Forbidden, "this WireGuard key is not the caller's"));
    }
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_message_size(frame::MAX_MESSAGE)
        .max_frame_size(frame::MAX_MESSAGE)
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(frame::MAX_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        let connection = app.relay.connect(key);
        let (sink, stream) = socket.split();
        let result = tokio::select! {
            result = read(&app, key, &connection, stream) => result,
            result = write(&connection, sink) => result,
            () = app.stopping.cancelled() => Ok(()),
        };
        app.relay.disconnect(&key, connection.serial);
        if let Err(error) = result {
            tracing::debug!("a relay connection ended: {error:#}");
        }
    }))
}

async fn owns(app: &AppState, caller: &Caller, key: WireGuardKey) -> Answer<bool> {
    Ok(match caller {
        Caller::User(user) => app.store.device_owner(key).await? == Some(user.user.id),
        Caller::Agent(AgentCaller(weaver)) => {
            app.store.weaver(*weaver).await?.is_some_and(|row| row.wanted && row.wireguard_key == Some(key))
        }
    })
}

/// Forwards what one connection sends.
async fn read(
    app: &AppState,
    own: Key,
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
        if !relay.may_talk(&own, &to) {
            continue;
        }
        app.metrics.relay_bytes.inc_by(message.len() as u64);
        if let Some(receiver) = relay.connection(&to) {
            let mut forwarded = BytesMut::from(&message[..]);
            frame::set_peer(&mut forwarded, &own)?;
            receiver.push(forwarded.freeze());
        } else if noticed.is_none_or(|at| at.elapsed() > ABSENT_NOTICE) {
            noticed = Some(Instant::now());
            let mut absent = Vec::with_capacity(frame::HEADER_LEN);
            frame::encode_peer_absent(&to, &mut absent);
            connection.push(absent.into());
        }
    }
}

/// Sends what waits for one connection, all of it before it is flushed.
async fn write(connection: &Connection, mut sink: SplitSink<WebSocket, Message>) -> anyhow::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_queue_drops_its_oldest_and_holds_a_bounded_number_of_bytes() {
        let relay = Relay::default();
        let connection = relay.connect([1; 32]);
        for number in 0..40_u8 {
            connection.push(Bytes::from(vec![number; 60_000]));
        }
        let taken = connection.take().await.expect("messages");
        assert!(taken.iter().map(Bytes::len).sum::<usize>() <= QUEUE_BYTES);
        assert_eq!(taken.back().map(|last| last[0]), Some(39), "the newest is kept");
    }

    #[tokio::test]
    async fn a_newer_connection_of_a_key_ends_the_older() {
        let relay = Relay::default();
        let older = relay.connect([1; 32]);
        let newer = relay.connect([1; 32]);
        assert!(older.take().await.is_none());
        relay.disconnect(&[1; 32], older.serial);
        assert!(relay.connection(&[1; 32]).is_some_and(|now| now.serial == newer.serial));
    }

    #[test]
    fn nobody_talks_without_a_grant() {
        let relay = Relay::default();
        assert!(!relay.may_talk(&[1; 32], &[2; 32]));
        let past = Timestamp::now() - jiff::SignedDuration::from_secs(1);
        relay.grants.write().expect("not poisoned").insert(([1; 32], [2; 32]), past);
        assert!(!relay.may_talk(&[1; 32], &[2; 32]), "one that has ended counts for nothing");
    }
}
