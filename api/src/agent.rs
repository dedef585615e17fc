//! Between the server and the agents: registration, the control link, and the streams that agents dial back.
//!
//! An agent calls `POST /api/agent/register` with the credential its backend gave it, and gets a token of its own. With
//! that it opens `GET /api/agent/control`, a WebSocket whose text frames are [`AgentMessage`] and [`ServerMessage`] as
//! JSON. The server's first message is [`ServerMessage::Welcome`], which states everything that should be
//! (level-triggered: a reconnection needs no history). When the server wants a byte stream it sends
//! [`ServerMessage::OpenStream`], and the agent dials `GET /api/agent/streams/STREAM`, another WebSocket, so that each
//! stream's back-pressure is its own TCP's.
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
    /// The weaver that the agent says it is in; the credential must prove it.
    pub weaver_id: WeaverId,
    /// On the local backend a one-time token; on Kubernetes the projected service-account token.
    pub credential: Secret,
    /// The agent's version.
    pub version: String,
    /// The protocol it speaks.
    pub protocol: u32,
    /// Its WireGuard public key, made in memory at start.
    pub wireguard_key: WireGuardKey,
    /// That it holds the private half.
    pub proof: KeyProof,
    /// Its SSH host key, made in memory at start, as a public key line (`ssh-ed25519 AAAA…`).
    pub ssh_host_key: String,
}

/// The answer to [`Register`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Registered {
    /// The agent's bearer token, for this weaver only and as long as it lives.
    pub token: Secret,
    /// The weaver's address inside the tunnel.
    #[schema(value_type = String)]
    pub address: Ipv6Addr,
    /// The host key signed by the server's SSH CA (`ssh-ed25519-cert-v01@openssh.com AAAA…`), principal the weaver's
    /// id.
    pub ssh_certificate: String,
}

/// What the agent says on the control link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentMessage {
    /// How things are; sent at connection and at every change.
    Status(AgentStatus),
    /// UDP addresses where the agent can perhaps be reached; sent after the welcome and at every change.
    Candidates {
        /// The addresses, the likeliest first.
        candidates: Vec<SocketAddr>,
    },
    /// Something happened that the weaver's events should tell.
    Event {
        /// What kind ([`EventKind::Cloning`], [`EventKind::Cloned`], …).
        kind: EventKind,
        /// In words.
        message: String,
    },
    /// The grants of [`ServerMessage::Grant`] number `serial` are in force.
    GrantApplied {
        /// From the server's message.
        serial: u64,
    },
    /// A handshake came from a key that was never granted; the server answers with a grant, or not at all.
    UnknownPeer {
        /// The key.
        public_key: WireGuardKey,
    },
    /// The weaver cannot become what was asked (the clone failed, the program cannot be started).
    Failed {
        /// Why, in words.
        reason: String,
    },
    /// A stream that the server asked for cannot be opened.
    StreamFailed {
        /// Which.
        stream: Uuid,
        /// Why, in words.
        reason: String,
    },
}

/// The agent's report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The main program's state.
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
    /// Not started: the host is not there yet, or the clone goes on.
    #[default]
    Waiting,
    /// Running.
    Running,
    /// Ended.
    Exited {
        /// Its exit code, or 128 plus the signal.
        code: i32,
        /// The end of its output, base64, at most 64 KiB before encoding.
        tail: String,
        /// Whether the kernel killed it because the weaver's memory was used up.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        out_of_memory: bool,
    },
}

/// What the server says on the control link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerMessage {
    /// The first message: everything that should be.
    Welcome {
        /// What the weaver is to run.
        start: StartSpec,
        /// The grants in force, or the first of them.
        grants: Vec<Grant>,
        /// Whether [`ServerMessage::Grants`] follow. Peers that none of the pages names are removed after the last.
        #[serde(default)]
        more: bool,
    },
    /// Another page of the grants in force.
    Grants {
        /// The grants.
        grants: Vec<Grant>,
        /// Whether more follow.
        more: bool,
    },
    /// Admit one more peer.
    Grant {
        /// Comes back in [`AgentMessage::GrantApplied`].
        serial: u64,
        /// The peer.
        grant: Grant,
    },
    /// Remove a peer, and cut its flows.
    Revoke {
        /// The peer's key.
        public_key: WireGuardKey,
    },
    /// Dial back a stream.
    OpenStream {
        /// Its id, for the address to dial.
        stream: Uuid,
        /// What flows on it.
        kind: StreamKind,
    },
    /// The deadline, at every change: people who are attached are told when it is near.
    Deadline {
        /// When the weaver ends.
        expires_at: Timestamp,
    },
    /// The server is going down for a moment: come back after so many milliseconds.
    GoAway {
        /// Milliseconds.
        reconnect_after_ms: u64,
    },
}

/// What the weaver is to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSpec {
    /// The main program and its arguments; a login shell when there is none.
    pub command: Option<Vec<String>>,
    /// The environment of all the weaver's processes.
    pub env: BTreeMap<String, Secret>,
    /// The repository to clone into the workspace first.
    pub repo: Option<String>,
    /// The branch to check out.
    pub branch: Option<String>,
}

/// One peer that may come in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The device's WireGuard public key.
    pub public_key: WireGuardKey,
    /// The device's address inside the tunnel: the only source address accepted from it.
    pub address: Ipv6Addr,
    /// The pair's pre-shared key, base64 of 32 bytes.
    pub preshared_key: Secret,
    /// UDP addresses where the device can perhaps be reached.
    pub candidates: Vec<SocketAddr>,
    /// Until when.
    pub expires_at: Timestamp,
    /// The user whose device it is, for logs and `LOOM_USER`.
    pub user: String,
}

/// What flows on a stream that the agent dials back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StreamKind {
    /// The main terminal: the agent speaks the server's side of [`crate::attach`].
    Attach(AttachQuery),
    /// The main program's output as binary frames, from the oldest byte kept; the stream ends when `follow` is false
    /// and all was sent, or with the program.
    Logs {
        /// Goes on with what comes.
        follow: bool,
    },
}
