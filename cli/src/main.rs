//! `loom`: the command line of Loom weavers.
//!
//! [`cli`] is the tree of commands and their help; `commands/` has a file for each. [`context`] has the settings and
//! makes the server's client, [`credentials`] stores the tokens. Commands print through [`output`] and fail with
//! [`error`], and [`terminal`] restores the user's terminal whatever happens. `daemon/` is the background process that
//! owns the tunnels, and `ssh/` the built-in SSH client that goes through it.

mod backoff;
mod cli;
mod commands;
mod completion;
mod context;
mod credentials;
mod daemon;
mod environment;
mod error;
mod event_stream;
mod lifetime;
mod output;
mod progress;
mod ssh;
mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use clap_complete::CompleteEnv;

use crate::{
    cli::Cli,
    context::Context,
    error::{CliError, Exit},
};

fn main() -> ExitCode {
    // Does nothing unless called by a shell's completion script.
    CompleteEnv::with_factory(Cli::command).complete();
    let cli = Cli::parse();
    terminal::install_panic_hook();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::error(&CliError::failure(format!("cannot start: {error}")));
            return Exit::FAILURE.into();
        }
    };
    let exit = runtime.block_on(run(cli)).unwrap_or_else(|error| {
        output::error(&error);
        error.exit()
    });
    // A thread may still be blocked reading the keyboard.
    runtime.shutdown_background();
    exit.into()
}

async fn run(cli: Cli) -> Result<Exit, CliError> {
    let remote = cli.command.returns_a_remote_code();
    let result = async {
        let context = Context::load(&cli.global)?;
        if !cli.command.takes_the_terminal() {
            return commands::run(&context, &cli.command).await; // signals have their default effect
        }
        tokio::select! {
            result = commands::run(&context, &cli.command) => result,
            // Dropping the command restores the terminal.
            exit = terminal::termination_signal() => Err(CliError::silent(exit)),
        }
    }
    .await;
    result.map_err(|error| match error.exit() {
        Exit::USAGE => error,
        Exit(129 | 130 | 141 | 143) => error,
        _ if remote => error.with_exit(Exit::CONNECTION),
        _ => error,
    })
}
