//! People's terminals: a WebSocket from a client is bridged to one that the weaver's agent dials back.
//!
//! With the subprotocol `loom.attach.v2` frames pass unchanged. Without one, the plain protocol of text frames is
//! translated here ([`Plain`]). Each direction waits for its receiver before it reads on, so nothing piles up. A client
//! that vanishes without a word is noticed because it answers no ping; then its size no longer counts for the others.

use std::{future::poll_fn, task::Poll, time::Duration};

use axum::{
    extract::{Query, State, ws::Message},
    response::Response,
};
use bytes::Bytes;
use futures_util::{FutureExt as _, Sink, SinkExt as _, Stream, StreamExt as _};
use loom_api::{
    ErrorCode,
    agent::StreamKind,
    attach::{AttachQuery, ClientControl, MAX_FRAME, SUBPROTOCOL, ServerControl},
};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::{
    auth::UserCaller,
    extract::{Path, Upgrade},
    weavers::{find_running, or_gone},
    websocket::{Close, PING, SILENCE},
};
use crate::{
    problem::{Answer, Problem},
    sessions::SessionKind,
    state::AppState,
};

/// Joins a weaver's main terminal.
#[utoipa::path(get, path = "/api/weavers/{id}/attach", tag = "weavers", params(("id" = String, Path)),
    responses((status = 101, description = "a WebSocket; see docs/protocols.md"), (status = "4XX", body = loom_api::ErrorBody)),
    security(("bearer" = [])))]
pub async fn attach(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    query: Result<Query<AttachQuery>, axum::extract::rejection::QueryRejection>,
    Upgrade(upgrade): Upgrade,
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
        let bridge = Bridge { translate: plain.then(Plain::default), patience: PATIENCE };
        let end = async {
            tokio::select! {
                lost = session.lost() => Close::Refused(lost.into()),
                _ = agent.session.lost() => Close::Restart,
                () = stopping.cancelled() => Close::Restart,
            }
        };
        bridge.run(client, agent.socket, end).await;
    }))
}

/// How a client that has vanished is told from a quiet one.
#[derive(Clone, Copy)]
struct Patience {
    /// Between two pings.
    ping: Duration,
    /// A client that was not heard of for so long is gone.
    silence: Duration,
}

const PATIENCE: Patience = Patience { ping: PING, silence: SILENCE };

/// When a client was heard of last.
struct LastHeard(Mutex<Instant>);

impl LastHeard {
    fn now() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    fn get(&self) -> Instant {
        *self.0.lock()
    }

    fn update(&self) {
        *self.0.lock() = Instant::now();
    }
}

struct Bridge {
    translate: Option<Plain>,
    patience: Patience,
}

impl Bridge {
    /// Until client or agent has gone, or `end` says why it must end.
    async fn run<C, A>(self, client: C, agent: A, end: impl Future<Output = Close>)
    where
        C: Stream<Item = Result<Message, axum::Error>> + Sink<Message>,
        A: Stream<Item = Result<Message, axum::Error>> + Sink<Message>,
    {
        let plain = self.translate.is_some();
        let (mut to_client, from_client) = client.split();
        let (mut to_agent, from_agent) = agent.split();
        let heard = LastHeard::now();
        let close = tokio::select! {
            () = upstream(from_client, &mut to_agent, plain, &heard, self.patience.silence) => None,
            close = downstream(from_agent, &mut to_client, self.translate, &heard, self.patience.ping) => Some(close),
            close = end => Some(close),
        };
        let tell_client = async {
            let Some(close) = close else { return };
            let last = match &close {
                Close::Refused(error) if !plain => serde_json::to_string(&ServerControl::Error(error.clone())).ok(),
                _ => None,
            };
            close.tell(&mut to_client, last.map(|text| Message::Text(text.into()))).await;
        };
        tokio::join!(Close::Done.tell(&mut to_agent, None), tell_client);
    }
}

/// From the client to the agent, until the client has gone.
async fn upstream(
    mut client: impl Stream<Item = Result<Message, axum::Error>> + Unpin,
    agent: &mut (impl Sink<Message> + Unpin),
    plain: bool,
    heard: &LastHeard,
    silence: Duration,
) {
    loop {
        let message = tokio::select! {
            message = client.next() => message,
            () = sleep_until(heard.get() + silence) => {
                if heard.get().elapsed() >= silence {
                    return;
                }
                continue;
            }
        };
        let Some(Ok(message)) = message else { return };
        heard.update();
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
        // While the agent takes no input, the client is not listened to, which is no silence of its own.
        heard.update();
    }
}

