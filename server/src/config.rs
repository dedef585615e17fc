//! Settings: flags, then `LOOM_SERVER_*`, then the file named by `--config`, then defaults. All are read and checked
//! before anything starts; a setting that is not known is an error.
//!
//! Each subsystem has its settings beside it: a `Settings` that holds what was given, each once, as a flag whose long
//! name is also its key in the file; and a `Config` that holds what is in force, which `Settings::resolve` makes. Here
//! are the server's own, and the list of all the others.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Command, ValueEnum};
use jiff::SignedDuration;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::Table;

use crate::{
    listener::{self, tls},
    provision::{kubernetes, local},
    resources, sessions,
};

/// Everything that was given on the command line and in the environment.
#[derive(Args, Debug, Clone, Default)]
#[group(skip)]
pub struct Settings {
    /// A TOML file with any of these settings by their long names.
    #[arg(long, env = "LOOM_SERVER_CONFIG", value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    #[command(flatten)]
    server: ServerSettings,
    #[command(flatten)]
    resources: resources::Settings,
    #[command(flatten)]
    tls: tls::Settings,
    #[command(flatten)]
    listener: listener::Settings,
    #[command(flatten, next_help_heading = "Local backend")]
    local: local::Settings,
    #[command(flatten, next_help_heading = "Kubernetes backend")]
    kubernetes: kubernetes::Settings,
}

/// Settings of the server itself.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
struct ServerSettings {
    /// Where to listen; port 0 takes a free one. [default: 127.0.0.1:7700]
    #[arg(long, env = "LOOM_SERVER_LISTEN", value_name = "ADDRESS:PORT", global = true)]
    listen: Option<SocketAddr>,
    /// Where to keep the database, keys and, on the local backend, the weavers. [default: $XDG_DATA_HOME/loom-server]
    #[arg(long, env = "LOOM_SERVER_DATA_DIR", value_name = "DIR", global = true)]
    data_dir: Option<PathBuf>,
    /// The address at which people reach the server. [default: http:// and what it listens at]
    #[arg(long, env = "LOOM_SERVER_PUBLIC_URL", value_name = "URL", global = true)]
    public_url: Option<String>,
    /// Serve figures for Prometheus at this address, under /metrics, over plain HTTP. [default: nowhere]
    #[arg(long, env = "LOOM_SERVER_METRICS_LISTEN", value_name = "IP:PORT", global = true)]
    metrics_listen: Option<SocketAddr>,
    /// What runs weavers. [default: local]
    #[arg(long, env = "LOOM_SERVER_BACKEND", value_enum, global = true)]
    backend: Option<BackendName>,
    /// The image when a request names none. [default: this-machine on the local backend]
    #[arg(long, env = "LOOM_SERVER_DEFAULT_IMAGE", value_name = "IMAGE", global = true)]
    default_image: Option<String>,
    /// The most weavers of one organisation at a time. [default: 100]
    #[arg(long, env = "LOOM_SERVER_MAX_WEAVERS", value_name = "N", global = true)]
    max_weavers: Option<u32>,
    /// Days after its last use that a login ends. [default: 90]
    #[arg(long, env = "LOOM_SERVER_LOGIN_TOKEN_DAYS", value_name = "DAYS", global = true)]
    login_token_days: Option<u32>,
    /// The most weavers of one user at a time, in all organisations. [default: max-weavers]
    #[arg(long, env = "LOOM_SERVER_MAX_WEAVERS_PER_USER", value_name = "N", global = true)]
    max_weavers_per_user: Option<u32>,
    /// Limit of open terminals, event streams, log streams and relay connections, each, of one user. [default: 1000]
    #[arg(long, env = "LOOM_SERVER_MAX_USER_CONNECTIONS", value_name = "N", global = true)]
    max_user_connections: Option<NonZeroU32>,
    /// The same for the weavers of one organisation, relay connections left out: a device has one for all its weavers.
    /// [default: 5000]
    #[arg(long, env = "LOOM_SERVER_MAX_ORG_CONNECTIONS", value_name = "N", global = true)]
    max_org_connections: Option<NonZeroU32>,
    /// Seconds between two sweeps for weavers whose timer was missed. [default: 60]
    #[arg(long, env = "LOOM_SERVER_WEAVER_CLEANUP_INTERVAL_SECS", value_name = "SECONDS", global = true)]
    weaver_cleanup_interval_secs: Option<u64>,
    /// Whether agents use UDP, or the relay only. [default: on]
    #[arg(long, env = "LOOM_SERVER_AGENT_UDP", value_enum, global = true)]
    agent_udp: Option<Switch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BackendName {
    /// Isolated process trees on this machine; for development.
    Local,
    /// Pods in the cluster of KUBECONFIG, or the one that the server runs in.
    Kubernetes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Switch {
    On,
    Off,
}

/// The settings in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// The certificate chain and its key, when the server serves HTTPS.
    pub tls: Option<tls::Config>,
    /// Limits on connections, and who is believed about them.
    pub listener: listener::Config,
    /// Where people reach the server, if that differs from where it listens.
    pub public_url: Option<String>,
    /// Where metrics are served, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
    /// What runs weavers.
    pub backend: Backend,
    /// The image when a request names none.
    pub default_image: String,
    /// What a weaver may use.
    pub resources: resources::Config,
    /// The most weavers of one organisation at a time.
    pub max_weavers: u32,
    /// The most connections of one kind.
    pub session_limits: sessions::Limits,
    /// How long after its last use a login ends.
    pub login_life: SignedDuration,
    /// The most weavers of one user at a time.
    pub max_weavers_per_user: u32,
    /// Between two sweeps.
    pub cleanup_interval: Duration,
}

/// What runs weavers, with its settings.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Isolated process trees on this machine.
    Local(local::Config),
    /// Pods in a cluster.
    Kubernetes(kubernetes::Config),
}

