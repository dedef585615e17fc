//! Settings of the listener.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// Connections that one address may have. A user's laptop has a handful, and WebSockets do not count, so an office
/// behind one address fits; 256 connections that do nothing take about 8 MiB.
const CONNECTIONS_PER_ADDRESS: usize = 256;
/// Connections in all: three for each of 2,000 weavers and as much again for users. Each takes about 32 KiB while it
/// sends a request, so all of them at once stay within 256 MiB.
const CONNECTIONS: usize = 8192;
/// File descriptors for everything that is no connection: the database, the log, the backend's requests, local weavers.
const OTHER_FILES: usize = 256;

/// What was given of them.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case", default)]
pub struct Settings {
    /// The most connections of one address, or IPv6 /64, at a time; WebSockets do not count. [default: 256]
    #[arg(long, env = "LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N", global = true)]
    max_connections_per_address: Option<usize>,
    /// The most connections at a time, WebSockets included. [default: 8192, or what the limit of open files allows]
    #[arg(long, env = "LOOM_SERVER_MAX_CONNECTIONS", value_name = "N", global = true)]
    max_connections: Option<usize>,
    /// Networks of proxies in front of the server, which say who their clients are. [default: none]
    #[arg(
        long,
        env = "LOOM_SERVER_TRUSTED_PROXIES",
        value_name = "ADDRESS[/PREFIX]",
        value_delimiter = ',',
        global = true
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    trusted_proxies: Vec<IpNetwork>,
    /// How trusted proxies say who their client is. [default: x-forwarded-for]
    #[arg(long, env = "LOOM_SERVER_PROXIES_SEND", value_enum, global = true)]
    proxies_send: Option<ProxySays>,
}

/// How a proxy says who its client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProxySays {
    /// In the header X-Forwarded-For of each request.
    #[default]
    XForwardedFor,
    /// In a PROXY protocol header, version 1 or 2, at the start of each connection.
    ProxyProtocol,
}

/// The settings in force.
#[derive(Debug, Clone)]
pub struct Config {
    /// The most connections of one address.
    pub max_connections_per_address: usize,
    /// The most connections of all.
    pub max_connections: usize,
    /// Networks of proxies that are believed.
    pub trusted_proxies: Vec<IpNetwork>,
    /// What they send.
    pub proxies_send: ProxySays,
}

impl Settings {
    /// Checks the settings and adds defaults.
    ///
    /// # Errors
    ///
    /// Says which setting is wrong, and why.
    pub fn resolve(self) -> Result<Config> {
        let per_address = self.max_connections_per_address.unwrap_or(CONNECTIONS_PER_ADDRESS);
        ensure!(per_address > 0, "max-connections-per-address must be above zero");
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
        // Beyond the limit of open files nobody is served, so the table must be full before.
        let possible = files.saturating_sub(OTHER_FILES).max(files / 2);
        let all = match self.max_connections {
            Some(wanted) => {
                ensure!(wanted > 0, "max-connections must be above zero");
                ensure!(
                    wanted <= possible,
                    "max-connections is {wanted}, but with at most {files} open files there can be {possible}: raise the \
                     limit (LimitNOFILE= in systemd, ulimit -n in a shell)"
                );
                wanted
            }
            None => CONNECTIONS.min(possible),
        };
        Ok(Config {
            max_connections_per_address: per_address,
            max_connections: all,
            trusted_proxies: self.trusted_proxies,
            proxies_send: self.proxies_send.unwrap_or_default(),
        })
    }
}

impl Config {
    /// Whether what an address says about its clients is believed.
    pub(super) fn trusts(&self, address: std::net::IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(address))
    }
}
