//! What a client needs to reach a weaver privately, and what the weaver's agent sends inside the tunnel.

use std::net::{Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{KeyProof, Secret, WeaverId, WireGuardKey};

/// The TCP port of the agent's SSH server, on the weaver's tunnel address.
pub const SSH_PORT: u16 = 22;

/// The TCP port, on the weaver's tunnel address, where the agent reports the ports that the weaver listens on: a
/// [`PortReport`] as JSON on each line, the first at once, another at every change. Port 1 (tcpmux, RFC 1078) is
/// reserved, so no user program's port is hidden by it.
pub const PORTS_PORT: u16 = 1;

/// `POST /api/weavers/ID/tunnel`: admits a device to a weaver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenTunnel {
    /// The device's WireGuard public key. It belongs to the first user who proves to hold its private half.
    pub public_key: WireGuardKey,
    /// Needed until the server knows that the key is the user's; [`crate::ErrorCode::KeyNotProven`] asks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<KeyProof>,
    /// UDP addresses at which the device may be reachable.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub candidates: Vec<SocketAddr>,
}

/// What a device needs to set up its side of the WireGuard peering.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TunnelGrant {
    pub weaver_id: WeaverId,
    /// The agent's WireGuard public key. It changes when the agent restarts; then ask again.
    pub peer_key: WireGuardKey,
    /// The weaver's address inside the tunnel.
    #[schema(value_type = String)]
    pub peer_address: Ipv6Addr,
    /// UDP addresses at which the agent may be reachable.
    #[schema(value_type = Vec<String>)]
    pub candidates: Vec<SocketAddr>,
    /// The device's address inside the tunnel.
    #[schema(value_type = String)]
    pub device_address: Ipv6Addr,
    /// The WireGuard pre-shared key of this device and this weaver, base64 of 32 bytes.
    pub preshared_key: Secret,
    /// When the agent stops admitting the device: the weaver's deadline.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
    /// The SSH certificate authority that signs agents' host keys, as a public key line. The certificate's
    /// principal is the weaver's id.
    pub ssh_ca: String,
}

/// `GET /api/ssh-ca`: the certificate authority that signs all weavers' SSH host keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshAuthority {
    /// The public key line (`ssh-ed25519 AAAA…`).
    pub public_key: String,
}

/// What the agent sends on [`PORTS_PORT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// TCP ports that the weaver's processes listen on, ascending.
    pub ports: Vec<u16>,
}
