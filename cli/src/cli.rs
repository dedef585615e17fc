//! The tree of commands and their help.

use clap::{Args, Parser, Subcommand, builder::styling};

use crate::commands::{
    attach, completion, delete, events, exec, extend, login, logout, logs, new, ps, ssh, ssh_config, token, tunnel,
    version, whoami,
};

const STYLES: styling::Styles = styling::Styles::styled()
    .header(styling::AnsiColor::Green.on_default().bold())
    .usage(styling::AnsiColor::Green.on_default().bold())
    .literal(styling::AnsiColor::Cyan.on_default().bold())
    .placeholder(styling::AnsiColor::Cyan.on_default());

/// Short-lived, isolated workspaces: created in seconds, reached privately, gone when their time is up.
#[derive(Debug, Parser)]
#[command(
    name = "loom",
    version,
    styles = STYLES,
    max_term_width = 100,
    after_help = "\
Examples:
  loom login --server-url https://loom.example    log in, once
  loom new --repo https://github.com/me/project   create a weaver and attach to it
  loom ps                                         list your weavers
  loom attach 0193f                               come back; a name or a prefix of the id will do
  loom tunnel up 0193f                            reach its ports from here
  loom ssh 0193f -- make test                     run a command in it

Settings come from flags, then LOOM_* in the environment, then config.toml in
$XDG_CONFIG_HOME/loom (~/.config/loom), which knows: server_url, image, org, ttl, detach_keys.

Exit codes: 0 ok, 1 failure, 2 usage, 4 not logged in, 5 no such weaver, 6 gone or expired,
7 timed out, 8 over a limit; ssh and exec return the remote program's code, or 255."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct GlobalArgs {
    /// The Loom server, such as https://loom.example [env: LOOM_SERVER_URL]
    #[arg(long, global = true, value_name = "URL", help_heading = "Global options")]
    pub(crate) server_url: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Verb(Verb),
    /// The full form of every weaver verb: `loom weaver new` is `loom new`
    Weaver {
        #[command(subcommand)]
        verb: Verb,
    },
    /// Log in to a server
    Login(login::Args),
    /// Revoke this machine's token and forget it
    Logout(logout::Args),
    /// Show who is logged in, and where
    Whoami(whoami::Args),
    /// Create, list and revoke tokens for programs, such as CI
    Token(token::Args),
    /// Let ssh, scp, sftp, rsync and editors reach weavers as ID.loom
    SshConfig(ssh_config::Args),
    /// Print the completion script of a shell
    Completion(completion::Args),
    /// Show the versions of this program and the server
    Version(version::Args),
    /// The background process that owns the tunnel; started by the commands that need it
    #[command(hide = true)]
    Daemon(tunnel::DaemonArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a weaver and attach to it
    New(new::Args),
    /// List weavers
    #[command(visible_alias = "list")]
    Ps(ps::Args),
    /// Join a weaver's main terminal
    Attach(attach::Args),
    /// Open a shell in a weaver, or run a command in one, over SSH
    Ssh(ssh::Args),
    /// Run a program in a weaver
    Exec(exec::Args),
    /// Reach a weaver's ports from this machine
    Tunnel(tunnel::Args),
    /// Show the main program's output
    Logs(logs::Args),
    /// Show what happened to a weaver, and why
    Events(events::Args),
    /// Extend a weaver's lifetime
    Extend(extend::Args),
    /// Delete weavers at once, with their data
    #[command(visible_alias = "rm")]
    Delete(delete::Args),
}

impl Command {
    /// Whether the command may put the terminal in raw mode, which must be undone however it ends.
    pub(crate) const fn takes_the_terminal(&self) -> bool {
        let (Self::Verb(verb) | Self::Weaver { verb }) = self else { return false };
        matches!(verb, Verb::New(_) | Verb::Attach(_) | Verb::Ssh(_) | Verb::Exec(_))
    }

