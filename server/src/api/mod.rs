//! The HTTP API: every route with its handler, and the OpenAPI document that is made from the same table.
//!
//! Handlers are where their subject is: [`weavers`], [`events`], [`logs`], [`attach`] and [`tunnels`] for users,
//! [`agents`] and [`streams`] for agents, [`relay`] for both, [`login`] and [`device`] for those who are not in yet,
//! [`metrics`] and [`status`] for operators.
//! [`auth`] says who is asking, and [`completion`] lets changes run to their end.

pub mod agents;
pub mod attach;
pub mod auth;
mod body;
pub mod completion;
pub mod device;
pub mod events;
mod extract;
pub mod login;
pub mod logs;
pub mod metrics;
pub mod relay;
mod repository;
mod status;
pub mod streams;
pub mod tunnels;
pub mod weavers;
pub mod websocket;

use axum::{
    Json, Router,
    body::Bytes,
    extract::DefaultBodyLimit,
    http::{Method, StatusCode, Uri},
    middleware::from_fn_with_state,
    response::{IntoResponse as _, Response},
};
use loom_api::{ApiError, ErrorBody, ErrorCode};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{problem::Problem, state::AppState};

/// The largest request body, in bytes.
const MAX_BODY: usize = 1 << 20;
/// The same where nobody has to log in: all that is read there are names and codes.
const MAX_OPEN_BODY: usize = 4 << 10;
/// The same for agents that register: a Kubernetes token is 1 to 2 KiB, more with long names and group claims.
const MAX_REGISTER_BODY: usize = 16 << 10;

#[derive(OpenApi)]
#[openapi(
    info(title = "Loom weavers", description = "Ephemeral places to work, each a pod with a private tunnel to it."),
    modifiers(&Bearer)
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        document.components.get_or_insert_default().add_security_scheme("bearer", scheme);
    }
}

/// Every route of the server.
pub fn router(app: AppState) -> Router {
    let (router, document) = routes_and_document();
    // Shared by all answers: everybody may ask for it, and take it as slowly as they like.
    let document = Bytes::from(document.to_json().unwrap_or_default());
    router
        .route("/api/openapi.json", axum::routing::get(async || ([("content-type", "application/json")], document)))
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(app.changes.clone(), completion::complete))
        .with_state(app)
}

fn routes_and_document() -> (Router<AppState>, utoipa::openapi::OpenApi) {
    // A layer is for the routes before it, and the one nearest to a route decides.
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(agents::register))
        .layer(DefaultBodyLimit::max(MAX_REGISTER_BODY))
        .routes(routes!(status::version))
        .routes(routes!(status::live))
        .routes(routes!(status::ready))
        .routes(routes!(device::start))
        .routes(routes!(device::poll))
        .routes(routes!(device::page, device::submit))
        .routes(routes!(tunnels::challenge))
        .layer(DefaultBodyLimit::max(MAX_OPEN_BODY))
        .routes(routes!(login::log_out))
        .routes(routes!(login::me))
        .routes(routes!(login::list_tokens, login::create_token))
        .routes(routes!(login::delete_token))
        .routes(routes!(weavers::create, weavers::list))
        .routes(routes!(weavers::get, weavers::delete))
        .routes(routes!(weavers::extend))
        .routes(routes!(events::events))
        .routes(routes!(logs::logs))
        .routes(routes!(attach::attach))
        .routes(routes!(tunnels::open))
        .routes(routes!(tunnels::close))
        .routes(routes!(tunnels::remove_device))
        .routes(routes!(tunnels::ssh_authority))
        .routes(routes!(relay::relay))
        .routes(routes!(agents::control))
        .routes(routes!(streams::dial_back))
        .split_for_parts()
}

async fn nothing_here(uri: Uri) -> Problem {
    Problem::new(ErrorCode::NotFound, format!("there is nothing at {}", uri.path()))
        .hint("the API is described at /api/openapi.json")
}

async fn other_method(method: Method, uri: Uri) -> Response {
    let message = format!("{method} is not possible at {}", uri.path());
    let error = ApiError::new(ErrorCode::InvalidRequest, message).hint("the API is described at /api/openapi.json");
    (StatusCode::METHOD_NOT_ALLOWED, Json(ErrorBody { error })).into_response()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Routes that are open to everybody: to log in, to see whether the server is there, and for agents to prove
    /// themselves.
    const OPEN: [&str; 8] = [
        "/api/version",
        "/livez",
        "/readyz",
        "/api/login/device",
        "/api/login/token",
        "/login/device",
        "/api/agent/register",
        "/api/wireguard/challenge",
    ];

    #[test]
    fn every_route_but_the_open_ones_is_described_as_authenticated() {
        let (_, document) = routes_and_document();
        assert!(document.paths.paths.len() > 15);
        for (path, item) in &document.paths.paths {
            let operations = [&item.get, &item.post, &item.delete, &item.put, &item.patch];
            for operation in operations.into_iter().flatten() {
                assert_eq!(operation.security.is_none(), OPEN.contains(&path.as_str()), "{path}");
            }
        }
    }
}
