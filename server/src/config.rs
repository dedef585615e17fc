//! Settings: flags, then `LOOM_SERVER_*`, then the file named by `--config`, then defaults. All are read and checked
//! before anything starts; a setting that is not known is an error.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use loom_api::weaver::ResourceSpec;
use serde::Deserialize;

/// What the user gave: every setting may be left out.
#[derive(Args, Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// A TOML file with any of these settings by their long names.
    #[arg(long, env = "LOOM_SERVER_CONFIG", value_name = "FILE", global = true)]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one. [default: 127.0.0.1:7700]
    #[arg(long, env = "LOOM_SERVER_LISTEN", value_name = "ADDRESS:PORT", global = true)]
    listen: Option<SocketAddr>,
    /// Where to keep the database, keys and, on the local backend, the weavers. [default: $XDG_DATA_HOME/loom-server]
    #[arg(long, env = "LOOM_SERVER_DATA_DIR", value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
    /// The address at which people reach the server. [default: http:// and what it listens at]
    #[arg(long, env = "LOOM_SERVER_PUBLIC_URL", value_name = "URL", global = true)]
    public_url: Option<String>,
    /// What runs weavers. [default: local]
    #[arg(long, env = "LOOM_SERVER_BACKEND", value_enum, global = true)]
    backend: Option<Backend>,
    /// The image when a request names none. [default: this-machine on the local backend]
    #[arg(long, env = "LOOM_SERVER_DEFAULT_IMAGE", value_name = "IMAGE", global = true)]
    default_image: Option<String>,
    /// Limit of CPU, in thousandths of a core, when a request names none. [default: 2000]
    #[arg(long, env = "LOOM_SERVER_CPU_MILLICORES", value_name = "N", global = true)]
    cpu_millicores: Option<u32>,
    /// Limit of memory, in MiB, when a request names none. [default: 2048]
    #[arg(long, env = "LOOM_SERVER_MEMORY_MB", value_name = "N", global = true)]
    memory_mb: Option<u32>,
    /// The most weavers of one organisation at a time. [default: 100]
    #[arg(long, env = "LOOM_SERVER_MAX_WEAVERS", value_name = "N", global = true)]
    max_weavers: Option<u32>,
    /// Seconds between two sweeps for weavers whose timer was missed. [default: 60]
    #[arg(long, env = "LOOM_SERVER_WEAVER_CLEANUP_INTERVAL_SECS", value_name = "SECONDS", global = true)]
    weaver_cleanup_interval_secs: Option<u64>,
    /// The agent's binary. [default: loom-agent beside the server's]
    #[arg(long, env = "LOOM_SERVER_AGENT", value_name = "FILE", global = true)]
    agent: Option<PathBuf>,
    /// Local backend: the network of a weaver's processes. [default: isolated]
    #[arg(long, env = "LOOM_SERVER_LOCAL_NETWORK", value_enum, global = true)]
    local_network: Option<LocalNetwork>,
    /// Local backend: whether agents use UDP, or the relay only. [default: on]
    #[arg(long, env = "LOOM_SERVER_LOCAL_AGENT_UDP", value_enum, global = true)]
    local_agent_udp: Option<Switch>,
    /// Local backend, server run by root: the unprivileged user and group that weavers run as. [default: 61184]
    #[arg(long, env = "LOOM_SERVER_LOCAL_UID", value_name = "UID", global = true)]
    local_uid: Option<u32>,
}

/// What runs weavers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Isolated process trees on this machine; for development.
    Local,
}

/// The network of a local weaver's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LocalNetwork {
    /// One of their own, without a way out.
    Isolated,
    /// The machine's.
    Host,
}

/// A setting that is on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// The settings as they are in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where people reach the server, if that differs from where it listens.
    pub public_url: Option<String>,
    /// What runs weavers.
    pub backend: Backend,
    /// The image when a request names none.
    pub default_image: String,
    /// What a weaver may use when a request does not say.
    pub resources: ResourceSpec,
    /// The most weavers of one organisation at a time.
    pub max_weavers: u32,
    /// Between two sweeps.
    pub cleanup_interval: Duration,
    /// The agent's binary.
    pub agent: PathBuf,
    /// Local backend: the network.
    pub local_network: LocalNetwork,
    /// Local backend: whether agents use UDP.
    pub local_agent_udp: bool,
    /// Local backend: the user that weavers run as when the server is root.
    pub local_uid: u32,
}

