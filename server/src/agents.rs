//! The agents: registration, and one control link for each weaver.
//!
//! The [`Hub`] knows which links are up; it holds nothing that a reconnection does not bring again. What an agent
//! reports becomes the weaver's row and events here; what the server wants of it is a [`ServerMessage`].

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{
    extract::{
        State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::SignedDuration;
use loom_api::{
    ErrorCode, PROTOCOL_VERSION, WeaverId,
    agent::{AgentMessage, AgentStatus, Grant, MAX_MESSAGE, MainState, Register, Registered, ServerMessage, StartSpec},
    weaver::{AgentInfo, EventKind, MAX_LIFETIME_HOURS, WeaverStatus},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, interval, timeout},
};

use crate::{
    api::Body,
    app::AppState,
    auth::AgentCaller,
    problem::{Answer, Problem},
    reconcile::{self, End},
    store::{LiveGrant, WeaverRow},
};

/// Messages to one agent that wait; one who finds it full gives up on that agent.
const OUTBOX: usize = 256;
/// Between two pings of an idle link: under the minute after which proxies cut it.
const PING: Duration = Duration::from_secs(15);
/// After so long without a word a link is dead.
const SILENCE: Duration = Duration::from_secs(40);
/// How long an agent may take to admit a peer.
const GRANT_TIMEOUT: Duration = Duration::from_secs(2);
/// What agents wait before they come back to a server that stops, plus their own jitter.
const RECONNECT_AFTER_MS: u64 = 200;
/// How much of a control link is read at once, in bytes: more than almost all messages have. Each link has a buffer of
/// that size.
const READ_BUFFER: usize = 4 << 10;

/// The links that are up.
#[derive(Default)]
pub struct Hub {
    links: Mutex<HashMap<WeaverId, Link>>,
    serial: AtomicU64,
}

struct Link {
    serial: u64,
    outbox: mpsc::Sender<ServerMessage>,
    version: String,
    status: AgentStatus,
    unacknowledged: HashMap<u64, oneshot::Sender<()>>,
}

impl Hub {
    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<WeaverId, Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a message to an agent; whether its link is up.
    pub fn send(&self, weaver: WeaverId, message: ServerMessage) -> bool {
        self.links().get(&weaver).is_some_and(|link| link.outbox.try_send(message).is_ok())
    }

    /// Has an agent admit a peer, and waits until it has.
    ///
    /// # Errors
    ///
    /// When its link is down, or it does not answer.
    pub async fn grant(&self, weaver: WeaverId, grant: Grant) -> Answer<()> {
        let serial = self.next_serial();
        let (applied, wait) = oneshot::channel();
        let sent = self.links().get_mut(&weaver).is_some_and(|link| {
            link.unacknowledged.insert(serial, applied);
            link.outbox.try_send(ServerMessage::Grant { serial, grant }).is_ok()
        });
        if !sent {
            return Err(not_connected());
        }
        let answer = timeout(GRANT_TIMEOUT, wait).await;
        if let Some(link) = self.links().get_mut(&weaver) {
            link.unacknowledged.remove(&serial);
        }
        match answer {
            Ok(Ok(())) => Ok(()),
            _ => Err(Problem::new(ErrorCode::AgentUnreachable, "the weaver's agent did not answer").hint("try again")),
        }
    }

    /// What an agent last reported, if it is connected.
    pub fn info(&self, weaver: WeaverId) -> Option<AgentInfo> {
        self.links().get(&weaver).map(|link| AgentInfo {
            connected: true,
            version: link.version.clone(),
            ports: link.status.ports.clone(),
            load: link.status.load,
        })
    }

    /// Tells all agents that the server goes down.
    pub fn go_away(&self) {
        for link in self.links().values() {
            // An agent that cannot be told notices by itself.
            let _ = link.outbox.try_send(ServerMessage::GoAway { reconnect_after_ms: RECONNECT_AFTER_MS });
        }
    }

    /// Lets go of an agent's link: its weaver has ended.
    pub fn disconnect(&self, weaver: WeaverId) {
        self.links().remove(&weaver);
    }

    fn connect(&self, weaver: WeaverId, version: String) -> (u64, mpsc::Receiver<ServerMessage>) {
        let (outbox, inbox) = mpsc::channel(OUTBOX);
        let serial = self.next_serial();
        let link = Link { serial, outbox, version, status: AgentStatus::default(), unacknowledged: HashMap::new() };
        // An older link of the same weaver loses its outbox by this, and ends.
        self.links().insert(weaver, link);
        (serial, inbox)
    }

    /// How many links are up.
    #[must_use]
    pub fn count(&self) -> usize {
        self.links().len()
    }

    /// Whether the link `serial` was the weaver's last one.
    fn disconnected(&self, weaver: WeaverId, serial: u64) -> bool {
        let mut links = self.links();
        let last = links.get(&weaver).is_some_and(|link| link.serial == serial);
        if last {
            links.remove(&weaver);
        }
        last
    }

    fn status(&self, weaver: WeaverId, status: AgentStatus) {
        if let Some(link) = self.links().get_mut(&weaver) {
            link.status = status;
        }
    }

    fn applied(&self, weaver: WeaverId, serial: u64) {
        let waiting = self.links().get_mut(&weaver).and_then(|link| link.unacknowledged.remove(&serial));
        if let Some(waiting) = waiting {
            // Who waited may have gone.
            let _ = waiting.send(());
        }
    }
}

/// Registers an agent.
#[utoipa::path(post, path = "/api/agent/register", tag = "agent", request_body = Register,
    responses((status = 200, body = Registered), (status = "4XX", body = loom_api::ErrorBody)))]
