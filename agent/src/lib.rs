//! `loom-agent`, the one binary in every weaver, in two processes.
//!
//! The **sidecar** has all credentials and does all networking: control link, WireGuard peer, SSH server. The **host**
//! is PID 1 of the user's container: it starts and reaps all processes there, and owns the terminals. The two speak
//! [`protocol`] over a unix socket. So shells run in the user's cgroup and network, a crashing sidecar kills no session,
//! and no credential enters the user's container.
//!
//! There are two more commands: `install`, which copies the binary to where the user's container finds it, and
//! `sftp-server`, which the host runs as the user for file transfers.

// A library only so that its own tests can drive the host: a name that says everything needs no comment.
#![allow(missing_docs)]

pub mod protocol;

mod host;
mod install;
mod passing;
mod sftp;
mod sidecar;

use std::process::ExitCode;

pub use self::install::install;

/// Runs the sidecar until it is told to stop. Fails when its settings are invalid.
pub fn run_sidecar() -> anyhow::Result<()> {
    sidecar::run()
}

/// Runs the process host until the main program has ended, and returns its exit code. Fails when it cannot create its
/// socket.
pub fn run_host() -> anyhow::Result<ExitCode> {
    host::run()
}

/// Serves SFTP on standard input and output until the input ends.
pub fn run_sftp_server() -> anyhow::Result<()> {
    Ok(sftp::serve(std::io::stdin().lock(), std::io::stdout().lock())?)
}
