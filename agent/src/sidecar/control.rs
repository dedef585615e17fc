//! The control link: one WebSocket to the server, maintained as long as the sidecar runs.
//!
//! Everything sent on it is level-triggered or queued: the status and a failure are sent again on every connection, and
//! events wait in a bounded queue while there is none. When the token is refused the sidecar registers again with the
//! same keys, so the sessions in the tunnel go on.

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
    identity::{Backoff, is_refused_token, jitter},
    streams,
};
use crate::protocol::HostState;

/// Messages waiting for the link. When the queue is full, senders wait or drop their message.
pub(crate) const OUTBOX_SIZE: usize = 256;
/// A link on which nothing arrives for this long, not even a ping, is dead.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(40);
/// Between checks of the load and of the machine's addresses.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// A link that lasted this long resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// For the server to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Concurrent streams, including those being dialled.
const MAX_STREAMS: usize = 256;

/// The control link and the streams that the server has asked for.
pub(crate) struct Control {
    sidecar: Arc<Sidecar>,
    outbox: mpsc::Receiver<AgentMessage>,
    /// Taken from the queue, but not sent yet.
    unsent: Option<AgentMessage>,
    streams: JoinSet<()>,
}

/// Why a connection ended, other than with an error.
enum LinkEnd {
    /// The sidecar is stopping, and has sent everything.
    Stopping,
    /// The server asked us to reconnect after this time.
    GoAway(Duration),
}

impl Control {
    pub(crate) fn new(sidecar: Arc<Sidecar>, outbox: mpsc::Receiver<AgentMessage>) -> Self {
        Self { sidecar, outbox, unsent: None, streams: JoinSet::new() }
    }

    /// Maintains the link until the sidecar stops and everything is sent.
    pub(crate) async fn run(mut self) {
        let sidecar = Arc::clone(&self.sidecar);
        let mut pause = Backoff::default();
        loop {
            if sidecar.stopping.is_cancelled() && !sidecar.has_unsent_reports() {
                return;
            }
            let client = sidecar.client();
            match client.websocket("/api/agent/control", None, MAX_MESSAGE).await {
                Ok(mut socket) => {
                    let since = Instant::now();
                    let ended = self.link(&mut socket).await;
                    if since.elapsed() >= STABLE_AFTER {
                        pause = Backoff::default();
                    }
                    match ended {
                        Ok(LinkEnd::Stopping) => return,
                        Ok(LinkEnd::GoAway(after)) => {
                            tracing::info!("the server is restarting");
                            pause = Backoff::default();
                            self.wait_for(tokio::time::sleep(after + jitter(Duration::from_millis(500)))).await;
                            continue;
                        }
                        Err(error) => tracing::info!("the control link ended: {error:#}"),
                    }
                }
                Err(error) if is_refused_token(&error) => {
                    tracing::info!("the server refused the token; registering again");
                    let registered = sidecar.identity.register(&sidecar.config).await;
                    sidecar.registered(&registered);
                }
                Err(error) => tracing::info!("cannot open the control link: {error}"),
            }
            self.wait_for(pause.wait()).await;
        }
    }

    /// Waits for `pause` while the streams go on. Returns early when the sidecar begins to stop.
    async fn wait_for(&mut self, pause: impl Future<Output = ()>) {
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

    /// Runs one connection until it ends.
    async fn link(&mut self, socket: &mut WebSocket) -> anyhow::Result<LinkEnd> {
        let sidecar = Arc::clone(&self.sidecar);
        let mut state = sidecar.state.subscribe();
        let mut failed = sidecar.failed.subscribe();
        let mut candidates = Vec::new();
        let mut welcomed = false;
        let mut check = interval_at(Instant::now() + CHECK_INTERVAL, CHECK_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
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
                                bail!("the server's first message was not a welcome");
                            }
                            if let ControlFlow::Break(after) = self.receive(socket, message).await? {
                                return Ok(LinkEnd::GoAway(after));
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
                () = sleep_until(heard + SILENCE_TIMEOUT) => bail!("the server was silent for {SILENCE_TIMEOUT:?}"),
                changed = state.changed(), if welcomed => {
                    changed.context("the state's owner is gone")?;
                    self.send_status(socket, &mut state).await?;
                }
                changed = failed.changed(), if welcomed => {
                    changed.context("the state's owner is gone")?;
                    self.send_failure(socket, &mut failed).await?;
                }
                message = next(&mut self.unsent, &mut self.outbox), if welcomed => {
                    send(socket, self.unsent.insert(message)).await?;
                    self.unsent = None;
                }
                _ = check.tick(), if welcomed => {
                    let now = sidecar.tunnel.candidates();
                    if now != candidates {
                        sidecar.tunnel.network_changed();
                        candidates = now;
                        send(socket, &AgentMessage::Candidates { candidates: candidates.clone() }).await?;
                    }
                    self.send_status(socket, &mut state).await?;
                }
                Some(_) = self.streams.join_next() => {}
                () = sidecar.stopping.cancelled(), if welcomed => {
                    return self.send_final_reports(socket, &mut state, &mut failed).await;
                }
            }
        }
    }

