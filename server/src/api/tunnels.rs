//! Key exchange: which device may reach which weaver, and what both need to know for it.

use axum::{Json, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use loom_api::{
    ErrorCode, KeyChallenge, WireGuardKey,
    tunnel::{OpenTunnel, SshAuthority, TunnelGrant},
};

use super::{
    auth::UserCaller,
    body::Body,
    extract::Path,
    weavers::{find, find_live},
};
use crate::{
    problem::{Answer, Problem},
    state::AppState,
};

/// The most candidates of one device, or of an agent.
pub(crate) const MAX_CANDIDATES: usize = 16;

/// A challenge that proves who holds a WireGuard key, for devices and agents that are new here. It concerns no
/// particular key, and the server keeps nothing of it.
#[utoipa::path(get, path = "/api/wireguard/challenge", tag = "tunnels", responses((status = 200, body = KeyChallenge)))]
pub async fn challenge(State(app): State<AppState>) -> Json<KeyChallenge> {
    Json(app.secrets.challenge(Timestamp::now()))
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
    let weaver = find_live(&app, &caller, &reference).await?.id;
    if request.candidates.len() > MAX_CANDIDATES {
        return Err(Problem::new(ErrorCode::InvalidRequest, format!("more than {MAX_CANDIDATES} candidates")));
    }
    let UserCaller { user, token, .. } = caller;
    let admitted = app.admission.admit(&user, token.id, weaver, request).await?;
    Ok(Json(TunnelGrant {
        weaver_id: weaver,
        peer_key: admitted.agent.wireguard_key,
        peer_address: admitted.weaver.address,
        candidates: admitted.agent.candidates,
        device_address: admitted.device_address,
        preshared_key: admitted.preshared_key,
        expires_at: admitted.weaver.expires_at,
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
    app.admission.revoke(caller.user.id, weaver, key).await?;
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
    app.admission.revoke_device(caller.user.id, key).await?;
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
