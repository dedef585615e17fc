//! Figures for Prometheus at an address of their own: they are not for everybody who can reach the API.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};

use super::status;
use crate::{metrics::MEDIA_TYPE, state::AppState};

/// Figures, and the probes: at an address that strangers do not reach they are answered whatever happens at the other.
pub fn router(app: AppState) -> Router {
    Router::new()
        .route("/metrics", get(show))
        .route("/livez", get(status::live))
        .route("/readyz", get(status::ready))
        .with_state(app)
}

async fn show(State(app): State<AppState>) -> Response {
    match write(&app).await {
        Ok(text) => ([(header::CONTENT_TYPE, MEDIA_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!("the metrics could not be gathered: {error:#}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn write(app: &AppState) -> anyhow::Result<String> {
    Ok(app.metrics.text(app.store.count_by_status().await?, app.agents.count())?)
}
