//! `loom-server`: the API, key exchange, relay and provisioning of Loom weavers.
//!
//! The database ([`store`]) holds what should be, a backend ([`provision`]) holds what is, and [`reconcile`] closes the
//! difference, keyed by weaver and repeatable at every step. [`weaver`] owns a weaver's life, and [`admission`] who may
//! reach one. Live connections are beside that and hold nothing that may not be lost: [`agents`] knows the control links
//! to the weavers' agents, [`streams`] the byte streams that agents dial back, and [`relay`] who is connected there.
//! [`secrets`] derives every key from one file.
//!
//! Requests come in by the [`listener`]. [`api`] has every route; its handlers share [`state`], and nothing below them
//! knows it. [`app`] puts all together.

// What may be used from outside is listed here; inside, `pub` means the whole crate.
#![expect(unreachable_pub, reason = "modules are private, and this file says what of them is public")]

mod admission;
mod agents;
mod allowance;
mod api;
mod app;
mod config;
mod device_limits;
mod durable;
mod events;
mod fault;
mod listener;
pub mod manage;
mod metrics;
mod names;
mod problem;
mod provision;
mod rate_limit;
mod reconcile;
mod relay;
mod resources;
mod revocation;
mod secrets;
mod sessions;
mod sign_in;
mod state;
mod store;
mod streams;
mod weaver;

pub use app::App;
pub use config::{Backend, Settings};
pub use provision::{kubernetes, local};
