//! Settings: flags, then `LOOM_SERVER_*`, then the file named by `--config`, then defaults. All are read and checked
//! before anything starts; a setting that is not known is an error.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
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
    /// Serve HTTPS with this certificate chain, in PEM; read anew when it changes.
    #[arg(long, env = "LOOM_SERVER_TLS_CERT", value_name = "FILE", requires = "tls_key", global = true)]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM.
    #[arg(long, env = "LOOM_SERVER_TLS_KEY", value_name = "FILE", requires = "tls_cert", global = true)]
    tls_key: Option<PathBuf>,
    /// Serve figures for Prometheus at this address, under /metrics, over plain HTTP. [default: nowhere]
    #[arg(long, env = "LOOM_SERVER_METRICS_LISTEN", value_name = "IP:PORT", global = true)]
    metrics_listen: Option<SocketAddr>,
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
    /// Whether agents use UDP, or the relay only. [default: on]
    #[arg(long, env = "LOOM_SERVER_AGENT_UDP", value_enum, global = true)]
    agent_udp: Option<Switch>,
    /// Local backend, server run by root: the unprivileged user and group that weavers run as. [default: 61184]
    #[arg(long, env = "LOOM_SERVER_LOCAL_UID", value_name = "UID", global = true)]
    local_uid: Option<u32>,
    /// Kubernetes backend: the namespace of the weavers' pods. [default: loom-weavers]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_NAMESPACE", value_name = "NAME", global = true)]
    kubernetes_namespace: Option<String>,
    /// Kubernetes backend: the image with the agent, at /usr/local/bin/loom-agent.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_IMAGE", value_name = "IMAGE", global = true)]
    kubernetes_agent_image: Option<String>,
    /// Kubernetes backend: where agents in pods reach the server. [default: the public URL]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_URL", value_name = "URL", global = true)]
    kubernetes_agent_url: Option<String>,
    /// Kubernetes backend: certificate authorities that agents trust for it besides the usual ones, in PEM.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_CA", value_name = "FILE", global = true)]
    kubernetes_agent_ca: Option<PathBuf>,
    /// Kubernetes backend: secrets to pull images with.
    #[arg(
        long,
        env = "LOOM_SERVER_KUBERNETES_PULL_SECRETS",
        value_name = "NAME",
        value_delimiter = ',',
        global = true
    )]
    kubernetes_pull_secrets: Vec<String>,
    /// Kubernetes backend: registries that are asked over plain HTTP, as HOST or HOST:PORT.
    #[arg(
        long,
        env = "LOOM_SERVER_KUBERNETES_PLAIN_HTTP_REGISTRIES",
        value_name = "HOST",
        value_delimiter = ',',
        global = true
    )]
    kubernetes_plain_http_registries: Vec<String>,
    /// Kubernetes backend: labels of the nodes that weavers run on.
    #[arg(
        long,
        env = "LOOM_SERVER_KUBERNETES_NODE_SELECTOR",
        value_name = "KEY=VALUE",
        value_delimiter = ',',
        global = true
    )]
    kubernetes_node_selector: Vec<String>,
    /// Kubernetes backend: taints of nodes that weavers may run on nevertheless, as KEY[=VALUE]:EFFECT.
    #[arg(
        long,
        env = "LOOM_SERVER_KUBERNETES_TOLERATIONS",
        value_name = "TAINT",
        value_delimiter = ',',
        global = true
    )]
    kubernetes_tolerations: Vec<String>,
    /// Kubernetes backend: the CPU that a weaver is guaranteed, of what it may use. [default: 500]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", value_name = "N", global = true)]
    kubernetes_request_cpu_millicores: Option<u32>,
    /// Kubernetes backend: the memory that a weaver is guaranteed, in MiB. [default: 512]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", value_name = "N", global = true)]
    kubernetes_request_memory_mb: Option<u32>,
    /// Kubernetes backend: the runtime class of weavers' pods.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_RUNTIME_CLASS", value_name = "NAME", global = true)]
    kubernetes_runtime_class: Option<String>,
}

/// What runs weavers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Isolated process trees on this machine; for development.
    Local,
    /// Pods in the cluster of KUBECONFIG, or the one that the server runs in.
    Kubernetes,
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

/// The files for HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The certificate chain, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

/// The settings as they are in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// The certificate chain and its key, when the server serves HTTPS.
    pub tls: Option<Tls>,
    /// Where people reach the server, if that differs from where it listens.
    pub public_url: Option<String>,
    /// Where metrics are served, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
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
    /// Whether agents use UDP.
    pub agent_udp: bool,
    /// Local backend: the user that weavers run as when the server is root.
    pub local_uid: u32,
    /// Kubernetes backend: how pods are made; there when that backend is.
    pub kubernetes: Option<KubernetesConfig>,
}