    /// Whether the exit code is that of a program in the weaver, so that our own failures need a distinct one, 255.
    pub(crate) const fn returns_a_remote_code(&self) -> bool {
        matches!(self, Self::Verb(Verb::Ssh(_) | Verb::Exec(_)) | Self::Weaver { verb: Verb::Ssh(_) | Verb::Exec(_) })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn help(path: &[&str]) -> String {
        let mut command = Cli::command();
        command.build();
        let mut command = &mut command;
        for name in path {
            command = command.find_subcommand_mut(name).expect("a command");
        }
        command.render_long_help().to_string()
    }

    #[test]
    fn clap_accepts_the_tree() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_lists_the_commands_in_the_order_of_their_use() {
        let help = help(&[]);
        let listed: Vec<&str> = help
            .lines()
            .skip_while(|line| !line.starts_with("Commands:"))
            .skip(1)
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split(' ').next())
            .collect();
        assert_eq!(
            listed,
            [
                "new",
                "ps",
                "attach",
                "ssh",
                "exec",
                "tunnel",
                "logs",
                "events",
                "extend",
                "delete",
                "weaver",
                "login",
                "logout",
                "whoami",
                "token",
                "ssh-config",
                "completion",
                "version",
                "help"
            ],
            "{help}"
        );
    }

    #[test]
    fn every_command_says_what_it_does_and_the_verbs_give_examples() {
        let tree = Cli::command();
        for command in tree.get_subcommands().filter(|command| command.get_name() != "help") {
            assert!(command.get_about().is_some(), "{}", command.get_name());
        }
        for verb in
            ["new", "ps", "attach", "ssh", "exec", "tunnel", "logs", "events", "extend", "delete", "login", "token"]
        {
            assert!(help(&[verb]).contains("Examples:"), "{verb}: {}", help(&[verb]));
            assert!(
                ["login", "token"].contains(&verb) || help(&["weaver", verb]).contains("Examples:"),
                "weaver {verb}"
            );
        }
    }

    #[test]
    fn the_short_and_the_full_form_are_the_same_command() {
        for line in
            ["new --no-attach", "ps --json", "attach W-1", "delete a b --yes", "exec x -- ls -l", "ssh x -t -- ls"]
        {
            let words =
                |first: &[&'static str]| -> Vec<&str> { first.iter().copied().chain(line.split(' ')).collect() };
            let short = Cli::try_parse_from(words(&["loom"])).expect("parses");
            let full = Cli::try_parse_from(words(&["loom", "weaver"])).expect("parses");
            let Command::Verb(short) = short.command else { panic!("{line}") };
            let Command::Weaver { verb: full } = full.command else { panic!("{line}") };
            assert_eq!(format!("{short:?}"), format!("{full:?}"));
        }
    }

    #[test]
    fn nonsense_is_a_usage_error_that_names_what_is_wrong() {
        for (line, word) in [
            ("frobnicate", "frobnicate"),
            ("new --ttl -1", "ttl"),
            ("new --ttl NaN", "ttl"),
            ("new --ttl 0", "ttl"),
            ("new --ttl later", "ttl"),
            ("new --repo --upload-pack=x", "repo"),
            ("new --branch main", "repo"),
            ("extend x -3", "HOURS"),
            ("attach", "ID"),
            ("exec x", "CMD"),
            ("attach x --detach-keys ctrl-", "detach-keys"),
        ] {
            let error = Cli::try_parse_from(["loom"].into_iter().chain(line.split(' '))).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn a_command_for_the_weaver_keeps_its_own_flags() {
        let cli = Cli::try_parse_from(["loom", "exec", "x", "-t", "--", "ls", "-t", "--json"]).expect("parses");
        let Command::Verb(Verb::Exec(args)) = cli.command else { panic!("not exec") };
        assert_eq!(args.command, ["ls", "-t", "--json"]);
        assert!(args.tty);
    }
}
