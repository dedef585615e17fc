//! `loom-server`: the API, key exchange, relay and provisioning of Loom weavers.
//!
//! The database ([`store`]) holds what should be, a backend ([`provision`]) holds what is, and [`reconcile`] closes the
//! difference, keyed by weaver and repeatable at every step. [`api`] writes intent and shows both; [`auth`] says who is
//! asking. Live connections are beside that and hold nothing that may not be lost: [`agents`] is the control link to
//! each weaver's agent, [`streams`] are the byte streams that agents dial back, [`attach`] bridges them to people's
//! terminals, and [`relay`] passes ciphertext between peers that hold a grant. [`secrets`] derives every key from one
//! file. [`app`] puts them together.

pub mod agents;
pub mod api;
pub mod app;
pub mod attach;
pub mod auth;
pub mod config;
mod durable;
pub mod events;
mod fault;
pub mod listener;
pub mod manage;
pub mod metrics;
pub mod problem;
pub mod provision;
pub mod reconcile;
pub mod relay;
pub mod secrets;
mod sign_in;
pub mod store;
pub mod streams;
pub mod tls;
