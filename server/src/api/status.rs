//! What the server is, and whether it can serve.

use axum::{Json, extract::State, http::StatusCode};
use loom_api::{PROTOCOL_VERSION, weaver::VersionInfo};

use crate::state::AppState;

/// The server's version and what it runs weavers on.
#[utoipa::path(get, path = "/api/version", tag = "server", responses((status = 200, body = VersionInfo)))]
pub async fn version(State(app): State<AppState>) -> Json<VersionInfo> {
    Json(VersionInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL_VERSION,
        backend: app.provisioner.name().to_owned(),
    })
}

/// Whether the process lives.
#[utoipa::path(get, path = "/livez", tag = "server", responses((status = 200, body = String)))]
pub async fn live() -> &'static str {
    "ok"
}

/// Whether it can serve.
#[utoipa::path(get, path = "/readyz", tag = "server", responses((status = 200, body = String), (status = 503, body = String)))]
pub async fn ready(State(app): State<AppState>) -> (StatusCode, &'static str) {
    if app.stopping.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping");
    }
    if app.store.is_low_on_space() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the disk is full");
    }
    match app.store.ping().await {
        Ok(()) => (StatusCode::OK, "ok"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the database does not answer"),
    }
}
