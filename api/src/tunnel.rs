//! What a client needs to reach a weaver privately, and what the weaver's agent says inside the tunnel.

use std::net::{Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{KeyProof, Secret, WeaverId, WireGuardKey};

/// The TCP port of the agent's SSH server, on the weaver's tunnel address.
pub const SSH_PORT: u16 = 22;

/// The TCP port, on the weaver's tunnel address, where the agent tells what the weaver listens on: one
/// [`PortReport`] as JSON per line, the first at once, the next at every change. Port 1 (tcpmux, RFC 1078) is
/// reserved, so that no program of the user's is hidden behind it.
pub const PORTS_PORT: u16 = 1;

/// `POST /api/weavers/ID/tunnel`: admits a device to a weaver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenTunnel {
    /// The device's WireGuard public key. It belongs to the first user who proves to hold it.
    pub public_key: WireGuardKey,
    /// Needed when the server does not know the key as the user's yet; [`crate::ErrorCode::KeyNotProven`] asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<KeyProof>,
    /// UDP addresses where the device can perhaps be reached.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub candidates: Vec<SocketAddr>,
}

/// The grant: both sides of one WireGuard peering.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TunnelGrant {
    /// The weaver.
    pub weaver_id: WeaverId,
    /// The agent's WireGuard public key. A restarted agent has another: ask again.
    pub peer_key: WireGuardKey,
    /// The weaver's address inside the tunnel.
    #[schema(value_type = String)]
    pub peer_address: Ipv6Addr,
    /// UDP addresses where the agent can perhaps be reached.
    #[schema(value_type = Vec<String>)]
    pub candidates: Vec<SocketAddr>,
    /// The device's address inside the tunnel.
    #[schema(value_type = String)]
    pub device_address: Ipv6Addr,
    /// The pair's WireGuard pre-shared key, base64 of 32 bytes.
    pub preshared_key: Secret,
    /// When the agent stops admitting the device: the weaver's own end.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
    /// The SSH certificate authority that signs agents' host keys, as a public key line. The certificate's
    /// principal is the weaver's id.
    pub ssh_ca: String,
}

/// `GET /api/ssh-ca`: the authority that signs all weavers' SSH host keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshAuthority {
    /// Its public key line (`ssh-ed25519 AAAA…`).
    pub public_key: String,
}

/// What the agent sends on [`PORTS_PORT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// TCP ports that the weaver's processes listen on, ascending.
    pub ports: Vec<u16>,
}
