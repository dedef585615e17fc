//! Errors of handlers, as the API shows them.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use loom_api::{ApiError, ErrorBody, ErrorCode};

use crate::{
    admission::AdmissionError,
    agents::AgentError,
    sessions::TooMany,
    store::{KeyError, TokenError},
    streams::StreamError,
    weaver::Weaver,
};

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

    /// That a weaver has ended, and why.
    pub fn gone(weaver: &Weaver) -> Self {
        let reason = weaver.life.reason().unwrap_or("it has ended");
        Self::new(ErrorCode::WeaverGone, format!("{} is gone: {reason}", weaver.id)).hint("make another: loom new")
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl From<AgentError> for Problem {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::NotConnected => Self::new(ErrorCode::WeaverNotReady, error.to_string())
                .hint("it comes back by itself; `loom events` shows what happens"),
            AgentError::NoAnswer => Self::new(ErrorCode::AgentUnreachable, error.to_string()).hint("try again"),
        }
    }
}

impl From<StreamError> for Problem {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Agent(error) => error.into(),
            StreamError::Refused(reason) => Self::new(ErrorCode::WeaverNotReady, reason),
            StreamError::TooMany => Self::new(ErrorCode::Unavailable, error.to_string()).hint("try again"),
        }
    }
}

impl From<TooMany> for Problem {
    fn from(error: TooMany) -> Self {
        Self::new(ErrorCode::TooManyConnections, error.to_string()).hint("close one of them")
    }
}

impl From<KeyError> for Problem {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Taken => Self::new(ErrorCode::Forbidden, error.to_string()),
            KeyError::Unproven => Self::new(ErrorCode::KeyNotProven, error.to_string())
                .hint("answer the challenge of GET /api/wireguard/challenge"),
            KeyError::NotEntitled => Self::new(ErrorCode::Unauthorized, error.to_string()).hint("log in: loom login"),
            KeyError::TooManyDevices | KeyError::TooManyGrants => {
                Self::new(ErrorCode::TooManyDevices, error.to_string()).hint("those that are not used are forgotten")
            }
            KeyError::NotReachable(Some(weaver)) if weaver.has_ended() => Self::gone(&weaver),
            KeyError::NotReachable(_) => {
                Self::new(ErrorCode::WeaverNotReady, "the weaver's agent has not connected yet")
                    .hint("loom events ID -f shows how far it is")
            }
            KeyError::Database(error) => error.into(),
        }
    }
}

impl From<TokenError> for Problem {
    fn from(error: TokenError) -> Self {
        let message = error.to_string();
        match error {
            TokenError::TooMany => {
                Self::new(ErrorCode::TooManyTokens, message).hint("revoke one that nobody uses any more")
            }
            TokenError::Gone => Self::new(ErrorCode::Unauthorized, message).hint("log in: loom login"),
            TokenError::Database(error) => error.into(),
        }
    }
}

impl From<AdmissionError> for Problem {
    fn from(error: AdmissionError) -> Self {
        match error {
            AdmissionError::Key(error) => error.into(),
            AdmissionError::Agent(error) => error.into(),
            AdmissionError::Database(error) => error.into(),
        }
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
