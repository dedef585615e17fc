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
    /// What the client polls with.
    pub device_code: Secret,
    /// What the user types.
    pub user_code: String,
    /// Where the user types it.
    pub verification_uri: String,
    /// The same with the code filled in.
    pub verification_uri_complete: String,
    /// Seconds until the codes end.
    pub expires_in: u64,
    /// Seconds to wait between two polls.
    pub interval: u64,
}

/// `POST /api/login/token`: asks whether the login was approved (RFC 8628 §3.4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PollDeviceLogin {
    /// From [`DeviceLogin::device_code`].
    pub device_code: Secret,
}

/// A new token. The server keeps only its hash: it is shown this once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// The bearer token.
    pub token: Secret,
    /// What it is called in lists.
    pub name: String,
    /// When it ends, if it does.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `POST /api/tokens`: makes a token for a program, such as CI.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// What it is called in lists.
    pub name: String,
    /// Hours until it ends; never, when left out. A token made with one that has an end does not outlive that.
    #[serde(default)]
    pub ttl_hours: Option<f64>,
    /// Whether it is a person's login: that lives as long as the server lets logins live, and using it renews it.
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
    /// A program's; it lives as long as it was made for.
    Api,
    /// A kind this build does not know: a newer server's.
    #[serde(other)]
    Unknown,
}

/// A token in a list: everything but the token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenInfo {
    /// Its number, for deleting it.
    pub id: i64,
    /// What it is called.
    pub name: String,
    /// What it is for.
    pub kind: TokenKind,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was last used, to the minute, if it was.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// When it ends, if it does.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// `GET /api/me`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Me {
    /// The caller.
    pub user: User,
    /// The caller's organisations, the personal one first.
    pub organisations: Vec<Organisation>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// Its name, unique on the server.
    pub name: String,
}

/// An organisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Organisation {
    /// Its id.
    pub id: OrgId,
    /// Its name, unique on the server.
    pub name: String,
    /// Whether it is the caller's own.
    pub personal: bool,
}