/// On the local backend there is one image: the machine.
const LOCAL_IMAGE: &str = "this-machine";

impl Settings {
    /// Puts file and defaults under what was given, and checks it all.
    ///
    /// # Errors
    ///
    /// Says which setting is wrong, and why.
    pub fn resolve(self) -> Result<Config> {
        let file = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                toml::from_str(&text).with_context(|| format!("in {}", path.display()))?
            }
            None => Self::default(),
        };
        let listen = self.listen.or(file.listen).unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7700));
        let backend = self.backend.or(file.backend).unwrap_or(Backend::Local);
        // The server serves no TLS yet, and a token must not travel in clear.
        ensure!(
            listen.ip().is_loopback(),
            "listening at {listen}: the local backend and plain HTTP are for loopback only; use --listen 127.0.0.1:{}",
            listen.port()
        );
        let agent = match self.agent.or(file.agent) {
            Some(agent) => agent,
            None => std::env::current_exe()?.with_file_name("loom-agent"),
        };
        ensure!(agent.is_file(), "there is no agent at {}; name it with --agent", agent.display());
        let seconds = self.weaver_cleanup_interval_secs.or(file.weaver_cleanup_interval_secs).unwrap_or(60);
        ensure!((1..=86_400).contains(&seconds), "the cleanup interval must be 1 to 86400 seconds, not {seconds}");
        let resources = ResourceSpec {
            cpu_millicores: self.cpu_millicores.or(file.cpu_millicores).unwrap_or(2000),
            memory_mb: self.memory_mb.or(file.memory_mb).unwrap_or(2048),
        };
        ensure!(resources.cpu_millicores > 0 && resources.memory_mb > 0, "CPU and memory must be above zero");
        let local_uid = self.local_uid.or(file.local_uid).unwrap_or(61_184);
        ensure!(local_uid > 0, "weavers must not run as root: choose another --local-uid");
        Ok(Config {
            listen,
            data_dir: absolute(self.data_dir.or(file.data_dir))?,
            public_url: self.public_url.or(file.public_url).map(|url| url.trim_end_matches('/').to_owned()),
            backend,
            default_image: self.default_image.or(file.default_image).unwrap_or_else(|| LOCAL_IMAGE.to_owned()),
            resources,
            max_weavers: self.max_weavers.or(file.max_weavers).unwrap_or(100),
            cleanup_interval: Duration::from_secs(seconds),
            agent: std::path::absolute(agent)?,
            local_network: self.local_network.or(file.local_network).unwrap_or(LocalNetwork::Isolated),
            local_agent_udp: self.local_agent_udp.or(file.local_agent_udp).unwrap_or(Switch::On) == Switch::On,
            local_uid,
        })
    }
}

fn absolute(given: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(given) = given {
        return Ok(std::path::absolute(given)?);
    }
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let Some(base) = from("XDG_DATA_HOME").or_else(|| from("HOME").map(|home| home.join(".local/share"))) else {
        bail!("neither --data-dir nor HOME is set");
    };
    Ok(base.join("loom-server"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(text: &str) -> Result<Config> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("config.toml");
        std::fs::write(&file, text)?;
        let agent = Some(std::env::current_exe()?);
        Settings { config: Some(file), agent, data_dir: Some(directory.path().to_owned()), ..Settings::default() }
            .resolve()
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let config = from_file("listen = \"127.0.0.1:9\"\nmax-weavers = 3").expect("a good file");
        assert_eq!((config.listen.port(), config.max_weavers, config.resources.memory_mb), (9, 3, 2048));
    }

    #[test]
    fn unknown_settings_and_other_addresses_than_loopback_are_refused() {
        assert!(format!("{:#}", from_file("listne = \"127.0.0.1:9\"").expect_err("unknown")).contains("listne"));
        assert!(from_file("listen = \"0.0.0.0:9\"").expect_err("not loopback").to_string().contains("loopback"));
        assert!(from_file("local-uid = 0").is_err());
    }
}
