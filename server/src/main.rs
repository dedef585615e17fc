//! The server's command line.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use loom_server::{
    App, Backend, Settings, kubernetes,
    local::{self, supervisor},
    manage,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The server of Loom weavers: API, key exchange, relay and provisioning.
#[derive(Parser)]
#[command(name = "loom-server", version, args_conflicts_with_subcommands = false)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Subcommand)]
enum Command {
    /// Serves (what happens without a command, too).
    Serve,
    /// Says whether the server has all that it needs of its cluster, and which rule is missing.
    Check,
    /// Manages users.
    #[command(subcommand)]
    User(manage::User),
    /// Manages organisations, whose members share their weavers.
    #[command(subcommand)]
    Org(manage::Org),
    /// Manages users' tokens.
    #[command(subcommand)]
    Token(manage::Token),
    /// Stands for one weaver's pod on the local backend.
    #[command(hide = true)]
    LocalPod {
        /// The weaver's directory.
        directory: PathBuf,
    },
    /// Becomes the processes of a local weaver.
    #[command(hide = true)]
    LocalInit {
        /// Only says what this machine cannot isolate.
        #[arg(long)]
        probe: bool,
    },
    /// Says why the agents of local weavers will not accept the server's certificate, if they will not.
    #[command(hide = true)]
    LocalTrust {
        /// Where they reach the server.
        url: String,
        /// Its certificate chain.
        chain: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The one provider for all that speaks TLS here; nobody else has installed one yet.
    let _ = rustls::crypto::ring::default_provider().install_default();
    // The stages of a local weaver fork, so nothing may have started a thread before them.
    let result = match cli.command {
        Some(Command::LocalPod { directory }) => supervisor::run(&directory).map(|()| ExitCode::SUCCESS),
        Some(Command::LocalInit { probe }) => {
            local::init(probe).map(|code| ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
        }
        Some(Command::LocalTrust { url, chain }) => local::say_doubt(&url, &chain).map(|()| ExitCode::SUCCESS),
        Some(Command::User(command)) => blocking(manage::run(cli.settings, manage::Command::User(command))),
        Some(Command::Org(command)) => blocking(manage::run(cli.settings, manage::Command::Org(command))),
        Some(Command::Token(command)) => blocking(manage::run(cli.settings, manage::Command::Token(command))),
        Some(Command::Check) => blocking(check(cli.settings)),
        None | Some(Command::Serve) => blocking(serve(cli.settings)),
    };
    result.unwrap_or_else(|error| {
        eprintln!("loom-server: {error:#}");
        ExitCode::FAILURE
    })
}

fn blocking(job: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(job)?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(settings: Settings) -> Result<()> {
    let filter = std::env::var("LOOM_LOG").unwrap_or_else(|_| "info,sqlx=warn".to_owned());
    let filter = EnvFilter::try_new(&filter)
        .with_context(|| format!("LOOM_LOG says which events are logged, not {filter:?}"))?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let config = settings.resolve()?;
    tracing::info!(?config, "settings");
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    App::start(config)
        .await?
        .serve(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await
}

async fn check(settings: Settings) -> Result<()> {
    let config = settings.resolve()?;
    let Backend::Kubernetes(kubernetes) = config.backend else {
        bail!("there is nothing to check on the local backend");
    };
    kubernetes::check(&kubernetes).await
}
