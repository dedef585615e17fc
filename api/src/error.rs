//! The API's errors: `{"error":{"code","message","hint"}}`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A stable name for one kind of error. Programs act on the code; people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request is malformed: a field, a query or the JSON itself.
    InvalidRequest,
    /// The lifetime is not above zero, or exceeds the maximum.
    InvalidLifetime,
    /// The image's name is not a valid image reference.
    InvalidImage,
    /// No token, or one that is unknown, expired or revoked.
    Unauthorized,
    /// The token is valid but has no right to do this.
    Forbidden,
    /// The server does not know the WireGuard key yet, and the request does not prove that its sender holds it: get a
    /// challenge from `GET /api/wireguard/challenge` and answer it.
    KeyNotProven,
    /// None of the caller's organisations has a weaver with this id or name.
    WeaverNotFound,
    /// The prefix or name matches several weavers.
    WeaverAmbiguous,
    /// Nothing at this address.
    NotFound,
    /// Another live weaver of the organisation has this name.
    NameTaken,
    /// The `Idempotency-Key` was used before with a different request.
    IdempotencyConflict,
    /// The weaver is not in a state that allows this; for example, it is not running yet.
    WeaverNotReady,
    /// The weaver was deleted, has expired, or its main program has exited.
    WeaverGone,
    /// The organisation or the user has reached its limit of live weavers.
    TooManyWeavers,
    /// The user has reached the limit of tokens.
    TooManyTokens,
    /// The user has reached the limit of devices, or the weaver or the user that of devices admitted to weavers.
    TooManyDevices,
    /// The user or the organisation has reached its limit of connections of this kind.
    TooManyConnections,
    /// Too many requests came from the client's address, or from a weaver's agent.
    TooManyRequests,
    /// The image does not exist, is not allowed, or this backend has no images.
    ImageUnavailable,
    /// Device login: not approved yet.
    AuthorizationPending,
    /// Device login: polling too often.
    SlowDown,
    /// Device login: the code has expired.
    ExpiredToken,
    /// Device login: the user denied it.
    AccessDenied,
    /// The request's body is too large.
    PayloadTooLarge,
    /// The backend that runs weavers failed.
    KubernetesError,
    /// The weaver's agent did not answer in time.
    AgentUnreachable,
    /// The server cannot do this now; try again later.
    Unavailable,
    /// A fault in the server; its log has the details.
    Internal,
    /// Sent by a newer server, and unknown to this build.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
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
            Self::TooManyWeavers
            | Self::TooManyTokens
            | Self::TooManyDevices
            | Self::TooManyConnections
            | Self::TooManyRequests => 429,
            Self::Internal | Self::Unknown => 500,
            Self::KubernetesError => 502,
            Self::Unavailable => 503,
            Self::AgentUnreachable => 504,
        }
    }
}

/// Why a request failed: the code is for programs, message and hint are for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub code: ErrorCode,
    /// What failed and why, in a sentence without a full stop.
    pub message: String,
    /// What to do next, if there is anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The body of every error response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ApiError,
}
