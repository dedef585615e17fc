//! A real Kubernetes on this machine: one node with etcd, the control plane, kubelet, containerd and CNI, and a registry
//! with the images that tests need.
//!
//! There is one per machine, in [`DIRECTORY`], because ports, bridges and addresses are the machine's. [`Cluster::up`]
//! first removes what an earlier one left, even after a crash: it finds processes by their id *and* start time, and the
//! leftovers of containers by mounts and interfaces. It needs root. `cargo xtask cluster` starts one for developers, and
//! `cargo xtask test` one for the tests, which find it by `KUBECONFIG`; that may also name another cluster.

mod leftovers;
mod parts;
pub(crate) mod pki;
pub mod registry;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{processes, wait::eventually};
use parts::Part;

/// The cluster's directory. Short, because paths of unix sockets must be.
pub const DIRECTORY: &str = "/var/lib/loom-cluster";
/// The node's address, on its own bridge, because it must not be loopback.
pub const NODE: &str = "10.86.0.1";
/// An address of this machine that acts as the world outside the cluster (RFC 5737, TEST-NET-2).
pub const OUTSIDE: &str = "198.51.100.7";
/// The pods' addresses.
const PODS: &str = "10.85.0.0/16";
/// The services' addresses; the first is the API server's.
const SERVICES: &str = "10.96.0.0/16";
/// The bridge with the node's address.
const NODE_BRIDGE: &str = "loomnode0";
/// The pods' bridge.
const POD_BRIDGE: &str = "loompods0";
const API_PORT: u16 = 16443;
/// For each part to start.
const TIMEOUT: Duration = Duration::from_secs(90);

/// The cluster of this machine.
#[derive(Debug, Clone)]
pub struct Cluster {
    directory: PathBuf,
    /// Where the programs are that `cargo xtask cluster` builds.
    tools: PathBuf,
}

impl Cluster {
    /// The cluster of this machine, which need not run; `tools` holds what `cargo xtask cluster` builds.
    #[must_use]
    pub fn new(tools: &Path) -> Self {
        Self { directory: DIRECTORY.into(), tools: tools.to_owned() }
    }

    /// Starts it, and waits until pods can be made. `images` are OCI archives; an archive `dir/NAME.tar` is pushed to
    /// the registry as [`registry::image`]`("NAME")`, and one whose name begins with `private-` to the registry that
    /// asks for a password.
    pub fn up(&self, images: &[PathBuf]) -> Result<()> {
        ensure!(processes::am_root(), "only root can run a cluster on this machine");
        self.down()?;
        for directory in ["pki", "run", "log", "cni", "containerd", "kubelet", "etcd", "registry", "hosts"] {
            fs::create_dir_all(self.path(directory))?;
        }
        self.network()?;
        pki::make(&self.path("pki"))?;
        self.write_settings()?;
        registry::start(self, images)?;
        for part in parts::CONTROL_PLANE {
            self.start(part)?;
        }
        eventually("the API server", TIMEOUT, || {
            self.check_parts()?;
            Ok(self.try_kubectl(&["get", "--raw", "/readyz"]).is_ok().then_some(()))
        })?;
        for part in parts::WORKERS {
            self.start(part)?;
        }
        eventually("the node", TIMEOUT, || {
            self.check_parts()?;
            let nodes = self.try_kubectl(&["get", "nodes", "--no-headers"]).unwrap_or_default();
            Ok(nodes.split_whitespace().any(|word| word == "Ready").then_some(()))
        })?;
        for part in parts::NETWORK {
            self.start(part)?;
        }
        eventually("services and network policies", TIMEOUT, || {
            self.check_parts()?;
            let rules = Command::new("iptables-save").output()?.stdout;
            let rules = String::from_utf8_lossy(&rules);
            Ok(["KUBE-SERVICES", "KUBE-ROUTER-FORWARD"].iter().all(|chain| rules.contains(chain)).then_some(()))
        })
    }

