//! The harness of the end-to-end tests, the benchmarks and the demo.
//!
//! A [`System`] is a complete Loom on this machine: a real `loom-server` on its own port, and the real `loom` with its own
//! configuration, state and runtime directories, so that several can run side by side and none touches the developer's.
//! [`terminal::Terminal`] runs a program on a pseudo-terminal and reads its screen as a person would. [`processes`] looks
//! in `/proc` for what a system started and what it left behind.
//!
//! Everything is driven through the real binaries; nothing here links the product's code.

// A library only for the tests, the benchmark and `xtask`: a name that says everything needs no comment.
#![allow(missing_docs)]

pub mod agent;
pub mod api;
pub mod cluster;
pub mod disk;
pub mod fairness;
pub mod git;
pub mod keys;
pub mod namespace;
pub mod postgres;
pub mod processes;
pub mod service;
pub mod sidecar;
pub mod strangers;
pub mod system;
pub mod terminal;
pub mod tools;
pub mod wait;
pub mod wireguard_go;

pub use cluster::pki::Authority;
pub use system::{System, Weaver};
pub use wait::eventually;
