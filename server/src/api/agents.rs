//! The agents: registration, and one control link for each weaver.
//!
//! What an agent reports becomes the weaver's row and events here; what the server wants of it is a [`ServerMessage`].
//! An agent is not trusted: it runs beside a user's programs. It may write the kinds of events that are its own to tell,
//! all that it says is bounded in length and rate, and none of it costs more the more weavers there are.

use anyhow::Context as _;
use axum::{
    extract::{
        State,
        ws::{Message, WebSocket},
    },
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use loom_api::{
    ErrorCode, PROTOCOL_VERSION, WeaverId, WireGuardKey,
    agent::{AgentMessage, AgentStatus, MainState, Register, Registered, ServerMessage, StartSpec},
    weaver::EventKind,
};
use tokio::time::{Instant, interval, sleep, timeout};

use super::{
    auth::AgentCaller,
    body::Body,
    extract::Upgrade,
    tunnels::MAX_CANDIDATES,
    websocket::{Close, PING, SILENCE},
};
use crate::{
    problem::{Answer, Problem},
    sessions::{LostRight, Session, SessionKind},
    state::AppState,
    store::GRANT_PAGE,
    weaver::{Agent, Ending, Event, Weaver},
};

/// How much of a control link is read at once, in bytes: more than almost all messages have. Each link has a buffer of
/// that size.
const READ_BUFFER: usize = 4 << 10;
/// The largest message of an agent, in bytes: a status with 64 KiB of output in base64.
const MAX_AGENT_MESSAGE: usize = 128 << 10;
/// The longest version that an agent may claim, in bytes.
const MAX_VERSION: usize = 100;
/// The longest reason and event of an agent, in bytes.
const MAX_TEXT: usize = 1 << 10;
/// The most ports that are remembered of a weaver.
const MAX_PORTS: usize = 1_024;
/// What a link costs of an agent's allowance: the events of its beginning and its end.
const LINK_COST: u32 = 2;
/// What a registration costs of it: the writes of a key and a token.
const REGISTRATION_COST: u32 = 2;

/// Registers an agent.
#[utoipa::path(post, path = "/api/agent/register", tag = "agent", request_body = Register,
    responses((status = 200, body = Registered), (status = "4XX", body = loom_api::ErrorBody)))]
pub async fn register(State(app): State<AppState>, Body(request): Body<Register>) -> Answer<axum::Json<Registered>> {
    let unproven =
        || Problem::new(ErrorCode::Unauthorized, "the credential does not prove that this is the weaver's agent");
    let weaver = request.weaver_id;
    let row = app.store.weaver(weaver).await?.filter(|row| !row.has_ended()).ok_or_else(unproven)?;
    if request.protocol > PROTOCOL_VERSION {
        return Err(Problem::new(
            ErrorCode::InvalidRequest,
            format!("protocol {} is newer than the server's", request.protocol),
        ));
    }
    if request.version.len() > MAX_VERSION {
        return Err(Problem::new(ErrorCode::InvalidRequest, format!("a version has at most {MAX_VERSION} bytes")));
    }
    let verified = app.provisioner.verify_credential(weaver, &request.credential).await;
    if !verified.map_err(anyhow::Error::from)? {
        return Err(unproven());
    }
    take_allowance(&app, weaver, REGISTRATION_COST)?;
    let ssh_certificate = app
        .secrets
        .sign_host_key(weaver, &request.ssh_host_key, row.latest_end())
        .map_err(|error| Problem::new(ErrorCode::InvalidRequest, format!("{error:#}")))?;
    let row = app.admission.register(weaver, &request.version, request.wireguard_key, &request.proof).await?;
    let token = app.store.replace_agent_token(weaver).await?;
    Ok(axum::Json(Registered { token, address: row.address, ssh_certificate }))
}

/// An agent's control link.
#[utoipa::path(get, path = "/api/agent/control", tag = "agent",
    responses((status = 101, description = "a WebSocket of control messages")), security(("bearer" = [])))]
