//! The agent's command line.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// The agent that runs inside every weaver.
#[derive(Parser)]
#[command(name = "loom-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Connects the weaver to the server and its users; has the credentials.
    Sidecar,
    /// Runs the user's processes, as PID 1 of their container.
    Host,
    /// Copies this binary to DIR/loom-agent, atomically.
    Install {
        /// An existing directory.
        dir: PathBuf,
    },
    /// Serves SFTP on standard input and output.
    SftpServer,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Sidecar => loom_agent::run_sidecar().map(|()| ExitCode::SUCCESS),
        Command::Host => loom_agent::run_host(),
        Command::Install { dir } => loom_agent::install(&dir).map(|()| ExitCode::SUCCESS),
        Command::SftpServer => loom_agent::run_sftp_server().map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("loom-agent: {error:#}");
        ExitCode::FAILURE
    })
}