/// From the agent to the client, until the agent has gone; how to close. Pings the client.
async fn downstream(
    mut agent: impl Stream<Item = Result<Message, axum::Error>> + Unpin,
    client: &mut (impl Sink<Message> + Unpin),
    mut plain: Option<Plain>,
    heard: &LastHeard,
    ping: Duration,
) -> Close {
    let mut ended = false;
    let mut pings = interval_at(Instant::now() + ping, ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            message = agent.next() => message,
            _ = pings.tick() => {
                if send(client, Message::Ping(Bytes::new()), heard).await.is_err() {
                    break;
                }
                continue;
            }
        };
        let Some(Ok(message)) = message else { break };
        if let Message::Text(text) = &message {
            let control = serde_json::from_str(text);
            ended |= matches!(control, Ok(ServerControl::Exit { .. } | ServerControl::Error(_)));
        }
        let message = match (&mut plain, message) {
            (Some(plain), Message::Binary(bytes)) => Message::Text(plain.text(&bytes).into()),
            (None, message @ (Message::Binary(_) | Message::Text(_))) => message,
            (_, Message::Close(_)) => break,
            _ => continue,
        };
        if send(client, message, heard).await.is_err() {
            break;
        }
    }
    if ended { Close::Done } else { Close::Restart }
}

/// Sends to the client. When that has to wait until the client takes some of what was sent before, it is a sign of life:
/// on a slow connection, the answer to a ping can be far behind.
async fn send<S: Sink<Message> + Unpin>(client: &mut S, message: Message, heard: &LastHeard) -> Result<(), S::Error> {
    let mut sending = client.send(message);
    let at_once = poll_fn(|cx| Poll::Ready(sending.poll_unpin(cx))).await;
    if let Poll::Ready(sent) = at_once {
        return sent;
    }
    sending.await?;
    heard.update();
    Ok(())
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
    use std::{future::pending, pin::Pin, task::Context};

    use tokio::{sync::mpsc, time::timeout};
    use tokio_util::sync::{PollSendError, PollSender};

    use super::*;

    /// Short, so that a test need not wait.
    const SHORT: Patience = Patience { ping: Duration::from_millis(50), silence: Duration::from_millis(400) };

    /// One end of a WebSocket.
    struct Socket {
        from_peer: mpsc::Receiver<Message>,
        to_peer: PollSender<Message>,
    }

    /// One end for the bridge, and how the other end sends and receives.
    fn socket() -> (Socket, mpsc::Sender<Message>, mpsc::Receiver<Message>) {
        let ((send, from_peer), (to_peer, receive)) = (mpsc::channel(1), mpsc::channel(1));
        (Socket { from_peer, to_peer: PollSender::new(to_peer) }, send, receive)
    }

    impl Stream for Socket {
        type Item = Result<Message, axum::Error>;

        fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            self.from_peer.poll_recv(cx).map(|message| message.map(Ok))
        }
    }

    impl Sink<Message> for Socket {
        type Error = PollSendError<Message>;

        fn poll_ready(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            self.to_peer.poll_ready_unpin(cx)
        }

        fn start_send(mut self: Pin<&mut Self>, message: Message) -> Result<(), Self::Error> {
            self.to_peer.start_send_unpin(message)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            self.to_peer.poll_flush_unpin(cx)
        }

        fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            self.to_peer.poll_close_unpin(cx)
        }
    }

    #[tokio::test]
    async fn a_client_that_answers_no_ping_is_given_up_also_while_it_takes_no_output() {
        let (client, _silent, _reads_nothing) = socket();
        let (agent, agent_says, mut agent_hears) = socket();
        let output = async { while agent_says.send(Message::Binary("output".into())).await.is_ok() {} };
        let bridge = Bridge { translate: None, patience: SHORT }.run(client, agent, pending());
        timeout(Duration::from_secs(20), futures_util::future::join(bridge, output)).await.expect("it ends");
        assert!(matches!(agent_hears.recv().await, Some(Message::Close(_)) | None), "the agent's side is closed");
        assert_eq!(agent_hears.recv().await, None);
    }

    #[tokio::test]
    async fn a_quiet_client_that_answers_pings_stays() {
        let (client, client_says, mut client_hears) = socket();
        let (agent, _agent_says, _agent_hears) = socket();
        let answers = async {
            for _ in 0..20 {
                let ping = client_hears.recv().await.expect("a ping");
                assert_eq!(ping, Message::Ping(Bytes::new()));
                client_says.send(Message::Pong(Bytes::new())).await.expect("the bridge stays");
            }
        };
        tokio::select! {
            () = answers => {}
            () = Bridge { translate: None, patience: SHORT }.run(client, agent, pending()) => panic!("it was given up"),
        }
    }

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
