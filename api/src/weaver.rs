//! Weavers and their events, as the HTTP API shows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{OrgId, Secret, UserId, WeaverId};

/// When the request names none.
pub const DEFAULT_LIFETIME_HOURS: f64 = 4.0;
/// Counted from creation, extensions included.
pub const MAX_LIFETIME_HOURS: f64 = 48.0;

/// The page size of `GET /api/weavers`.
pub const MAX_LIST: u32 = 1_000;

/// The pod's phase as a user should see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum WeaverStatus {
    /// Being created: waiting to be scheduled, for the image, the agent or the clone.
    Pending,
    /// The main program runs.
    Running,
    /// The main program exited with code 0.
    Succeeded,
    /// The weaver could not be created, or its main program did not exit with code 0.
    Failed,
    /// The backend does not know.
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

/// CPU and memory limits of a weaver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourceSpec {
    /// CPU in thousandths of a core.
    pub cpu_millicores: u32,
    /// Memory in MiB.
    pub memory_mb: u32,
}

/// `POST /api/weavers`. Every field is optional.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CreateWeaver {
    /// The container image; by default the server's.
    pub image: Option<String>,
    /// The organisation it belongs to; by default the caller's personal one.
    pub org_id: Option<OrgId>,
    /// A name, unique among the organisation's live weavers: a DNS label (RFC 1123).
    pub name: Option<String>,
    /// Environment of the weaver's processes. Stored encrypted, and never part of a pod's spec.
    pub env: BTreeMap<String, Secret>,
    /// A git repository to clone into the workspace.
    pub repo: Option<String>,
    /// The branch to check out; needs `repo`.
    pub branch: Option<String>,
    /// Hours from creation until the weaver ends; by default 4, at most 48.
    pub lifetime_hours: Option<f64>,
    /// The main program and its arguments; by default the image's.
    pub command: Option<Vec<String>>,
    /// By default what the server's settings say.
    pub resources: Option<ResourceSpec>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Weaver {
    pub id: WeaverId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub org_id: OrgId,
    /// The user who created it.
    pub owner_id: UserId,
    /// The image as requested; `image_digest` says which one that was.
    pub image: String,
    /// The git repository cloned into the workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo: Option<String>,
    /// The branch as requested; absent for the repository's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The main program and its arguments as requested; absent for the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    pub status: WeaverStatus,
    /// Why it has this status, for people to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Hours from creation to `expires_at`, extensions included.
    pub lifetime_hours: f64,
    /// When it ends. Only an extension changes it.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
    pub age_hours: f64,
    /// Hours until `expires_at`, never below zero.
    pub remaining_hours: f64,
    pub pod_name: String,
    /// The pod's phase as the backend names it; absent before the pod is created and after the weaver's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_phase: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_ip: Option<String>,
    /// The node that the pod runs on, on a backend that has nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The digest of the image that it runs, once known: `sha256:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
    /// The main program's exit code, or 128 plus the number of the signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    pub resources: ResourceSpec,
    /// The parts of the backend's isolation that are not in place, for people to read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// What the agent last reported; absent before its first report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentInfo>,
}

/// What a weaver's agent reports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AgentInfo {
    /// Whether its control link is up now.
    pub connected: bool,
    pub version: String,
    /// TCP ports that the weaver's processes listen on.
    pub ports: Vec<u16>,
    /// The kernel's load average over one minute.
    pub load: f32,
}

/// `POST /api/weavers/ID/extend`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExtendWeaver {
    /// Hours to add to the deadline.
    pub hours: f64,
}

/// What happened, in the order in which it usually happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The request was accepted and recorded.
    Created,
    /// The backend has started the pod.
    Started,
    /// The agent's control link is up.
    AgentConnected,
    /// Cloning the repository has begun.
    Cloning,
    /// The repository is cloned.
    Cloned,
    /// The main program runs, and users can attach.
    Ready,
    /// News from the backend, such as an image pull or a scheduling problem.
    Backend,
    /// The agent's control link was lost.
    AgentDisconnected,
    /// A user moved the deadline.
    Extended,
    /// The deadline is near.
    Expiring,
    /// The deadline has passed.
    Expired,
    /// The main program exited.
    Exited,
    /// The weaver could not be created, or was lost.
    Failed,
    /// A user deleted the weaver.
    Deleted,
    /// Sent by a newer server, and unknown to this build.
    #[serde(other)]
    Unknown,
}

/// Something that happened to a weaver.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WeaverEvent {
    /// Grows with every event; `?after=ID` continues after it.
    pub id: i64,
    pub weaver_id: WeaverId,
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    pub kind: EventKind,
    /// What happened and why, for people to read.
    pub message: String,
}

/// `GET /api/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VersionInfo {
    pub version: String,
    /// The version of the agent, relay and attach protocols.
    pub protocol: u32,
    /// The backend that runs weavers: `local` or `kubernetes`.
    pub backend: String,
}
