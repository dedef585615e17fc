//! The contract between `loom`, `loom-server` and `loom-agent`.
//!
//! Every type that crosses a process boundary of the control plane is defined here once: [`ids`] are the identifiers,
//! [`weaver`] and [`login`] the HTTP API's objects, [`error`] its error codes, [`tunnel`] what a client needs to reach a
//! weaver privately, [`possession`] how it proves that it holds a key, [`agent`] the control link between the server and
//! the agents, and [`attach`] the terminal protocol. The data plane's framing is in `loom-tunnel`.
//!
//! With the feature `client`, [`client`] is the HTTP and WebSocket client that the CLI and the agent share.
//!
//! Doc comments here also become the descriptions in the OpenAPI document.

// Most of this crate is fields and variants: one whose name says everything has no comment.
#![expect(missing_docs)]

pub mod agent;
pub mod attach;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "client")]
mod connection;
pub mod error;
pub mod ids;
pub mod key;
pub mod login;
pub mod possession;
pub mod secret;
pub mod tunnel;
pub mod weaver;

pub use error::{ApiError, ErrorBody, ErrorCode};
pub use ids::{OrgId, UserId, WeaverId};
pub use key::WireGuardKey;
pub use possession::{KeyChallenge, KeyProof};
pub use secret::Secret;

/// The version of the control link, the relay and attach protocols that this build speaks.
///
/// A server serves the previous version too, because pods outlive an upgrade by up to 48 hours.
pub const PROTOCOL_VERSION: u32 = 1;
