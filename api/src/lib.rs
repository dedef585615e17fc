//! The contract between `loom`, `loom-server` and `loom-agent`.
//!
//! Everything that crosses a process boundary of the control plane is defined here once, so that both ends are
//! compiled against the same words: [`ids`] name things, [`weaver`] and [`login`] are the HTTP API's objects, [`error`]
//! its error codes, [`tunnel`] what a client needs to reach a weaver privately, [`possession`] how a key is proved, [`agent`] the control link between the
//! server and the agents, and [`attach`] the terminal protocol. The data plane's own framing is in `loom-tunnel`.
//!
//! With the feature `client`, [`client`] is the one HTTP and WebSocket client that the CLI and the agent share.

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
