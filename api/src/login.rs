//! Login: the device authorization grant (RFC 8628), the caller's identity, and tokens for programs.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{OrgId, Secret, UserId};

/// `POST /api/login/device`: starts a device login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartDeviceLogin {
    /// Where the login comes from, shown to the user who approves it: `user@host`.
    pub client_name: String,
}

/// The answer to [`StartDeviceLogin`] (RFC 8628 §3.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceLogin {
    /// For `POST /api/login/token`.
    pub device_code: Secret,
    /// The code that the user types at `verification_uri`.
    pub user_code: String,
    pub verification_uri: String,
    /// The same with the code filled in.
    pub verification_uri_complete: String,
    /// Seconds until both codes expire.
    pub expires_in: u64,
    /// Seconds to wait between polls.
    pub interval: u64,
}

/// `POST /api/login/token`: asks whether the login was approved (RFC 8628 §3.4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PollDeviceLogin {
    /// From [`DeviceLogin::device_code`].
    pub device_code: Secret,
}

/// A new token. It is shown only once: the server keeps its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    pub token: Secret,
    pub name: String,
    /// Absent when the token does not expire.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `POST /api/tokens`: creates a token for a program, such as CI.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// The token's name in lists.
    pub name: String,
    /// Hours until it expires; by default never. A token never outlives the one it was created with.
    #[serde(default)]
    pub ttl_hours: Option<f64>,
    /// Makes it a person's login: it expires after the server's login lifetime, and using it renews it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub login: bool,
}

/// What a user's token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenKind {
    /// Signs in once, and does nothing else.
    SignIn,
    /// A person's login on one machine; using it renews it.
    Login,
    /// For a program; it expires when its creator said, or never.
    Api,
    /// Sent by a newer server, and unknown to this build.
    #[serde(other)]
    Unknown,
}

/// A token in a list, without the secret itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    pub id: i64,
    pub name: String,
    pub kind: TokenKind,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// To the minute; absent when it was never used.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// Absent when the token does not expire.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `GET /api/me`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    pub user: User,
    /// The caller's organisations, the personal one first.
    pub organisations: Vec<Organisation>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    pub id: UserId,
    /// Unique on the server.
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Organisation {
    pub id: OrgId,
    /// Unique on the server.
    pub name: String,
    /// Whether it is the caller's personal organisation.
    pub personal: bool,
}
