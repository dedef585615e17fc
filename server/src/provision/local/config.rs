//! Settings of the local backend.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// There is one image: the machine.
pub const DEFAULT_IMAGE: &str = "this-machine";

/// What was given.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// The agent's binary. [default: loom-agent beside the server's]
    #[arg(long, env = "LOOM_SERVER_AGENT", value_name = "FILE", global = true)]
    pub(crate) agent: Option<PathBuf>,
    /// The network of a weaver's processes. [default: isolated]
    #[arg(long, env = "LOOM_SERVER_LOCAL_NETWORK", value_enum, global = true)]
    local_network: Option<Network>,
    /// When root runs the server: the first of 4096 users and groups that weavers run as, each weaver as one of its own.
    /// [default: 61184]
    #[arg(long, env = "LOOM_SERVER_LOCAL_UID", value_name = "UID", global = true)]
    local_uid: Option<u32>,
    /// Certificate authorities, in PEM, that agents trust for the server besides the system's. [default: those in tls-cert]
    #[arg(long, env = "LOOM_SERVER_LOCAL_AGENT_CA", value_name = "FILE", global = true)]
    local_agent_ca: Option<PathBuf>,
    /// Directories of git repositories on this machine that every user may clone from, by file:// URLs. [default: none]
    #[arg(long, env = "LOOM_SERVER_LOCAL_REPOSITORIES", value_name = "DIR", value_delimiter = ',', global = true)]
    local_repositories: Option<Vec<PathBuf>>,
}

/// The network of a local weaver's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// One of their own, without a way out.
    Isolated,
    /// The machine's.
    Host,
}

/// The settings in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Holds a directory for each weaver.
    pub directory: PathBuf,
    /// The agent's binary.
    pub agent: PathBuf,
    /// The one image that a request may name.
    pub image: String,
    /// The network of a weaver's processes.
    pub network: Network,
    /// The first user and group that weavers run as when root runs the server.
    pub uid: u32,
    /// Authorities that agents trust for the server, in PEM.
    pub agent_ca: Option<PathBuf>,
    /// Directories that weavers may clone from, without links in their paths.
    pub repositories: Vec<PathBuf>,
    /// Whether agents use UDP, or the relay only.
    pub agent_udp: bool,
}

impl Settings {
    /// Checks the settings, and fills in the defaults.
    ///
    /// # Errors
    ///
    /// Says which setting is wrong.
    pub(crate) fn resolve(self, data_dir: &Path, image: String, agent_udp: bool) -> Result<Config> {
        let agent = match self.agent {
            Some(agent) => std::path::absolute(agent)?,
            None => std::env::current_exe()?.with_file_name("loom-agent"),
        };
        ensure!(agent.is_file(), "there is no agent at {}; name it with --agent", agent.display());
        let uid = self.local_uid.unwrap_or(61_184);
        ensure!(uid > 0, "weavers must not run as root: choose another --local-uid");
        let network = self.local_network.unwrap_or(Network::Isolated);
        let repositories = self
            .local_repositories
            .unwrap_or_default()
            .iter()
            .map(|directory| {
                let found = directory.canonicalize().ok().filter(|path| path.is_dir() && path.parent().is_some());
                found.with_context(|| {
                    format!(
                        "local-repositories: {} cannot be offered: it is not a directory, or the root",
                        directory.display()
                    )
                })
            })
            .collect::<Result<_>>()?;
        Ok(Config {
            directory: data_dir.join("weavers"),
            agent,
            image,
            network,
            uid,
            agent_ca: self.local_agent_ca,
            repositories,
            agent_udp,
        })
    }
}