impl Settings {
    /// Puts file and defaults under what was given, and checks it all.
    ///
    /// # Errors
    ///
    /// Says which setting is wrong, and why.
    pub fn resolve(self) -> Result<Config> {
        let file = File::read(self.config.as_deref())?;
        let server = file.under(&self.server)?;
        let resources = file.under(&self.resources)?.resolve()?;
        let tls = file.under(&self.tls)?.resolve()?;
        let listener = file.under(&self.listener)?.resolve()?;
        // Both are read whichever is used: a mistake in the file should not wait for the other backend.
        let (local, kubernetes) = (file.under(&self.local)?, file.under(&self.kubernetes)?);

        let listen = server.listen.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7700));
        let data_dir = absolute(server.data_dir)?;
        let public_url = server.public_url.map(|url| url.trim_end_matches('/').to_owned());
        if let Some(url) = &public_url {
            // People are sent there to approve their logins.
            let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
            ensure!(
                host.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace)),
                "{url:?} cannot be the public-url: it looks like https://loom.example"
            );
        }
        let backend = server.backend.unwrap_or(BackendName::Local);
        // A token must not travel in clear, and local weavers are for development.
        ensure!(
            listen.ip().is_loopback() || (tls.is_some() && backend != BackendName::Local),
            "listening at {listen}: the local backend and plain HTTP are for loopback only; use --listen 127.0.0.1:{}",
            listen.port()
        );
        let default_image = server.default_image.unwrap_or_else(|| {
            match backend {
                BackendName::Local => local::DEFAULT_IMAGE,
                BackendName::Kubernetes => kubernetes::DEFAULT_IMAGE,
            }
            .to_owned()
        });
        let agent_udp = server.agent_udp.unwrap_or(Switch::On) == Switch::On;
        let backend = match backend {
            BackendName::Local => Backend::Local(local.resolve(&data_dir, default_image.clone(), agent_udp)?),
            BackendName::Kubernetes => Backend::Kubernetes(kubernetes.resolve(public_url.as_deref(), agent_udp)?),
        };
        let seconds = server.weaver_cleanup_interval_secs.unwrap_or(60);
        ensure!((1..=86_400).contains(&seconds), "the cleanup interval must be 1 to 86400 seconds, not {seconds}");
        let login_days = server.login_token_days.unwrap_or(90);
        ensure!((1..=3650).contains(&login_days), "a login must live 1 to 3650 days, not {login_days}");
        Ok(Config {
            listen,
            data_dir,
            tls,
            listener,
            public_url,
            metrics_listen: server.metrics_listen,
            backend,
            default_image,
            resources,
            max_weavers: server.max_weavers.unwrap_or(100),
            session_limits: sessions::Limits {
                per_user: server.max_user_connections.map_or(1000, NonZeroU32::get) as usize,
                per_org: server.max_org_connections.map_or(5000, NonZeroU32::get) as usize,
            },
            login_life: SignedDuration::from_hours(24 * i64::from(login_days)),
            max_weavers_per_user: server.max_weavers_per_user.or(server.max_weavers).unwrap_or(100),
            cleanup_interval: Duration::from_secs(seconds),
        })
    }
}

