//! `loom completion`: the script for a shell to complete `loom` commands, including weaver ids.

use clap::ValueEnum;
use clap_complete::env::{Bash, Elvish, EnvCompleter, Fish, Powershell, Zsh};

use crate::{
    error::{CliError, Exit, Result},
    output,
};

/// The environment variable in which the scripts name the shell; `CompleteEnv`'s default.
const VARIABLE: &str = "COMPLETE";

/// Prints the completion script of a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  source <(loom completion bash)                                          in ~/.bashrc
  source <(loom completion zsh)                                           in ~/.zshrc
  loom completion fish > ~/.config/fish/completions/loom.fish             once

Weaver ids and names are completed too, by asking the server.")]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Elvish,
    Fish,
    Powershell,
    Zsh,
}

pub(crate) fn run(args: &Args) -> Result<Exit> {
    output::bytes(&script(args.shell)?)?;
    Ok(Exit::OK)
}

fn script(shell: Shell) -> Result<Vec<u8>> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Elvish => &Elvish,
        Shell::Fish => &Fish,
        Shell::Powershell => &Powershell,
        Shell::Zsh => &Zsh,
    };
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, "loom", "loom", "loom", &mut script)
        .map_err(|error| CliError::failure(format!("cannot write the script: {error}")))?;
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_has_a_script_that_asks_this_program() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(script(*shell).expect("a script")).expect("text");
            assert!(script.contains(VARIABLE) && script.contains("loom"), "{shell:?}: {script}");
        }
    }
}
