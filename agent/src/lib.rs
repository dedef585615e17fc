//! `loom-agent`, the one binary in every weaver, in two processes.
//!
//! The **sidecar** holds every credential and all networking: control link, WireGuard peer, SSH server. The **host** is
//! PID 1 of the user's container: it starts and reaps everything there, and owns the terminals. They meet on a unix
//! socket and speak [`protocol`]; so shells live in the user's cgroup and network, a sidecar that crashes kills no
//! session, and no credential enters the user's container.
//!
//! Beside the two there is `install`, which puts the binary where the user's container finds it, and `sftp-server`,
//! which the host runs as the user when somebody copies files.

// A library only so that its own tests can drive the host.
#![allow(missing_docs)]

pub mod protocol;

mod host;
mod install;
mod passing;
mod sftp;
mod sidecar;

use std::process::ExitCode;

pub use self::install::install;

/// Runs the sidecar until it is told to stop.
///
/// # Errors
///
/// What it cannot go on without: its settings.
pub fn run_sidecar() -> anyhow::Result<()> {
    sidecar::run()
}

/// Runs the process host until the main program has ended, and returns its exit code.
///
/// # Errors
///
/// What it cannot go on without: its settings, its socket.
pub fn run_host() -> anyhow::Result<ExitCode> {
    host::run()
}

/// Serves SFTP on standard input and output until the input ends.
///
/// # Errors
///
/// Those of standard input and output.
pub fn run_sftp_server() -> anyhow::Result<()> {
    Ok(sftp::serve(std::io::stdin().lock(), std::io::stdout().lock())?)
}