    /// Handles a message; breaks with the time after which to reconnect if the server is restarting.
    async fn receive(
        &mut self,
        socket: &mut WebSocket,
        message: ServerMessage,
    ) -> anyhow::Result<ControlFlow<Duration>> {
        let sidecar = &self.sidecar;
        match message {
            ServerMessage::Welcome { start, grants, more } => {
                sidecar.grants.replace(grants, more);
                // Only the first welcome counts: the main program does not change.
                sidecar.start.send_if_modified(|wanted| wanted.is_none() && wanted.replace(start).is_none());
            }
            ServerMessage::Grants { grants, more } => sidecar.grants.add_page(grants, more),
            ServerMessage::Grant { serial, grant } => {
                if sidecar.grants.add(grant) {
                    send(socket, &AgentMessage::GrantApplied { serial }).await?;
                }
            }
            ServerMessage::Revoke { public_key } => sidecar.grants.revoke(public_key),
            ServerMessage::OpenStream { stream, kind } if self.streams.len() < MAX_STREAMS => {
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
                let after = Duration::from_millis(reconnect_after_ms).min(SILENCE_TIMEOUT);
                return Ok(ControlFlow::Break(after));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    async fn send_status(&self, socket: &mut WebSocket, state: &mut watch::Receiver<HostState>) -> anyhow::Result<()> {
        let state = state.borrow_and_update().clone();
        let exited = matches!(state.main, MainState::Exited { .. });
        send(socket, &AgentMessage::Status(AgentStatus { main: state.main, ports: state.ports, load: load() })).await?;
        if exited {
            self.sidecar.reported.cancel();
        }
        Ok(())
    }

    async fn send_failure(
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

    /// Sends everything that is not sent yet, and waits until the server has received it.
    async fn send_final_reports(
        &mut self,
        socket: &mut WebSocket,
        state: &mut watch::Receiver<HostState>,
        failed: &mut watch::Receiver<Option<String>>,
    ) -> anyhow::Result<LinkEnd> {
        while let Some(message) = self.unsent.take().or_else(|| self.outbox.try_recv().ok()) {
            send(socket, &message).await?;
        }
        self.send_failure(socket, failed).await?;
        self.send_status(socket, state).await?;
        let close = async {
            socket.close(None).await?;
            while let Some(frame) = socket.next().await {
                frame?;
            }
            anyhow::Ok(())
        };
        // The server may have closed the connection first; everything was sent.
        let _ = timeout(CLOSE_TIMEOUT, close).await;
        Ok(LinkEnd::Stopping)
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
    // The error's text could quote the message, which may contain secrets.
    let message = serde_json::from_str(text).ok();
    if message.is_none() {
        tracing::warn!("ignoring an unknown control message; is the server newer?");
    }
    message
}

async fn send(socket: &mut WebSocket, message: &AgentMessage) -> anyhow::Result<()> {
    let text = serde_json::to_string(message)?;
    Ok(timeout(SILENCE_TIMEOUT, socket.send(Message::Text(text.into())))
        .await
        .context("the server does not read")??)
}

/// The load average over one minute.
fn load() -> f32 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or_default()
}
