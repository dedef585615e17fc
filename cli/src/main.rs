//! `loom`: the command line of Loom weavers.
//!
//! [`cli`] is the tree of commands and what their help says; `commands/` holds one file for each. [`context`] has the
//! settings and makes the client of the server, [`credentials`] keeps the tokens. What commands print goes through
//! [`output`], how they fail is [`error`], and [`terminal`] puts the user's terminal back whatever happens. `daemon/`
//! is the background process that owns the tunnel, and `ssh/` the built-in SSH client that goes through it.

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
    // Does nothing unless a shell's completion script asks.
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
    // A thread may wait for a key that nobody will press.
    runtime.shutdown_background();
    exit.into()
}

async fn run(cli: Cli) -> Result<Exit, CliError> {
    let remote = cli.command.returns_a_remote_code();
    let result = async {
        let context = Context::load(&cli.global)?;
        if !cli.command.takes_the_terminal() {
            return commands::run(&context, &cli.command).await; // signals end it as they do by default
        }
        tokio::select! {
            result = commands::run(&context, &cli.command) => result,
            // Dropping the command puts the terminal back.
            exit = terminal::ended_from_outside() => Err(CliError::silent(exit)),
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