pub async fn control(
    State(app): State<AppState>,
    AgentCaller { weaver, principal }: AgentCaller,
    Upgrade(upgrade): Upgrade,
) -> Answer<Response> {
    let row = app.store.weaver(weaver).await?.filter(|row| !row.has_ended());
    let agent =
        row.and_then(|row| row.agent).ok_or_else(|| Problem::new(ErrorCode::WeaverGone, "the weaver has ended"))?;
    // Refused rather than kept waiting: a link that waits would hold a connection.
    take_allowance(&app, weaver, LINK_COST)?;
    let session = app.sessions.register(SessionKind::Agent, principal)?;
    let upgrade =
        upgrade.max_message_size(MAX_AGENT_MESSAGE).max_frame_size(MAX_AGENT_MESSAGE).read_buffer_size(READ_BUFFER);
    Ok(upgrade.on_upgrade(async move |socket| {
        if let Err(error) = run_link(&app, weaver, agent, socket, &session).await {
            tracing::info!(%weaver, "control link: {error:#}");
        }
    }))
}

fn take_allowance(app: &AppState, weaver: WeaverId, cost: u32) -> Answer<()> {
    if app.agents.allowances.take(weaver, cost) {
        return Ok(());
    }
    let message = "the weaver's agent makes too many requests";
    Err(Problem::new(ErrorCode::TooManyRequests, message).hint("try again in a few seconds"))
}

async fn run_link(
    app: &AppState,
    weaver: WeaverId,
    agent: Agent,
    mut socket: WebSocket,
    session: &Session,
) -> anyhow::Result<()> {
    let (serial, mut inbox) = app.agents.connect(weaver, agent.version);
    let result = async {
        // Read again, now that what changes is told on this link.
        let row = app.store.weaver(weaver).await?.filter(|row| !row.has_ended()).context("the weaver has ended")?;
        welcome(app, &row, &agent.wireguard_key, &mut socket).await?;
        send(&mut socket, &ServerMessage::Deadline { expires_at: row.expires_at }).await?;
        // After the welcome: where a thousand come back at once, none waits in the line of those who write.
        app.events.write(weaver, Event::new(EventKind::AgentConnected, "the agent has connected")).await;
        let (mut ping, mut heard) = (interval(PING), Instant::now());
        let allowances = &app.agents.allowances;
        loop {
            let pause = allowances.pause(weaver);
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => send(&mut socket, &message).await?,
                    None => return Ok(()), // a newer link, or the weaver's end
                },
                frame = socket.recv(), if pause.is_zero() => {
                    heard = Instant::now();
                    match frame.context("it was closed")?? {
                        Message::Text(text) => allowances.spend(weaver, receive(app, weaver, &text).await?),
                        Message::Close(_) => return Ok(()),
                        _ => allowances.spend(weaver, 1),
                    }
                }
                lost = session.lost() => return refuse(&mut socket, lost).await,
                // What is not read waits with the agent.
                () = sleep(pause), if !pause.is_zero() => heard = Instant::now(),
                _ = ping.tick() => {
                    anyhow::ensure!(heard.elapsed() < SILENCE, "nothing was heard for {SILENCE:?}");
                    timeout(SILENCE, socket.send(Message::Ping(bytes::Bytes::new()))).await??;
                }
            }
        }
    }
    .await;
    if app.agents.disconnected(weaver, serial) && !app.stopping.is_cancelled() {
        let lost = Event::new(EventKind::AgentDisconnected, "the agent's connection was lost");
        app.events.write(weaver, lost).await;
    }
    if !app.agents.is_connected(weaver) {
        app.streams.lost(weaver);
    }
    result
}

/// Closes the link of a token that was replaced.
async fn refuse(socket: &mut WebSocket, lost: LostRight) -> anyhow::Result<()> {
    Close::Refused(lost.into()).tell(socket, None).await;
    anyhow::bail!("its token was replaced")
}

async fn send(socket: &mut WebSocket, message: &ServerMessage) -> anyhow::Result<()> {
    let text = serde_json::to_string(message)?;
    Ok(timeout(SILENCE, socket.send(Message::Text(text.into()))).await??)
}