/// What the file of `--config` says; nothing without one.
#[derive(Default)]
struct File {
    path: PathBuf,
    table: Table,
}

impl File {
    fn read(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let table: Table = toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        // Each subsystem reads only its own settings, so what nobody reads is found by the names of all flags.
        let flags = Settings::augment_args(Command::new("loom-server"));
        let is_known = |key: &str| {
            key != "config" && flags.get_arguments().filter_map(|argument| argument.get_long()).any(|flag| flag == key)
        };
        if let Some(unknown) = table.keys().find(|key| !is_known(key)) {
            bail!("in {}: there is no setting {unknown:?}; loom-server --help lists them all", path.display());
        }
        Ok(Self { path: path.to_owned(), table })
    }

    /// A subsystem's settings: those that were given, over the file's.
    fn under<S: Serialize + DeserializeOwned>(&self, given: &S) -> Result<S> {
        let mut table = self.table.clone();
        table.extend(Table::try_from(given)?);
        table.try_into().with_context(|| format!("in {}", self.path.display()))
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
    use clap::FromArgMatches as _;

    use super::*;

    /// What these flags and a file with this text come to.
    fn resolve(flags: &[&str], file: &str) -> Result<Config> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("config.toml");
        std::fs::write(&path, file)?;
        // Anything that is a file will do.
        let agent = std::env::current_exe()?;
        let mut command = Settings::augment_args(Command::new("loom-server"));
        let mut line = vec!["loom-server", "--config", path.to_str().unwrap(), "--agent", agent.to_str().unwrap()];
        line.extend(["--data-dir", directory.path().to_str().unwrap()]);
        line.extend(flags);
        Settings::from_arg_matches(&command.try_get_matches_from_mut(line)?)?.resolve()
    }

    fn error(flags: &[&str], file: &str) -> String {
        format!("{:#}", resolve(flags, file).expect_err("refused"))
    }

    const KUBERNETES: &str = "backend = \"kubernetes\"\npublic-url = \"https://loom.example/\"\n\
        kubernetes-agent-image = \"agent:1\"\nkubernetes-pull-secrets = [\"a\", \"b\"]\n";

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let config = resolve(&["--max-weavers", "4"], "listen = \"127.0.0.1:9\"\nmax-weavers = 3").unwrap();
        assert_eq!((config.listen.port(), config.max_weavers, config.resources.default.memory_mb), (9, 4, 2048));
        assert_eq!(config.default_image, local::DEFAULT_IMAGE);
    }

    #[test]
    fn a_list_on_the_command_line_replaces_the_files() {
        let secrets = |flags: &[&str]| match resolve(flags, KUBERNETES).unwrap().backend {
            Backend::Kubernetes(kubernetes) => kubernetes.pull_secrets,
            Backend::Local(_) => panic!("the file names the other backend"),
        };
        assert_eq!(secrets(&[]), ["a", "b"]);
        assert_eq!(secrets(&["--kubernetes-pull-secrets", "c,d"]), ["c", "d"]);
    }

    #[test]
    fn each_backend_asks_for_what_it_needs() {
        assert!(error(&["--backend", "kubernetes"], "").contains("kubernetes-agent-url"));
        assert!(error(&["--local-uid", "0"], "").contains("--local-uid"));
        assert!(resolve(&["--local-uid", "0"], KUBERNETES).is_ok());
    }

    #[test]
    fn unknown_settings_and_wrong_values_are_named() {
        assert!(error(&[], "listne = \"127.0.0.1:9\"").contains("listne"));
        assert!(error(&[], "config = \"other.toml\"").contains("\"config\""));
        let wrong = error(&[], "max-weavers = \"many\"");
        assert!(wrong.contains("max-weavers") && wrong.contains("config.toml"), "{wrong}");
        for url in ["loom.example", "ftp://loom.example", "https://", ""] {
            assert!(error(&["--public-url", url], "").contains("public-url"), "{url}");
        }
        assert!(error(&[], "max-user-connections = 0").contains("max-user-connections"));
        assert!(error(&[], "kubernetes-tolerations = 3").contains("kubernetes-tolerations"));
    }

    #[test]
    fn plain_http_is_for_loopback_only() {
        assert!(error(&[], "listen = \"0.0.0.0:9\"").contains("loopback"));
        assert!(error(&["--listen", "0.0.0.0:9"], KUBERNETES).contains("loopback"));
        assert!(error(&[], "tls-cert = \"a.pem\"").contains("tls-key"));
    }
}
