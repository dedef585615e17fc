//! `cargo xtask bench`: builds for release and measures.

use std::process::Command;

use anyhow::{Result, ensure};
use clap::Args;

use crate::{build, cluster, tools};

/// Measures, and prints a table for docs/benchmarks.md.
#[derive(Args)]
pub(crate) struct Options {
    /// Only measurements whose names contain this. `kubernetes` for those on a cluster, and `server` for what one server
    /// holds, are run only when they are asked for.
    filter: Option<String>,
}

/// Builds the release binaries and runs the measuring program among them.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_tests()?;
    let binaries = build::binaries(true)?;
    let mut bench = Command::new(binaries.join("loom-bench"));
    bench.args(&options.filter);
    let cluster = if options.filter.as_deref().is_some_and(|filter| filter.starts_with("kubernetes")) {
        tools::kwok()?;
        let cluster = cluster::OwnedCluster::start(&binaries)?;
        bench.env("KUBECONFIG", cluster.kubeconfig());
        Some(cluster)
    } else {
        None
    };
    let status = bench.status()?;
    drop(cluster);
    ensure!(status.success(), "the measurements failed");
    Ok(())
}
