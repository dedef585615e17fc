//! What the API answers when it does not do what was asked: `{"error":{"code","message","hint"}}`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A stable name for one kind of failure. Clients decide by it; people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request is malformed: a field, a query or the JSON itself.
    InvalidRequest,
    /// The lifetime is not above zero or goes past the most that is allowed.
    InvalidLifetime,
    /// The image's name cannot be read as one.
    InvalidImage,
    /// No token, or one that is unknown, expired or revoked.
    Unauthorized,
    /// The token is good, and may not do this.
    Forbidden,
    /// The WireGuard key is new to the server, and the request does not prove that its sender holds it: answer a
    /// challenge (`GET /api/wireguard/challenge`).
    KeyNotProven,
    /// No weaver of that id or name in the caller's organisations.
    WeaverNotFound,
    /// The prefix or name fits several weavers.
    WeaverAmbiguous,
    /// Nothing at this address.
    NotFound,
    /// The name is taken by another weaver.
    NameTaken,
    /// An `Idempotency-Key` was used before with another request.
    IdempotencyConflict,
    /// The weaver is not in a state that allows this (not running yet, for one).
    WeaverNotReady,
    /// The weaver has ended: deleted, expired or its main program exited.
    WeaverGone,
    /// The organisation has as many weavers as it may.
    TooManyWeavers,
    /// The user has as many tokens as it may.
    TooManyTokens,
    /// The user or the organisation has as many connections of this kind as it may.
    TooManyConnections,
    /// Too many requests came from the client's address.
    TooManyRequests,
    /// The image cannot be had: it does not exist, is not allowed, or this backend has no images.
    ImageUnavailable,
    /// Device login: not approved yet.
    AuthorizationPending,
    /// Device login: polling too often.
    SlowDown,
    /// Device login: the code has expired.
    ExpiredToken,
    /// Device login: the user said no.
    AccessDenied,
    /// The request's body is larger than accepted.
    PayloadTooLarge,
    /// The backend that runs weavers failed.
    KubernetesError,
    /// The weaver's agent did not answer in time.
    AgentUnreachable,
    /// The server cannot do this now, but may later.
    Unavailable,
    /// A fault of the server's own.
    Internal,
    /// A code this build does not know: a newer server's.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::InvalidRequest
            | Self::InvalidLifetime
            | Self::InvalidImage
            | Self::AuthorizationPending
            | Self::SlowDown
            | Self::ExpiredToken
            | Self::AccessDenied => 400,
            Self::Unauthorized => 401,
            Self::Forbidden | Self::KeyNotProven => 403,
            Self::WeaverNotFound | Self::NotFound => 404,
            Self::WeaverAmbiguous | Self::NameTaken | Self::IdempotencyConflict | Self::WeaverNotReady => 409,
            Self::WeaverGone => 410,
            Self::PayloadTooLarge => 413,
            Self::ImageUnavailable => 422,
            Self::TooManyWeavers | Self::TooManyTokens | Self::TooManyConnections | Self::TooManyRequests => 429,
            Self::Internal | Self::Unknown => 500,
            Self::KubernetesError => 502,
            Self::Unavailable => 503,
            Self::AgentUnreachable => 504,
        }
    }
}

/// One failure: what the code says to programs, and what message and hint say to people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The stable code.
    pub code: ErrorCode,
    /// What failed and why, in a sentence without a full stop.
    pub message: String,
    /// What to do next, where there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// An error without a hint.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The failure.
    pub error: ApiError,
}
