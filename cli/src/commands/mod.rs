//! One file for each command: its arguments, and `run`.

pub(crate) mod attach;
pub(crate) mod completion;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod extend;
pub(crate) mod login;
pub(crate) mod logout;
pub(crate) mod logs;
pub(crate) mod new;
pub(crate) mod ps;
pub(crate) mod ssh;
pub(crate) mod ssh_config;
pub(crate) mod token;
pub(crate) mod tunnel;
pub(crate) mod version;
pub(crate) mod whoami;

use crate::{
    cli::{Command, Verb},
    context::Context,
    error::{CliError, Exit},
};

/// The API's path for a weaver that the user named by id, prefix of the id, or name.
///
/// # Errors
///
/// When it can be none of these, and could change the meaning of the path.
pub(crate) fn weaver_path(id: &str) -> Result<String, CliError> {
    let fits = !id.is_empty() && id.len() <= 100 && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if fits {
        return Ok(format!("/api/weavers/{id}"));
    }
    Err(CliError::new(
        Exit::NO_SUCH_WEAVER,
        format!("there is no weaver {id:?}: ids and names have letters, digits and dashes"),
    )
    .hint("list your weavers with: loom ps"))
}

pub(crate) async fn run(context: &Context, command: &Command) -> Result<Exit, CliError> {
    // Boxed: the largest command's future is much larger than the others'.
    match command {
        Command::Verb(verb) | Command::Weaver { verb } => Box::pin(run_verb(context, verb)).await,
        Command::Login(args) => Box::pin(login::run(context, args)).await,
        Command::Logout(args) => Box::pin(logout::run(context, args)).await,
        Command::Whoami(args) => Box::pin(whoami::run(context, args)).await,
        Command::Token(args) => Box::pin(token::run(context, args)).await,
        Command::SshConfig(args) => Box::pin(ssh_config::run(context, args)).await,
        Command::Completion(args) => completion::run(args),
        Command::Version(args) => Box::pin(version::run(context, args)).await,
        Command::Daemon(args) => Box::pin(tunnel::run_daemon(context, args)).await,
    }
}

async fn run_verb(context: &Context, verb: &Verb) -> Result<Exit, CliError> {
    match verb {
        Verb::New(args) => Box::pin(new::run(context, args)).await,
        Verb::Ps(args) => Box::pin(ps::run(context, args)).await,
        Verb::Attach(args) => Box::pin(attach::run(context, args)).await,
        Verb::Ssh(args) => Box::pin(ssh::run(context, args)).await,
        Verb::Exec(args) => Box::pin(exec::run(context, args)).await,
        Verb::Tunnel(args) => Box::pin(tunnel::run(context, args)).await,
        Verb::Logs(args) => Box::pin(logs::run(context, args)).await,
        Verb::Events(args) => Box::pin(events::run(context, args)).await,
        Verb::Extend(args) => Box::pin(extend::run(context, args)).await,
        Verb::Delete(args) => Box::pin(delete::run(context, args)).await,
    }
}