/// Settings of the Kubernetes backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesConfig {
    /// The namespace of the weavers' pods.
    pub namespace: String,
    /// The image with the agent.
    pub agent_image: String,
    /// Where agents reach the server.
    pub agent_url: String,
    /// Authorities that agents trust for it, in PEM.
    pub agent_ca: Option<PathBuf>,
    /// Secrets to pull images with.
    pub pull_secrets: Vec<String>,
    /// Registries that are asked over plain HTTP.
    pub plain_http_registries: Vec<String>,
    /// Whether agents use UDP, or the relay only.
    pub agent_udp: bool,
    /// Labels of the nodes that weavers run on.
    pub node_selector: BTreeMap<String, String>,
    /// Taints that weavers tolerate.
    pub tolerations: Vec<Taint>,
    /// What a weaver is guaranteed, at most: the rest of its limits is shared.
    pub requests: ResourceSpec,
    /// The pods' runtime class.
    pub runtime_class: Option<String>,
}

/// A taint of nodes, as `kubectl taint` writes it: `KEY[=VALUE]:EFFECT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taint {
    /// Its key.
    pub key: String,
    /// Its value; any when there is none.
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: String,
}

impl FromStr for Taint {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || format!("{text:?} is not KEY[=VALUE]:EFFECT");
        let (taint, effect) = text.rsplit_once(':').with_context(wrong)?;
        let (key, value) = taint.split_once('=').map_or((taint, None), |(key, value)| (key, Some(value)));
        ensure!(!key.is_empty() && ["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect), wrong());
        Ok(Self { key: key.to_owned(), value: value.map(str::to_owned), effect: effect.to_owned() })
    }
}

/// On the local backend there is one image: the machine.
const LOCAL_IMAGE: &str = "this-machine";
/// The image that is made for weavers.
const WEAVER_IMAGE: &str = "ghcr.io/ghuntley/loom/weaver:latest";

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
        let given = self.over(file);
        let listen = given.listen.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7700));
        let backend = given.backend.unwrap_or(Backend::Local);
        let public_url = given.public_url.as_ref().map(|url| url.trim_end_matches('/').to_owned());
        let agent_udp = given.agent_udp.unwrap_or(Switch::On) == Switch::On;
        let kubernetes = match backend {
            Backend::Local => None,
            Backend::Kubernetes => Some(given.clone().kubernetes(public_url.as_deref(), agent_udp)?),
        };
        let tls = match (given.tls_cert, given.tls_key) {
            (Some(certificate), Some(key)) => {
                Some(Tls { certificate: std::path::absolute(certificate)?, key: std::path::absolute(key)? })
            }
            (None, None) => None,
            _ => bail!("HTTPS needs both a certificate (tls-cert) and its key (tls-key)"),
        };
        // A token must not travel in clear, and local weavers are for development.
        ensure!(
            listen.ip().is_loopback() || (tls.is_some() && backend != Backend::Local),
            "listening at {listen}: the local backend and plain HTTP are for loopback only; use --listen 127.0.0.1:{}",
            listen.port()
        );
        let agent = match given.agent {
            Some(agent) => agent,
            None => std::env::current_exe()?.with_file_name("loom-agent"),
        };
        ensure!(
            agent.is_file() || backend != Backend::Local,
            "there is no agent at {}; name it with --agent",
            agent.display()
        );
        let seconds = given.weaver_cleanup_interval_secs.unwrap_or(60);
        ensure!((1..=86_400).contains(&seconds), "the cleanup interval must be 1 to 86400 seconds, not {seconds}");
        let resources = ResourceSpec {
            cpu_millicores: given.cpu_millicores.unwrap_or(2000),
            memory_mb: given.memory_mb.unwrap_or(2048),
        };
        ensure!(resources.cpu_millicores > 0 && resources.memory_mb > 0, "CPU and memory must be above zero");
        let local_uid = given.local_uid.unwrap_or(61_184);
        ensure!(local_uid > 0, "weavers must not run as root: choose another --local-uid");
        Ok(Config {
            listen,
            tls,
            data_dir: absolute(given.data_dir)?,
            public_url,
            metrics_listen: given.metrics_listen,
            backend,
            default_image: given.default_image.unwrap_or_else(|| {
                match backend {
                    Backend::Local => LOCAL_IMAGE,
                    Backend::Kubernetes => WEAVER_IMAGE,
                }
                .to_owned()
            }),
            resources,
            max_weavers: given.max_weavers.unwrap_or(100),
            cleanup_interval: Duration::from_secs(seconds),
            agent: std::path::absolute(agent)?,
            local_network: given.local_network.unwrap_or(LocalNetwork::Isolated),
            agent_udp,
            local_uid,
            kubernetes,
        })
    }

    /// These settings, and where they say nothing, those of `file`.
    fn over(self, file: Self) -> Self {
        let list = |own: Vec<String>, other: Vec<String>| if own.is_empty() { other } else { own };
        Self {
            config: self.config,
            listen: self.listen.or(file.listen),
            data_dir: self.data_dir.or(file.data_dir),
            public_url: self.public_url.or(file.public_url),
            tls_cert: self.tls_cert.or(file.tls_cert),
            tls_key: self.tls_key.or(file.tls_key),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            backend: self.backend.or(file.backend),
            default_image: self.default_image.or(file.default_image),
            cpu_millicores: self.cpu_millicores.or(file.cpu_millicores),
            memory_mb: self.memory_mb.or(file.memory_mb),
            max_weavers: self.max_weavers.or(file.max_weavers),
            weaver_cleanup_interval_secs: self.weaver_cleanup_interval_secs.or(file.weaver_cleanup_interval_secs),
            agent: self.agent.or(file.agent),
            local_network: self.local_network.or(file.local_network),
            agent_udp: self.agent_udp.or(file.agent_udp),
            local_uid: self.local_uid.or(file.local_uid),
            kubernetes_namespace: self.kubernetes_namespace.or(file.kubernetes_namespace),
            kubernetes_agent_image: self.kubernetes_agent_image.or(file.kubernetes_agent_image),
            kubernetes_agent_url: self.kubernetes_agent_url.or(file.kubernetes_agent_url),
            kubernetes_agent_ca: self.kubernetes_agent_ca.or(file.kubernetes_agent_ca),
            kubernetes_runtime_class: self.kubernetes_runtime_class.or(file.kubernetes_runtime_class),
            kubernetes_pull_secrets: list(self.kubernetes_pull_secrets, file.kubernetes_pull_secrets),
            kubernetes_plain_http_registries: list(
                self.kubernetes_plain_http_registries,
                file.kubernetes_plain_http_registries,
            ),
            kubernetes_node_selector: list(self.kubernetes_node_selector, file.kubernetes_node_selector),
            kubernetes_tolerations: list(self.kubernetes_tolerations, file.kubernetes_tolerations),
            kubernetes_request_cpu_millicores: self
                .kubernetes_request_cpu_millicores
                .or(file.kubernetes_request_cpu_millicores),
            kubernetes_request_memory_mb: self.kubernetes_request_memory_mb.or(file.kubernetes_request_memory_mb),
        }
    }

    fn kubernetes(self, public_url: Option<&str>, agent_udp: bool) -> Result<KubernetesConfig> {
        let agent_url = self.kubernetes_agent_url.or_else(|| public_url.map(str::to_owned)).context(
            "the Kubernetes backend needs to know where pods reach the server: set kubernetes-agent-url or public-url",
        )?;
        ensure!(agent_url.starts_with("https://"), "{agent_url}: pods reach the server over https:// only");
        let label = |text: &String| {
            let (key, value) = text.split_once('=').with_context(|| format!("{text:?} is not KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        Ok(KubernetesConfig {
            namespace: self.kubernetes_namespace.unwrap_or_else(|| "loom-weavers".to_owned()),
            agent_image: self
                .kubernetes_agent_image
                .context("the Kubernetes backend needs the image with the agent: set kubernetes-agent-image")?,
            agent_url,
            agent_ca: self.kubernetes_agent_ca,
            pull_secrets: self.kubernetes_pull_secrets,
            plain_http_registries: self.kubernetes_plain_http_registries,
            agent_udp,
            node_selector: self.kubernetes_node_selector.iter().map(label).collect::<Result<_>>()?,
            tolerations: self.kubernetes_tolerations.iter().map(|taint| taint.parse()).collect::<Result<_>>()?,
            requests: ResourceSpec {
                cpu_millicores: self.kubernetes_request_cpu_millicores.unwrap_or(500),
                memory_mb: self.kubernetes_request_memory_mb.unwrap_or(512),
            },
            runtime_class: self.kubernetes_runtime_class,
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

    #[test]
    fn taints_are_written_as_kubectl_writes_them() {
        let taint = |text: &str| text.parse::<Taint>().map(|taint| (taint.key, taint.value, taint.effect));
        assert_eq!(taint("gpu=yes:NoSchedule").unwrap(), ("gpu".into(), Some("yes".into()), "NoSchedule".into()));
        assert_eq!(taint("gpu:NoExecute").unwrap(), ("gpu".into(), None, "NoExecute".into()));
        assert!(taint("gpu").is_err() && taint("gpu:Never").is_err() && taint(":NoExecute").is_err());
    }
}
