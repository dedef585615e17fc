//! Errors of handlers, as the API shows them.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use loom_api::{ApiError, ErrorBody, ErrorCode};

/// Why a request was not served: an [`ApiError`] for the caller. Faults of the server's own are logged where they turn
/// into one, and shown without their insides.
#[derive(Debug)]
pub struct Problem(pub ApiError);

/// What handlers return.
pub type Answer<T> = Result<T, Problem>;

impl Problem {
    /// A problem without a hint.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ApiError::new(code, message))
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self(self.0.hint(hint))
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        anyhow::Error::from(error).context("database").into()
    }
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        tracing::error!("{error:#}");
        Self::new(ErrorCode::Internal, "the server failed; its log says why")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(ErrorBody { error: self.0 })).into_response()
    }
}
