//! `loom exec`.

use clap_complete::ArgValueCandidates;
use loom_api::tunnel::SSH_PORT;

use crate::{
    completion,
    context::Context,
    daemon::client,
    environment::{self, EnvArg},
    error::{Exit, Result},
    ssh::{self, Remote, quote},
};

/// Run a program in a weaver; its output and exit code are yours
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom exec ID -- cargo test               standard output and error stay apart, the exit code passes through
  tar c src | loom exec ID -- tar x        standard input, to its end
  loom exec ID --workdir /tmp -e A=1 -- env")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    pub(crate) weaver: String,
    /// Run it on a terminal
    #[arg(short = 't', long)]
    pub(crate) tty: bool,
    /// Set an environment variable; NAME alone takes its value from the local environment
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<EnvArg>,
    /// The directory to run it in
    #[arg(long, value_name = "DIR")]
    workdir: Option<String>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    // Not on the command line in the weaver, where every process could see the values.
    let env = environment::collect(&args.env)?.into_iter().map(|(name, value)| (name, value.expose().to_owned()));
    let env = env.collect();
    let command = Some(command_line(args));
    let connected = client::connect(context, &args.weaver, SSH_PORT).await?;
    Box::pin(ssh::run(context, connected, Remote { command, terminal: args.tty, env })).await
}

/// The command line for the weaver's shell: `cd -- DIR && exec PROGRAM ARGUMENTS`.
fn command_line(args: &Args) -> String {
    let program = format!("exec {}", quote(&args.command));
    match &args.workdir {
        Some(directory) => format!("cd -- {} && {program}", quote(std::slice::from_ref(directory))),
        None => program,
    }
}
