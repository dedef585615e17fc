//! `cargo xtask cluster`: a real Kubernetes on this machine, for a developer or for the tests.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Subcommand;
use loom_tests::cluster::{Cluster, kubectl, registry};

use crate::{build, images, tools};

/// Starts and stops a Kubernetes cluster on this machine.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Builds and starts the cluster; first removes an earlier one, or what is left of it.
    Up,
    /// Stops the cluster and removes everything it created.
    Down,
    /// Shows which parts are running.
    Status,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    let cluster = Cluster::new(&tools::directory());
    match command {
        Command::Up => {
            let cluster = up(&build::binaries(false)?)?;
            println!("\nThe cluster runs. To use it:");
            println!("  export KUBECONFIG={}", cluster.kubeconfig().display());
            println!("  alias kubectl='{} kubectl'", tools::directory().join("kube").display());
            println!("Images: {}", ["agent", "server", "weaver", "postgres"].map(registry::image).join(", "));
            println!("To end it: cargo xtask cluster down");
            Ok(())
        }
        Command::Down => cluster.down(),
        Command::Status => {
            let running = cluster.running();
            if running.is_empty() {
                bail!("no cluster runs; start one with: cargo xtask cluster up");
            }
            println!("parts that run: {}", running.join(", "));
            let kube = tools::directory().join("kube");
            print!("{}", kubectl(&kube, &cluster.kubeconfig(), &["get", "nodes,pods", "--all-namespaces"], "")?);
            Ok(())
        }
    }
}

/// Builds everything that a cluster consists of, and starts it with the images of these binaries.
fn up(binaries: &Path) -> Result<Cluster> {
    tools::for_cluster()?;
    let images = images::for_tests(binaries)?;
    let cluster = Cluster::new(&tools::directory());
    eprintln!("starting the cluster");
    cluster.up(&images)?;
    Ok(cluster)
}

/// A cluster that is stopped when dropped.
pub(crate) struct OwnedCluster(Cluster);

impl OwnedCluster {
    /// Builds and starts it.
    pub(crate) fn start(binaries: &Path) -> Result<Self> {
        up(binaries).map(Self)
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.0.kubeconfig()
    }
}

impl Drop for OwnedCluster {
    fn drop(&mut self) {
        if let Err(error) = self.0.down() {
            eprintln!("the cluster could not be removed: {error:#}");
        }
    }
}