pub async fn register(State(app): State<AppState>, Body(request): Body<Register>) -> Answer<axum::Json<Registered>> {
    let unproven =
        || Problem::new(ErrorCode::Unauthorized, "the credential does not prove that this is the weaver's agent");
    let weaver = request.weaver_id;
    let row = app.store.weaver(weaver).await?.filter(|row| row.wanted).ok_or_else(unproven)?;
    if request.protocol > PROTOCOL_VERSION {
        return Err(Problem::new(
            ErrorCode::InvalidRequest,
            format!("protocol {} is newer than the server's", request.protocol),
        ));
    }
    let verified = app.provisioner.verify_credential(weaver, &request.credential).await;
    if !verified.map_err(anyhow::Error::from)? {
        return Err(unproven());
    }
    let longest = row.created_at + SignedDuration::from_secs_f64(MAX_LIFETIME_HOURS * 3600.0);
    let ssh_certificate = app
        .secrets
        .sign_host_key(weaver, &request.ssh_host_key, longest)
        .map_err(|error| Problem::new(ErrorCode::InvalidRequest, format!("{error:#}")))?;
    let token = app.store.replace_agent_token(weaver).await?;
    app.store
        .change_weaver(weaver, |row| {
            row.agent_version = Some(request.version.clone());
            row.wireguard_key = Some(request.wireguard_key);
            row.candidates.clear();
            true
        })
        .await?;
    app.relay.load(&app.store).await?;
    Ok(axum::Json(Registered { token, address: row.address, ssh_certificate }))
}

/// An agent's control link.
#[utoipa::path(get, path = "/api/agent/control", tag = "agent",
    responses((status = 101, description = "a WebSocket of control messages")), security(("bearer" = [])))]
pub async fn control(
    State(app): State<AppState>,
    AgentCaller(weaver): AgentCaller,
    upgrade: WebSocketUpgrade,
) -> Answer<Response> {
    let row = live_row(&app, weaver).await?;
    Ok(upgrade.max_message_size(MAX_MESSAGE).read_buffer_size(READ_BUFFER).on_upgrade(async move |socket| {
        if let Err(error) = run_link(&app, row, socket).await {
            tracing::info!(%weaver, "control link: {error:#}");
        }
    }))
}

/// That a weaver's agent has no link now.
pub(crate) fn not_connected() -> Problem {
    Problem::new(ErrorCode::WeaverNotReady, "the weaver's agent is not connected")
        .hint("it comes back by itself; `loom events` shows what happens")
}

async fn live_row(app: &AppState, weaver: WeaverId) -> Answer<WeaverRow> {
    app.store
        .weaver(weaver)
        .await?
        .filter(|row| row.wanted)
        .ok_or_else(|| Problem::new(ErrorCode::WeaverGone, "the weaver has ended"))
}

