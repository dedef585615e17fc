//! Weavers and their events, as the HTTP API shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{OrgId, Secret, UserId, WeaverId};

/// The lifetime of a weaver when the request names none, in hours.
pub const DEFAULT_LIFETIME_HOURS: f64 = 4.0;
/// The longest life of a weaver, extensions included, in hours from creation.
pub const MAX_LIFETIME_HOURS: f64 = 48.0;

/// The most weavers that `GET /api/weavers` lists at once.
pub const MAX_LIST: u32 = 1_000;

/// The pod's phase as a user should see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum WeaverStatus {
    /// Being made: waiting for a place, an image, the agent or the clone.
    Pending,
    /// The main program runs.
    Running,
    /// The main program ended with code 0.
    Succeeded,
    /// It could not be made, or its main program ended otherwise.
    Failed,
    /// The backend cannot say.
    Unknown,
}

impl WeaverStatus {
    /// Whether the weaver has ended for good.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

impl std::fmt::Display for WeaverStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Unknown => "Unknown",
        })
    }
}

/// What a weaver may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceSpec {
    /// CPU in thousandths of a core.
    pub cpu_millicores: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
}

/// `POST /api/weavers`. Every field may be left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateWeaver {
    /// The container image; the server's default otherwise.
    pub image: Option<String>,
    /// The organisation it belongs to; the caller's personal one otherwise.
    pub org_id: Option<OrgId>,
    /// A name, unique among the organisation's live weavers: a DNS label (RFC 1123).
    pub name: Option<String>,
    /// Environment of the weaver's processes. Kept sealed, and never part of a pod's spec.
    pub env: BTreeMap<String, Secret>,
    /// A git repository to clone into the workspace.
    pub repo: Option<String>,
    /// The branch to check out; needs `repo`.
    pub branch: Option<String>,
    /// Hours to live, counted from creation.
    pub lifetime_hours: Option<f64>,
    /// The main program and its arguments; the image's own otherwise.
    pub command: Option<Vec<String>>,
    /// What it may use; the server's setting otherwise.
    pub resources: Option<ResourceSpec>,
}

/// A weaver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Weaver {
    /// Its id.
    pub id: WeaverId,
    /// Its name, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The organisation it belongs to.
    pub org_id: OrgId,
    /// Who made it.
    pub owner_id: UserId,
    /// The image that was asked for.
    pub image: String,
    /// The repository cloned into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// The branch that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The main program that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// How it is.
    pub status: WeaverStatus,
    /// Why it is so, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Its life in hours, from creation, extensions included.
    pub lifetime_hours: f64,
    /// When it ends. Absolute: nothing but `extend` changes it.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
    /// Hours since creation.
    pub age_hours: f64,
    /// Hours until it ends, never below zero.
    pub remaining_hours: f64,
    /// The pod's name.
    pub pod_name: String,
    /// The pod's phase in the backend's own words; absent while there is no pod, as before it is made and after the
    /// weaver's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_phase: Option<String>,
    /// The pod's address, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_ip: Option<String>,
    /// The node that the pod runs on, on a backend that has nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The digest of the image that it runs, once that is known: `sha256:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
    /// The main program's exit code, or 128 plus the signal, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// What it may use.
    pub resources: ResourceSpec,
    /// The backend's isolation that could not be had, in words; empty when all of it could.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The agent, once it has reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentInfo>,
}

/// What a weaver's agent last reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentInfo {
    /// Whether its control link is up now.
    pub connected: bool,
    /// The agent's version.
    pub version: String,
    /// TCP ports that the weaver's processes listen on.
    pub ports: Vec<u16>,
    /// The load average over one minute, as the kernel gives it.
    pub load: f32,
}

/// `POST /api/weavers/ID/extend`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtendWeaver {
    /// Hours to add to the deadline.
    pub hours: f64,
}

/// The kinds of events, in the order in which a weaver usually meets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The request was accepted and recorded.
    Created,
    /// The backend has started the pod.
    Started,
    /// The agent has connected.
    AgentConnected,
    /// The clone has begun.
    Cloning,
    /// The clone is done.
    Cloned,
    /// The main program runs: people can come in.
    Ready,
    /// The backend has something to say (a pull, a scheduling problem).
    Backend,
    /// The agent's control link was lost.
    AgentDisconnected,
    /// The deadline was moved.
    Extended,
    /// The deadline is near.
    Expiring,
    /// The deadline has passed.
    Expired,
    /// The main program ended.
    Exited,
    /// The weaver failed.
    Failed,
    /// The weaver was deleted by a user.
    Deleted,
    /// A kind this build does not know: a newer server's.
    #[serde(other)]
    Unknown,
}

/// Something that happened to a weaver, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WeaverEvent {
    /// Grows with every event; a place to go on from.
    pub id: i64,
    /// The weaver it happened to.
    pub weaver_id: WeaverId,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// What kind of thing.
    pub kind: EventKind,
    /// In words.
    pub message: String,
}

/// `GET /api/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionInfo {
    /// The server's version.
    pub version: String,
    /// The protocol it speaks.
    pub protocol: u32,
    /// The backend that runs weavers: `local` or `kubernetes`.
    pub backend: String,
}