    /// Stops it, and removes everything it created.
    pub fn down(&self) -> Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        for name in ["proxy", "policies", "kubelet", "scheduler", "controller-manager", "apiserver", "etcd"] {
            parts::stop(&self.path("run"), name)?;
        }
        // Containers outlive containerd, by design.
        leftovers::end_containers(&self.directory);
        for name in ["containerd", "registry", "private-registry"] {
            parts::stop(&self.path("run"), name)?;
        }
        leftovers::remove(&self.directory, &[NODE_BRIDGE, POD_BRIDGE], PODS)
    }

    /// The parts that run, by name.
    #[must_use]
    pub fn running(&self) -> Vec<String> {
        parts::running(&self.path("run"))
    }

    /// Where its kubeconfig is.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// Kills one part, as in a crash.
    pub fn kill(&self, part: &str) -> Result<()> {
        parts::stop(&self.path("run"), part)
    }

    /// Restarts a part that was killed.
    pub fn restart(&self, part: &str) -> Result<()> {
        let all = parts::CONTROL_PLANE.iter().chain(parts::WORKERS).chain(parts::NETWORK);
        let part = all.into_iter().find(|known| known.name == part).context("no such part")?;
        self.start(part)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn start(&self, part: &Part) -> Result<()> {
        let mut command = match part.name {
            "containerd" => Command::new("containerd"),
            "policies" => Command::new(self.tools.join("kube-router")),
            name => {
                let mut command = Command::new(self.tools.join("kube"));
                command.arg(name);
                command
            }
        };
        command.args((part.arguments)(&self.directory.to_string_lossy()));
        parts::spawn(&self.directory, part.name, &mut command)
    }

    fn check_parts(&self) -> Result<()> {
        let running = self.running();
        for part in parts::started(&self.path("run")) {
            if !running.contains(&part) {
                let log = fs::read_to_string(self.path("log").join(format!("{part}.log"))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                bail!("{part} ended:\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            }
        }
        Ok(())
    }

    fn try_kubectl(&self, arguments: &[&str]) -> Result<String> {
        kubectl(&self.tools.join("kube"), &self.kubeconfig(), arguments, "")
    }

    fn network(&self) -> Result<()> {
        run("ip", &["link", "add", NODE_BRIDGE, "type", "bridge"])?;
        run("ip", &["address", "add", &format!("{NODE}/32"), "dev", NODE_BRIDGE])?;
        run("ip", &["address", "add", &format!("{OUTSIDE}/32"), "dev", NODE_BRIDGE])?;
        run("ip", &["link", "set", NODE_BRIDGE, "up"])?;
        // Pods reach the world by the machine's own address.
        let mut rule = vec!["-t", "nat", "-A", "POSTROUTING"];
        rule.extend(leftovers::masquerade(PODS));
        run("iptables", &rule)
    }

    fn write_settings(&self) -> Result<()> {
        let directory = self.directory.display();
        for (name, certificate) in [
            ("admin", "admin"),
            ("kubelet", "node"),
            ("controller-manager", "controllers"),
            ("scheduler", "scheduler"),
            ("proxy", "proxy"),
        ] {
            let text = format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: loom\n\
                 clusters: [{{name: loom, cluster: {{server: \"https://127.0.0.1:{API_PORT}\", certificate-authority: {directory}/pki/ca.crt}}}}]\n\
                 users: [{{name: loom, user: {{client-certificate: {directory}/pki/{certificate}.crt, client-key: {directory}/pki/{certificate}.key}}}}]\n\
                 contexts: [{{name: loom, context: {{cluster: loom, user: loom}}}}]\n"
            );
            fs::write(self.path(&format!("{name}.kubeconfig")), text)?;
        }
        fs::write(self.path("containerd.toml"), parts::containerd_settings(&directory.to_string()))?;
        fs::write(self.path("kubelet.yaml"), parts::kubelet_settings(&directory.to_string()))?;
        fs::write(self.path("cni/10-loom.conflist"), parts::cni_settings(&directory.to_string()))?;
        Ok(())
    }
}

/// Runs kubectl; what it printed.
pub fn kubectl(kube: &Path, kubeconfig: &Path, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = Command::new(kube);
    command.arg("kubectl").arg("--kubeconfig").arg(kubeconfig).args(arguments);
    let output = crate::system::output_with_input(command, input.as_bytes())?;
    ensure!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("starting {program}"))?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