async fn run_link(app: &AppState, row: WeaverRow, mut socket: WebSocket) -> anyhow::Result<()> {
    let weaver = row.id;
    let (serial, mut inbox) = app.agents.connect(weaver, row.agent_version.clone().unwrap_or_default());
    app.events.write(weaver, EventKind::AgentConnected, "the agent has connected").await;
    let result = async {
        send(&mut socket, &welcome(app, &row).await?).await?;
        send(&mut socket, &ServerMessage::Deadline { expires_at: row.expires_at }).await?;
        let (mut ping, mut heard) = (interval(PING), Instant::now());
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => send(&mut socket, &message).await?,
                    None => return Ok(()), // a newer link, or the weaver's end
                },
                frame = socket.recv() => {
                    heard = Instant::now();
                    match frame.context("it was closed")?? {
                        Message::Text(text) => receive(app, weaver, &text).await?,
                        Message::Close(_) => return Ok(()),
                        _ => {}
                    }
                }
                _ = ping.tick() => {
                    anyhow::ensure!(heard.elapsed() < SILENCE, "nothing was heard for {SILENCE:?}");
                    socket.send(Message::Ping(bytes::Bytes::new())).await?;
                }
            }
        }
    }
    .await;
    if app.agents.disconnected(weaver, serial) && !app.stopping.is_cancelled() {
        app.events.write(weaver, EventKind::AgentDisconnected, "the agent's connection was lost").await;
    }
    if app.agents.info(weaver).is_none() {
        app.streams.lost(weaver);
    }
    result
}

async fn send(socket: &mut WebSocket, message: &ServerMessage) -> anyhow::Result<()> {
    let text = serde_json::to_string(message)?;
    Ok(timeout(SILENCE, socket.send(Message::Text(text.into()))).await??)
}

async fn welcome(app: &AppState, row: &WeaverRow) -> anyhow::Result<ServerMessage> {
    let env = app.secrets.open(&row.id.to_string(), &row.sealed_env).context("the weaver's environment")?;
    let start = StartSpec {
        command: row.command.as_ref().or(row.image_command.as_ref()).cloned(),
        env: serde_json::from_slice(&env)?,
        repo: row.repo.clone(),
        branch: row.branch.clone(),
    };
    let grants = app.store.grants(row.id).await?;
    Ok(ServerMessage::Welcome {
        start,
        grants: grants.into_iter().filter_map(|grant| complete(app, row, grant)).collect(),
    })
}

/// A grant with its pre-shared key, once the agent has a key.
#[must_use]
pub fn complete(app: &AppState, row: &WeaverRow, grant: LiveGrant) -> Option<Grant> {
    Some(Grant {
        preshared_key: app.secrets.preshared_key(&row.wireguard_key?, &grant.device),
        public_key: grant.device,
        address: grant.address,
        candidates: grant.candidates,
        expires_at: grant.expires_at,
        user: grant.user,
    })
}

async fn receive(app: &AppState, weaver: WeaverId, text: &str) -> anyhow::Result<()> {
    let message: AgentMessage = match serde_json::from_str(text) {
        Ok(message) => message,
        Err(error) => {
            tracing::warn!(%weaver, "a control message that cannot be read: {error}");
            return Ok(());
        }
    };
    match message {
        AgentMessage::Status(status) => {
            let main = status.main.clone();
            app.agents.status(weaver, status);
            main_state(app, weaver, main).await?;
        }
        AgentMessage::Candidates { candidates } => {
            let changed = |row: &mut WeaverRow| {
                row.candidates.clone_from(&candidates);
                true
            };
            app.store.change_weaver(weaver, changed).await?;
        }
        AgentMessage::Event { kind, message } => app.events.write(weaver, kind, message).await,
        AgentMessage::GrantApplied { serial } => app.agents.applied(weaver, serial),
        AgentMessage::UnknownPeer { public_key } => {
            let row = app.store.weaver(weaver).await?.context("the weaver's row")?;
            let grants = app.store.grants(weaver).await?;
            if let Some(grant) = grants.into_iter().find(|grant| grant.device == public_key)
                && let Some(grant) = complete(app, &row, grant)
            {
                app.agents.send(weaver, ServerMessage::Grant { serial: app.agents.next_serial(), grant });
            }
        }
        AgentMessage::Failed { reason } => reconcile::end(app, weaver, End::Failed { reason }).await?,
        AgentMessage::StreamFailed { stream, reason } => app.streams.failed(weaver, stream, reason),
    }
    Ok(())
}

async fn main_state(app: &AppState, weaver: WeaverId, main: MainState) -> anyhow::Result<()> {
    match main {
        MainState::Waiting => {}
        MainState::Running => {
            let mut first = false;
            let running = |row: &mut WeaverRow| {
                first = row.status == WeaverStatus::Pending && row.ended_at.is_none();
                if first {
                    row.status = WeaverStatus::Running;
                    row.reason = None;
                }
                first
            };
            app.store.change_weaver(weaver, running).await?;
            if first {
                app.events.write(weaver, EventKind::Ready, "the main program runs").await;
            }
        }
        MainState::Exited { code, tail, out_of_memory } => {
            let tail = STANDARD.decode(tail).unwrap_or_default();
            reconcile::end(app, weaver, End::Exited { code, tail, out_of_memory }).await?;
        }
    }
    Ok(())
}
