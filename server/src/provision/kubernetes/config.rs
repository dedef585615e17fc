//! Settings of the Kubernetes backend.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loom_api::weaver::ResourceSpec;
use serde::{Deserialize, Serialize};

use super::registry::Authority;

/// The image that is made for weavers.
pub const DEFAULT_IMAGE: &str = "ghcr.io/ghuntley/loom/weaver:latest";

/// What was given.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// The namespace of the weavers' pods. [default: loom-weavers]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_NAMESPACE", value_name = "NAME", global = true)]
    kubernetes_namespace: Option<String>,
    /// The image with the agent, at /usr/local/bin/loom-agent.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_IMAGE", value_name = "IMAGE", global = true)]
    kubernetes_agent_image: Option<String>,
    /// Where agents in pods reach the server. [default: the public URL]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_URL", value_name = "URL", global = true)]
    kubernetes_agent_url: Option<String>,
    /// Certificate authorities, in PEM, that agents trust for the server besides the public ones.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_AGENT_CA", value_name = "FILE", global = true)]
    kubernetes_agent_ca: Option<PathBuf>,
    /// Secrets to pull images with.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_PULL_SECRETS", value_name = "NAME")]
    #[arg(value_delimiter = ',', global = true)]
    kubernetes_pull_secrets: Option<Vec<String>>,
    /// Registries that are asked over plain HTTP, as HOST or HOST:PORT.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_PLAIN_HTTP_REGISTRIES", value_name = "HOST")]
    #[arg(value_delimiter = ',', global = true)]
    kubernetes_plain_http_registries: Option<Vec<String>>,
    /// Registries and their token servers that images are read from though they have no public address, as HOST or
    /// HOST:PORT. Those over plain HTTP need not be named again.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_PRIVATE_REGISTRIES", value_name = "HOST")]
    #[arg(value_delimiter = ',', global = true)]
    kubernetes_private_registries: Option<Vec<String>>,
    /// Labels of the nodes that weavers run on.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_NODE_SELECTOR", value_name = "KEY=VALUE")]
    #[arg(value_delimiter = ',', global = true)]
    kubernetes_node_selector: Option<Vec<String>>,
    /// Taints that weavers tolerate, as KEY[=VALUE]:EFFECT.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_TOLERATIONS", value_name = "TAINT")]
    #[arg(value_delimiter = ',', global = true)]
    kubernetes_tolerations: Option<Vec<String>>,
    /// The CPU that a weaver is guaranteed, out of its limit. [default: 500]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", value_name = "N", global = true)]
    kubernetes_request_cpu_millicores: Option<u32>,
    /// The memory that a weaver is guaranteed, in MiB, out of its limit. [default: 512]
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", value_name = "N", global = true)]
    kubernetes_request_memory_mb: Option<u32>,
    /// The runtime class of weavers' pods.
    #[arg(long, env = "LOOM_SERVER_KUBERNETES_RUNTIME_CLASS", value_name = "NAME", global = true)]
    kubernetes_runtime_class: Option<String>,
}

/// The settings in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
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
    pub plain_http_registries: Vec<Authority>,
    /// Registries that are asked though they have no public address.
    pub private_registries: Vec<Authority>,
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

impl Settings {
    /// Checks the settings, and fills in the defaults.
    ///
    /// # Errors
    ///
    /// Says which setting is wrong or missing.
    pub(crate) fn resolve(self, public_url: Option<&str>, agent_udp: bool) -> Result<Config> {
        let agent_url = self.kubernetes_agent_url.or_else(|| public_url.map(str::to_owned)).context(
            "the Kubernetes backend needs to know where pods reach the server: set kubernetes-agent-url or public-url",
        )?;
        ensure!(agent_url.starts_with("https://"), "{agent_url}: pods reach the server over https:// only");
        let label = |text: &String| {
            let (key, value) = text.split_once('=').with_context(|| format!("{text:?} is not KEY=VALUE"))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        Ok(Config {
            namespace: self.kubernetes_namespace.unwrap_or_else(|| "loom-weavers".to_owned()),
            agent_image: self
                .kubernetes_agent_image
                .context("the Kubernetes backend needs the image with the agent: set kubernetes-agent-image")?,
            agent_url,
            agent_ca: self.kubernetes_agent_ca,
            pull_secrets: self.kubernetes_pull_secrets.unwrap_or_default(),
            plain_http_registries: parsed(self.kubernetes_plain_http_registries)?,
            private_registries: parsed(self.kubernetes_private_registries)?,
            agent_udp,
            node_selector: self.kubernetes_node_selector.iter().flatten().map(label).collect::<Result<_>>()?,
            tolerations: parsed(self.kubernetes_tolerations)?,
            requests: ResourceSpec {
                cpu_millicores: self.kubernetes_request_cpu_millicores.unwrap_or(500),
                memory_mb: self.kubernetes_request_memory_mb.unwrap_or(512),
            },
            runtime_class: self.kubernetes_runtime_class,
        })
    }
}

fn parsed<T: FromStr<Err = anyhow::Error>>(list: Option<Vec<String>>) -> Result<Vec<T>> {
    list.iter().flatten().map(|text| text.parse()).collect()
}

/// A taint of nodes, as `kubectl taint` writes it: `KEY[=VALUE]:EFFECT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taint {
    /// The key.
    pub key: String,
    /// The value; without one, any value matches.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_are_written_as_kubectl_writes_them() {
        let taint = |text: &str| text.parse::<Taint>().map(|taint| (taint.key, taint.value, taint.effect));
        assert_eq!(taint("gpu=yes:NoSchedule").unwrap(), ("gpu".into(), Some("yes".into()), "NoSchedule".into()));
        assert_eq!(taint("gpu:NoExecute").unwrap(), ("gpu".into(), None, "NoExecute".into()));
        assert!(taint("gpu").is_err() && taint("gpu:Never").is_err() && taint(":NoExecute").is_err());
    }
}
