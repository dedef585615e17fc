//! The sidecar's settings: environment variables set by the provisioner, all checked before anything starts.

use std::{
    ffi::OsString,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::{Context as _, ensure};
use loom_api::{WeaverId, client::Client};

/// All settings. Any other variable that begins with `LOOM_` is an error.
const KNOWN: [&str; 9] = [
    "LOOM_WEAVER_ID",
    "LOOM_SERVER_URL",
    "LOOM_SERVER_CA",
    "LOOM_CREDENTIAL_FILE",
    "LOOM_RUN_DIR",
    "LOOM_HOST_PID",
    "LOOM_WORKSPACE_DIR",
    "LOOM_UDP_BIND",
    "LOOM_FILE_REPOSITORIES",
];

pub(crate) struct Config {
    pub(crate) weaver: WeaverId,
    /// A client without a token.
    pub(crate) server: Client,
    /// Contains the credential for registration; Kubernetes replaces it from time to time.
    pub(crate) credential_file: PathBuf,
    /// The directory of the host's socket.
    pub(crate) run_dir: PathBuf,
    /// The host's process id, on backends where the sidecar can see it.
    pub(crate) host_pid: Option<i32>,
    /// The workspace's path in the sidecar's file system.
    pub(crate) workspace_dir: PathBuf,
    /// Local addresses for UDP; if empty, the weaver is reached only over the relay.
    pub(crate) udp: Vec<SocketAddr>,
    /// Directories that `file://` repositories may be in; empty except on the local backend.
    pub(crate) file_repositories: Vec<PathBuf>,
}

impl Config {
    /// Reads the settings from the environment.
    ///
    /// # Errors
    ///
    /// When a variable is missing, unknown, or invalid.
    pub(crate) fn from_env(env: impl IntoIterator<Item = (OsString, OsString)>) -> anyhow::Result<Self> {
        let mut found = Vec::new();
        for (name, value) in env {
            let Some(name) = name.to_str().filter(|name| name.starts_with("LOOM_")) else { continue };
            // Kubernetes adds variables for the services in the namespace, named after them.
            if name.contains("_SERVICE_") || name.contains("_PORT") {
                continue;
            }
            ensure!(KNOWN.contains(&name), "{name} is not a setting of the sidecar");
            let value = value.into_string().map_err(|_| anyhow::anyhow!("{name} is not text"))?;
            found.push((name.to_owned(), value));
        }
        let get = |name: &str| found.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
        let need =
            |name: &str| get(name).filter(|value| !value.is_empty()).with_context(|| format!("{name} is not set"));
        Ok(Self {
            weaver: need("LOOM_WEAVER_ID")?.parse().context("LOOM_WEAVER_ID")?,
            server: Client::with_ca_certificates(
                need("LOOM_SERVER_URL")?,
                None,
                get("LOOM_SERVER_CA").unwrap_or_default(),
            )
            .context("LOOM_SERVER_URL")?,
            credential_file: need("LOOM_CREDENTIAL_FILE")?.into(),
            run_dir: need("LOOM_RUN_DIR")?.into(),
            host_pid: get("LOOM_HOST_PID").map(str::parse).transpose().context("LOOM_HOST_PID")?,
            workspace_dir: need("LOOM_WORKSPACE_DIR")?.into(),
            udp: udp_addresses(get("LOOM_UDP_BIND"))?,
            file_repositories: get("LOOM_FILE_REPOSITORIES")
                .map(|list| std::env::split_paths(list).collect())
                .unwrap_or_default(),
        })
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "weaver {} server {} credential {} run {} workspace {} udp {:?}",
            self.weaver,
            self.server.base(),
            self.credential_file.display(),
            self.run_dir.display(),
            self.workspace_dir.display(),
            self.udp,
        )
    }
}

/// `off`, or addresses separated by commas; by default any port on all interfaces.
fn udp_addresses(setting: Option<&str>) -> anyhow::Result<Vec<SocketAddr>> {
    match setting {
        None | Some("") => Ok(vec![(Ipv4Addr::UNSPECIFIED, 0).into(), (Ipv6Addr::UNSPECIFIED, 0).into()]),
        Some("off") => Ok(Vec::new()),
        Some(list) => list
            .split(',')
            .map(|address| {
                let address = address.trim();
                address.parse().with_context(|| format!("LOOM_UDP_BIND: {address:?} is not IP:PORT"))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEAVER: &str = "W-01930000-0000-7000-8000-000000000000";

    fn read(changes: &[(&str, Option<&str>)]) -> anyhow::Result<Config> {
        let mut env = vec![
            ("LOOM_WEAVER_ID", WEAVER),
            ("LOOM_SERVER_URL", "http://127.0.0.1:1"),
            ("LOOM_CREDENTIAL_FILE", "sidecar/token"),
            ("LOOM_RUN_DIR", "run"),
            ("LOOM_WORKSPACE_DIR", "workspace"),
            ("PATH", "/bin"),
            ("LOOM_SERVER_SERVICE_HOST", "10.0.0.1"),
            ("LOOM_SERVER_PORT_443_TCP", "tcp://10.0.0.1:443"),
        ];
        for (name, value) in changes {
            env.retain(|(known, _)| known != name);
            env.extend(value.map(|value| (*name, value)));
        }
        Config::from_env(env.into_iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let config = read(&[]).unwrap();
        assert_eq!(config.weaver.to_string(), WEAVER);
        assert_eq!(config.udp, ["0.0.0.0:0".parse().unwrap(), "[::]:0".parse().unwrap()]);
        assert!(config.file_repositories.is_empty());
    }

    #[test]
    fn udp_can_be_off_or_listed() {
        assert!(read(&[("LOOM_UDP_BIND", Some("off"))]).unwrap().udp.is_empty());
        let listed = read(&[("LOOM_UDP_BIND", Some("127.0.0.1:7, [::1]:8"))]).unwrap().udp;
        assert_eq!(listed, ["127.0.0.1:7".parse().unwrap(), "[::1]:8".parse().unwrap()]);
    }

    #[test]
    fn mistakes_are_named() {
        for (name, value) in [
            ("LOOM_WEAVER_ID", None),
            ("LOOM_WEAVER_ID", Some("x")),
            ("LOOM_SERVER_URL", Some("http://example.org")),
            ("LOOM_CREDENTIAL_FILE", Some("")),
            ("LOOM_RUN_DIR", None),
            ("LOOM_WORKSPACE_DIR", None),
            ("LOOM_UDP_BIND", Some("everywhere")),
            ("LOOM_ALLOW_FILE_CLONE", Some("yes")),
            ("LOOM_UDP_BIN", Some("off")),
        ] {
            let error = read(&[(name, value)]).err().map(|error| format!("{error:#}"));
            assert!(error.as_deref().is_some_and(|error| error.contains(name)), "{name} {value:?}: {error:?}");
        }
    }
}
