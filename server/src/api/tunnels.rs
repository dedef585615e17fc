//! Key exchange: which device may reach which weaver, and what both need to know for it.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use loom_api::{
    ErrorCode, WireGuardKey,
    agent::ServerMessage,
    tunnel::{OpenTunnel, SshAuthority, TunnelGrant},
};

use super::{
    Body,
    weavers::{find, find_live},
};
use crate::{
    agents::complete,
    app::AppState,
    auth::UserCaller,
    problem::{Answer, Problem},
    store::{DeviceError, LiveGrant},
};

/// The most candidates of one device.
const MOST_CANDIDATES: usize = 16;

impl From<DeviceError> for Problem {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::SomebodyElses => Self::new(ErrorCode::Forbidden, error.to_string()),
            DeviceError::Database(error) => error.into(),
        }
    }
}

/// Admits a device to a weaver. The same again renews it.
#[utoipa::path(post, path = "/api/weavers/{id}/tunnel", tag = "tunnels", params(("id" = String, Path)), request_body = OpenTunnel,
    responses((status = 200, body = TunnelGrant), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn open(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(reference): Path<String>,
    Body(request): Body<OpenTunnel>,
) -> Answer<Json<TunnelGrant>> {
    let row = find_live(&app, &caller, &reference).await?;
    let Some(agent_key) = row.wireguard_key else {
        return Err(Problem::new(ErrorCode::WeaverNotReady, "the weaver's agent has not connected yet")
            .hint("loom events ID -f shows how far it is"));
    };
    if request.candidates.len() > MOST_CANDIDATES {
        return Err(Problem::new(ErrorCode::InvalidRequest, format!("more than {MOST_CANDIDATES} candidates")));
    }
    if request.public_key == agent_key {
        return Err(Problem::new(ErrorCode::InvalidRequest, "this is the weaver's own key"));
    }
    let device_address = app.store.device(caller.user.id, request.public_key).await?;
    app.store.put_grant(row.id, request.public_key, &request.candidates, row.expires_at).await?;
    app.relay.load(&app.store).await?;
    let live = LiveGrant {
        weaver: row.id,
        device: request.public_key,
        address: device_address,
        candidates: request.candidates,
        expires_at: row.expires_at,
        user: caller.user.name,
    };
    if let Some(grant) = complete(&app, &row, live) {
        app.agents.grant(row.id, grant).await?;
    }
    Ok(Json(TunnelGrant {
        weaver_id: row.id,
        peer_key: agent_key,
        peer_address: row.address,
        candidates: row.candidates,
        device_address,
        preshared_key: app.secrets.preshared_key(&agent_key, &request.public_key),
        expires_at: row.expires_at,
        ssh_ca: app.secrets.ssh_authority()?,
    }))
}

/// Takes a device's admission to a weaver back.
#[utoipa::path(delete, path = "/api/weavers/{id}/tunnel/{key}", tag = "tunnels",
    params(("id" = String, Path), ("key" = String, Path, description = "URL-safe base64 without padding")),
    responses((status = 204), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn close(
    State(app): State<AppState>,
    caller: UserCaller,
    Path((reference, key)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let key = read_key(&key)?;
    let weaver = find(&app, &caller, &reference).await?.id;
    if app.store.remove_grant(caller.user.id, weaver, key).await? {
        app.relay.load(&app.store).await?;
        app.agents.send(weaver, ServerMessage::Revoke { public_key: key });
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Forgets one of the caller's devices; it can reach no weaver any more.
#[utoipa::path(delete, path = "/api/devices/{key}", tag = "tunnels",
    params(("key" = String, Path, description = "URL-safe base64 without padding")),
    responses((status = 204), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn remove_device(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(key): Path<String>,
) -> Answer<StatusCode> {
    let key = read_key(&key)?;
    for weaver in app.store.remove_device(caller.user.id, key).await? {
        app.agents.send(weaver, ServerMessage::Revoke { public_key: key });
    }
    app.relay.load(&app.store).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The SSH authority that signs all weavers' host keys.
#[utoipa::path(get, path = "/api/ssh-ca", tag = "tunnels", responses((status = 200, body = SshAuthority)), security(("bearer" = [])))]
pub async fn ssh_authority(State(app): State<AppState>, _caller: UserCaller) -> Answer<Json<SshAuthority>> {
    Ok(Json(SshAuthority { public_key: app.secrets.ssh_authority()? }))
}

fn read_key(text: &str) -> Answer<WireGuardKey> {
    let bytes: Option<[u8; 32]> = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    bytes
        .map(WireGuardKey)
        .ok_or_else(|| Problem::new(ErrorCode::InvalidRequest, "this is not a WireGuard key in URL-safe base64"))
}