/// States everything that should be: what to run, and all grants, page by page.
async fn welcome(app: &AppState, row: &Weaver, key: &WireGuardKey, socket: &mut WebSocket) -> anyhow::Result<()> {
    let sealed = app.store.sealed_env(row.id).await?;
    let env = app.secrets.open(&row.id.to_string(), &sealed).context("the weaver's environment")?;
    let image_command = row.resolved.as_ref().map(|image| &image.command);
    let start = StartSpec {
        command: row.command.as_ref().or(image_command).cloned(),
        env: serde_json::from_slice(&env)?,
        repo: row.repo.clone(),
        branch: row.branch.clone(),
    };
    let mut start = Some(start);
    let mut after = None;
    loop {
        let grants = app.admission.grants(row.id, key, after).await?;
        after = grants.last().map(|grant| grant.public_key);
        let more = grants.len() >= GRANT_PAGE as usize;
        let page = match start.take() {
            Some(start) => ServerMessage::Welcome { start, grants, more },
            None => ServerMessage::Grants { grants, more },
        };
        send(socket, &page).await?;
        if !more {
            return Ok(());
        }
    }
}

/// Does what a message asks for; how much of the agent's allowance it costs. Nothing here takes longer the more
/// weavers there are.
async fn receive(app: &AppState, weaver: WeaverId, text: &str) -> anyhow::Result<u32> {
    let message: AgentMessage = match serde_json::from_str(text) {
        Ok(message) => message,
        Err(error) => {
            // It quotes what was said.
            let reason = bounded(error.to_string());
            tracing::warn!(%weaver, "a control message that cannot be read: {}", reason.escape_debug());
            return Ok(1);
        }
    };
    match message {
        AgentMessage::Status(status) => {
            let mut status = bounded_status(status);
            let main = std::mem::take(&mut status.main);
            app.agents.status(weaver, status);
            main_state(app, weaver, main).await?;
        }
        AgentMessage::Candidates { mut candidates } => {
            candidates.truncate(MAX_CANDIDATES);
            app.store.transition(weaver, |row| row.reachable_at(&candidates).map(|()| None)).await?;
        }
        AgentMessage::Event { kind: kind @ (EventKind::Cloning | EventKind::Cloned), message } => {
            app.events.write(weaver, Event::new(kind, bounded(message))).await;
        }
        AgentMessage::Event { kind, .. } => {
            tracing::warn!(%weaver, ?kind, "an agent may not write events of this kind");
        }
        // What the server has asked for costs nothing, however much it was.
        AgentMessage::GrantApplied { serial } => {
            let was_asked = app.agents.applied(weaver, serial);
            return Ok(u32::from(!was_asked));
        }
        AgentMessage::StreamFailed { stream, reason } => {
            let was_asked = app.streams.failed(weaver, stream, bounded(reason));
            return Ok(u32::from(!was_asked));
        }
        AgentMessage::UnknownPeer { public_key } => app.admission.introduce(weaver, public_key).await?,
        AgentMessage::Failed { reason } => {
            app.reconciler.end(weaver, Ending::Failed { reason: bounded(reason) }).await?;
        }
    }
    Ok(1)
}

async fn main_state(app: &AppState, weaver: WeaverId, main: MainState) -> anyhow::Result<()> {
    match main {
        MainState::Waiting => Ok(()),
        MainState::Running => app.reconciler.ran(weaver).await,
        MainState::Exited { code, tail, out_of_memory } => {
            app.store.keep_output(weaver, &STANDARD.decode(tail).unwrap_or_default()).await?;
            app.reconciler.end(weaver, Ending::Exited { code, out_of_memory }).await
        }
    }
}

fn bounded_status(mut status: AgentStatus) -> AgentStatus {
    status.ports.truncate(MAX_PORTS);
    // JSON has no infinity: nobody could read a list of weavers with one in it.
    if !status.load.is_finite() {
        status.load = 0.0;
    }
    status
}

/// What an agent says, as long as it may be.
fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_never_makes_a_list_of_weavers_unreadable() {
        let status: AgentStatus =
            serde_json::from_str(r#"{"main":{"state":"running"},"ports":[80],"load":1e300}"#).expect("a status");
        let written = serde_json::to_string(&bounded_status(status)).expect("JSON");
        assert!(serde_json::from_str::<AgentStatus>(&written).is_ok(), "{written}");
    }

    #[test]
    fn what_an_agent_says_is_cut_between_characters() {
        assert_eq!(bounded("é".repeat(MAX_TEXT)).len(), MAX_TEXT);
        assert!(bounded(format!("a{}", "é".repeat(MAX_TEXT))).len() < MAX_TEXT);
    }
}
