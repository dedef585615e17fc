//! `cargo xtask test`: every test of the repository.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use loom_tests::system::BACKEND;

use crate::{build, cluster, tools};

/// The end-to-end tests of what users do, which run on both backends.
const BOTH: [&str; 6] = ["attach", "interop", "lifecycle", "resilience", "ssh", "tunnel"];
/// Those that need the local backend, or no backend at all.
const LOCAL: [&str; 8] = ["addresses", "api", "full_disk", "identity", "isolation", "login", "revocation", "strangers"];
/// Names the cluster for the tests; when it is not set, they get one of their own.
const KUBECONFIG: &str = "KUBECONFIG";

/// Runs all tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain this.
    filter: Option<String>,
    /// Leaves out what needs a Kubernetes cluster, which only an administrator can start.
    #[arg(long)]
    no_cluster: bool,
}

/// Installs, builds, tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_tests()?;
    let binaries = build::binaries(false)?;
    let filter = options.filter.as_deref();
    let end_to_end = |names: &[&'static str]| {
        [
            &["test", "--package", "loom-tests"],
            names.iter().flat_map(|name| ["--test", *name]).collect::<Vec<_>>().as_slice(),
        ]
        .concat()
    };
    if options.no_cluster {
        test(&["test", "--workspace", "--exclude", "loom-tests"], filter, &[])?;
        test(&end_to_end(&[&BOTH[..], &LOCAL].concat()), filter, &[])?;
    } else {
        let named = std::env::var_os(KUBECONFIG).filter(|path| !path.is_empty()).map(PathBuf::from);
        let own = if named.is_none() { Some(cluster::Own::start(&binaries)?) } else { None };
        let kubeconfig = named.or(own.as_ref().map(cluster::Own::kubeconfig)).unwrap_or_default();
        let kubeconfig = kubeconfig.to_string_lossy();
        test(&["test", "--workspace"], filter, &[(KUBECONFIG, &kubeconfig)])?;
        test(&end_to_end(&BOTH), filter, &[(KUBECONFIG, &kubeconfig), (BACKEND, "kubernetes")])?;
    }
    // The simulator stops the clock, which no binary may be built with: a run of its own.
    test(&["test", "--package", "loom-tunnel", "--features", "simulated-time", "--test", "simulation"], filter, &[])
}

fn test(arguments: &[&str], filter: Option<&str>, env: &[(&str, &str)]) -> Result<()> {
    let mut arguments = arguments.to_vec();
    if let Some(filter) = filter {
        if !arguments.contains(&"--test") {
            arguments.push("--tests");
        }
        arguments.extend(["--", filter]);
    }
    build::cargo(&arguments, env)
}
