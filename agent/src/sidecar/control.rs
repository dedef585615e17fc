//! The control link: one WebSocket to the server, kept up as long as the sidecar lives.
//!
//! Everything said on it is level-triggered or kept until it is said: the status and a failure are stated anew on every
//! connection, and events wait in a bounded queue while there is none. When the token is refused the sidecar registers
//! again with the keys it has, so the sessions in the tunnel go on.

use std::{future::Future, ops::ControlFlow, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use loom_api::{
    agent::{AgentMessage, AgentStatus, MAX_MESSAGE, MainState, ServerMessage},
    client::WebSocket,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    Sidecar,
    identity::{BackOff, is_refused_token, jitter},
    streams,
};
use crate::protocol::HostState;

/// Messages that wait for the link; who finds the queue full waits too, or gives up what it wanted to say.
pub(crate) const OUTBOX: usize = 256;
/// After so long without a word, pings included, the link is dead.
const SILENCE: Duration = Duration::from_secs(40);
/// Between two looks at the load and at the machine's addresses.
const LOOK: Duration = Duration::from_secs(30);
/// A link that stood so long was a good one: the pauses begin anew.
const GOOD: Duration = Duration::from_secs(10);
/// How long the server may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);
/// Streams that are dialled or open at once.
const MOST_STREAMS: usize = 256;

/// What the link says, and what it carries for others.
pub(crate) struct Control {
    sidecar: Arc<Sidecar>,
    outbox: mpsc::Receiver<AgentMessage>,
    /// Taken from the queue and not sent yet.
    unsent: Option<AgentMessage>,
    streams: JoinSet<()>,
}

/// Why a link ended.
enum Ended {
    /// The sidecar is to end, and has said what it had to say.
    Stopping,
    /// The server wants us back after a while.
    GoAway(Duration),
}

impl Control {
    pub(crate) fn new(sidecar: Arc<Sidecar>, outbox: mpsc::Receiver<AgentMessage>) -> Self {
        Self { sidecar, outbox, unsent: None, streams: JoinSet::new() }
    }

    /// Keeps the link up until the sidecar stops and nothing is left to be said.
    pub(crate) async fn run(mut self) {
        let sidecar = Arc::clone(&self.sidecar);
        let mut pause = BackOff::default();
        loop {
            if sidecar.stopping.is_cancelled() && !sidecar.has_last_words() {
                return;
            }
            let client = sidecar.client();
            match client.websocket("/api/agent/control", None, MAX_MESSAGE).await {
                Ok(mut socket) => {
                    let since = Instant::now();
                    let ended = self.link(&mut socket).await;
                    if since.elapsed() >= GOOD {
                        pause = BackOff::default();
                    }
                    match ended {
                        Ok(Ended::Stopping) => return,
                        Ok(Ended::GoAway(after)) => {
                            tracing::info!("the server goes down for a moment");
                            pause = BackOff::default();
                            self.rest(tokio::time::sleep(after + jitter(Duration::from_millis(500)))).await;
                            continue;
                        }
                        Err(error) => tracing::info!("the control link ended: {error:#}"),
                    }
                }
                Err(error) if is_refused_token(&error) => {
                    tracing::info!("the token is refused: registering again");
                    let registered = sidecar.identity.register(&sidecar.config).await;
                    sidecar.registered(&registered);
                }
                Err(error) => tracing::info!("cannot open the control link: {error}"),
            }
            self.rest(pause.wait()).await;
        }
    }

    /// Waits, and meanwhile goes on with the streams. The end of the sidecar cuts it short when it begins.
    async fn rest(&mut self, pause: impl Future<Output = ()>) {
        let stopping = self.sidecar.stopping.clone();
        let already = stopping.is_cancelled();
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return,
                () = stopping.cancelled(), if !already => return,
                Some(_) = self.streams.join_next() => {}
            }
        }
    }

    /// One connection, to its end.
    async fn link(&mut self, socket: &mut WebSocket) -> anyhow::Result<Ended> {
        let sidecar = Arc::clone(&self.sidecar);
        let mut state = sidecar.state.subscribe();
        let mut failed = sidecar.failed.subscribe();
        let mut candidates = Vec::new();
        let mut welcomed = false;
        let mut look = interval_at(Instant::now() + LOOK, LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                frame = socket.next() => {
                    heard = Instant::now();
                    match frame.context("the server closed it")?? {
                        Message::Text(text) => {
                            let Some(message) = read(&text) else { continue };
                            let first = matches!(message, ServerMessage::Welcome { .. }) && !welcomed;
                            if !first && !welcomed {
                                bail!("the server's first word was no welcome");
                            }
                            if let ControlFlow::Break(after) = self.receive(socket, message).await? {
                                return Ok(Ended::GoAway(after));
                            }
                            if first {
                                welcomed = true;
                                tracing::info!("the control link is up");
                                candidates = sidecar.tunnel.candidates();
                                send(socket, &AgentMessage::Candidates { candidates: candidates.clone() }).await?;
                                state.mark_changed();
                                failed.mark_changed();
                            }
                        }
                        Message::Close(_) => bail!("the server closed it"),
                        _ => {}
                    }
                }
                () = sleep_until(heard + SILENCE) => bail!("nothing was heard for {SILENCE:?}"),
                changed = state.changed(), if welcomed => {
                    changed.context("the state's owner is gone")?;
                    self.tell_status(socket, &mut state).await?;
                }
                changed = failed.changed(), if welcomed => {
                    changed.context("the state's owner is gone")?;
                    self.tell_failure(socket, &mut failed).await?;
                }
                message = next(&mut self.unsent, &mut self.outbox), if welcomed => {
                    send(socket, self.unsent.insert(message)).await?;
                    self.unsent = None;
                }
                _ = look.tick(), if welcomed => {
                    let now = sidecar.tunnel.candidates();
                    if now != candidates {
                        sidecar.tunnel.network_changed();
                        candidates = now;
                        send(socket, &AgentMessage::Candidates { candidates: candidates.clone() }).await?;
                    }
                    self.tell_status(socket, &mut state).await?;
                }
                Some(_) = self.streams.join_next() => {}
                () = sidecar.stopping.cancelled(), if welcomed => {
                    return self.last_words(socket, &mut state, &mut failed).await;
                }
            }
        }
    }

    /// Does what the server says; breaks off with the time after which it wants us back.
    async fn receive(
        &mut self,
        socket: &mut WebSocket,
        message: ServerMessage,
    ) -> anyhow::Result<ControlFlow<Duration>> {
        let sidecar = &self.sidecar;
        match message {
            ServerMessage::Welcome { start, grants, more } => {
                sidecar.grants.replace(grants, more);
                // Only the first counts: what runs does not change any more.
                sidecar.start.send_if_modified(|wanted| wanted.is_none() && wanted.replace(start).is_none());
            }
            ServerMessage::Grants { grants, more } => sidecar.grants.and(grants, more),
            ServerMessage::Grant { serial, grant } => {
                if sidecar.grants.add(grant) {
                    send(socket, &AgentMessage::GrantApplied { serial }).await?;
                }
            }
            ServerMessage::Revoke { public_key } => sidecar.grants.revoke(public_key),
            ServerMessage::OpenStream { stream, kind } if self.streams.len() < MOST_STREAMS => {
                self.streams.spawn(streams::run(Arc::clone(sidecar), stream, kind));
            }
            ServerMessage::OpenStream { stream, .. } => {
                let reason = "the weaver has too many streams open".to_owned();
                send(socket, &AgentMessage::StreamFailed { stream, reason }).await?;
            }
            ServerMessage::Deadline { expires_at } => {
                sidecar.deadline.send_replace(Some(expires_at));
            }
            ServerMessage::GoAway { reconnect_after_ms } => {
                let after = Duration::from_millis(reconnect_after_ms).min(SILENCE);
                return Ok(ControlFlow::Break(after));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    async fn tell_status(&self, socket: &mut WebSocket, state: &mut watch::Receiver<HostState>) -> anyhow::Result<()> {
        let state = state.borrow_and_update().clone();
        let exited = matches!(state.main, MainState::Exited { .. });
        send(socket, &AgentMessage::Status(AgentStatus { main: state.main, ports: state.ports, load: load() })).await?;
        if exited {
            self.sidecar.reported.cancel();
        }
        Ok(())
    }

    async fn tell_failure(
        &self,
        socket: &mut WebSocket,
        failed: &mut watch::Receiver<Option<String>>,
    ) -> anyhow::Result<()> {
        let reason = failed.borrow_and_update().clone();
        let Some(reason) = reason else { return Ok(()) };
        send(socket, &AgentMessage::Failed { reason }).await?;
        self.sidecar.failure_reported.cancel();
        Ok(())
    }

    /// Says what has not been said, and waits until the server has heard it.
    async fn last_words(
        &mut self,
        socket: &mut WebSocket,
        state: &mut watch::Receiver<HostState>,
        failed: &mut watch::Receiver<Option<String>>,
    ) -> anyhow::Result<Ended> {
        while let Some(message) = self.unsent.take().or_else(|| self.outbox.try_recv().ok()) {
            send(socket, &message).await?;
        }
        self.tell_failure(socket, failed).await?;
        self.tell_status(socket, state).await?;
        let goodbye = async {
            socket.close(None).await?;
            while let Some(frame) = socket.next().await {
                frame?;
            }
            anyhow::Ok(())
        };
        // The server may have gone first; all was sent.
        let _ = timeout(GOODBYE, goodbye).await;
        Ok(Ended::Stopping)
    }
}

/// The next message to send. Cancel-safe.
async fn next(unsent: &mut Option<AgentMessage>, outbox: &mut mpsc::Receiver<AgentMessage>) -> AgentMessage {
    if let Some(message) = unsent.take() {
        return message;
    }
    match outbox.recv().await {
        Some(message) => message,
        None => std::future::pending().await,
    }
}

fn read(text: &str) -> Option<ServerMessage> {
    // The error's text could quote the message, and there are secrets in some.
    let message = serde_json::from_str(text).ok();
    if message.is_none() {
        tracing::warn!("a control message that cannot be read; is the server newer?");
    }
    message
}

async fn send(socket: &mut WebSocket, message: &AgentMessage) -> anyhow::Result<()> {
    let text = serde_json::to_string(message)?;
    Ok(timeout(SILENCE, socket.send(Message::Text(text.into()))).await.context("the server takes nothing")??)
}

/// The load average over one minute.
fn load() -> f32 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or_default()
}
