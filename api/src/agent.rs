//! The protocol between the server and the agents: registration, the control link, and the streams that agents dial
//! back.
//!
//! An agent calls `POST /api/agent/register` with the credential its backend gave it, and gets a token of its own. With
//! that it opens `GET /api/agent/control`, a WebSocket whose text frames are [`AgentMessage`] and [`ServerMessage`] as
//! JSON. The server's first message is [`ServerMessage::Welcome`], which states the whole desired state
//! (level-triggered: a reconnection needs no history). When the server wants a byte stream it sends
//! [`ServerMessage::OpenStream`], and the agent dials `GET /api/agent/streams/STREAM`, a WebSocket of its own, so that
//! each stream has TCP's back-pressure to itself.
//!
//! If the token is refused (401), the agent registers again.

use std::{
    collections::BTreeMap,
    net::{Ipv6Addr, SocketAddr},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{KeyProof, Secret, WeaverId, WireGuardKey, attach::AttachQuery, weaver::EventKind};

/// The largest control message either side accepts, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// `POST /api/agent/register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Register {
    /// The weaver that the agent claims to run in; the credential must prove it.
    pub weaver_id: WeaverId,
    /// A one-time token on the local backend, the projected service-account token on Kubernetes.
    pub credential: Secret,
    pub version: String,
    /// The agent's [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The agent's WireGuard public key. Its private key exists only in the agent's memory and changes at each start.
    pub wireguard_key: WireGuardKey,
    /// Proves that the agent holds the key's private half.
    pub proof: KeyProof,
    /// The agent's SSH host key as a public key line (`ssh-ed25519 AAAA…`). It too changes at each start.
    pub ssh_host_key: String,
}

/// The answer to [`Register`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Registered {
    /// The agent's bearer token, valid for this weaver only and for as long as the weaver lives.
    pub token: Secret,
    /// The weaver's address inside the tunnel.
    #[schema(value_type = String)]
    pub address: Ipv6Addr,
    /// The host key's certificate, signed by the server's SSH CA (`ssh-ed25519-cert-v01@openssh.com AAAA…`). Its
    /// principal is the weaver's id.
    pub ssh_certificate: String,
}

/// Messages from the agent to the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentMessage {
    /// The current status, sent on connecting and at every change.
    Status(AgentStatus),
    /// UDP addresses at which the agent may be reachable, likeliest first; sent after the welcome and at every change.
    Candidates { candidates: Vec<SocketAddr> },
    /// A new event of the weaver: [`EventKind::Cloning`], [`EventKind::Cloned`], …
    Event { kind: EventKind, message: String },
    /// The [`ServerMessage::Grant`] with this `serial` is in force.
    GrantApplied { serial: u64 },
    /// A handshake came from a key that was never granted; the server answers with a grant, or not at all.
    UnknownPeer { public_key: WireGuardKey },
    /// The weaver cannot be set up: the clone failed, or the main program cannot be started.
    Failed { reason: String },
    /// The answer to [`ServerMessage::OpenStream`] when the stream cannot be opened.
    StreamFailed { stream: Uuid, reason: String },
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    pub main: MainState,
    /// TCP ports that the weaver's processes listen on, ascending.
    pub ports: Vec<u16>,
    /// The load average over one minute.
    pub load: f32,
}

/// The state of the weaver's main program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MainState {
    /// Not started: the host is not up yet, or the repository is being cloned.
    #[default]
    Waiting,
    Running,
    Exited {
        /// The exit code, or 128 plus the number of the signal that ended it.
        code: i32,
        /// The end of its output, base64, at most 64 KiB before encoding.
        tail: String,
        /// Whether the kernel killed it because the weaver ran out of memory.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        out_of_memory: bool,
    },
}

/// Messages from the server to the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// The first message: the whole desired state.
    Welcome {
        start: StartSpec,
        /// The grants in force, or the first page of them.
        grants: Vec<Grant>,
        /// Whether [`ServerMessage::Grants`] follow. After the last page the agent removes every peer that no page
        /// named.
        #[serde(default)]
        more: bool,
    },
    /// Another page of the grants in force.
    Grants { grants: Vec<Grant>, more: bool },
    /// Admit one more peer.
    Grant {
        /// Comes back in [`AgentMessage::GrantApplied`].
        serial: u64,
        grant: Grant,
    },
    /// Remove a peer and close its connections.
    Revoke { public_key: WireGuardKey },
    /// Dial back the stream `stream`: its id is part of the URL to dial.
    OpenStream { stream: Uuid, kind: StreamKind },
    /// When the weaver ends; sent at every change. The agent warns attached users when that is near.
    Deadline { expires_at: Timestamp },
    /// The server is restarting; reconnect after the given time.
    GoAway { reconnect_after_ms: u64 },
}

/// What the weaver is to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSpec {
    /// The main program and its arguments; a login shell when absent.
    pub command: Option<Vec<String>>,
    /// The environment of all processes in the weaver.
    pub env: BTreeMap<String, Secret>,
    /// The git repository to clone into the workspace before the main program starts.
    pub repo: Option<String>,
    /// The branch to check out; the repository's default when absent.
    pub branch: Option<String>,
}

/// A peer that the agent admits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub public_key: WireGuardKey,
    /// The device's address inside the tunnel: the only source address accepted from it.
    pub address: Ipv6Addr,
    /// The pre-shared key of this device and this weaver, base64 of 32 bytes.
    pub preshared_key: Secret,
    /// UDP addresses at which the device may be reachable.
    pub candidates: Vec<SocketAddr>,
    pub expires_at: Timestamp,
    /// The name of the device's user, for logs and `LOOM_USER`.
    pub user: String,
}

/// What a stream that the agent dials back carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StreamKind {
    /// The main terminal: the agent speaks the server's side of [`crate::attach`].
    Attach(AttachQuery),
    /// The main program's output as binary frames, from the oldest byte kept. Ends once all output so far was sent; with
    /// `follow`, when the program ends.
    Logs { follow: bool },
}
