//! `cargo xtask test`: every test of the repository.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::Args;
use loom_tests::system::BACKEND;

use crate::{build, cluster, tools};

/// The end-to-end tests of what users do, which run on both backends.
const BOTH_BACKENDS: [&str; 6] = ["attach", "interop", "lifecycle", "resilience", "ssh", "tunnel"];
/// Those that need a cluster, or a tool that only root can install.
const NOT_LOCAL: [&str; 4] = ["deploy", "kubernetes", "nix", "outage"];
/// Names the cluster for the tests; if it is not set, they start one.
const KUBECONFIG: &str = "KUBECONFIG";

/// Runs all tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain this.
    filter: Option<String>,
    /// Leaves out tests that need a Kubernetes cluster, which only root can start.
    #[arg(long)]
    no_cluster: bool,
}

/// Installs, builds, tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_tests()?;
    let binaries = build::binaries(false)?;
    let filter = options.filter.as_deref();
    let end_to_end = |names: &[&str]| -> Vec<String> {
        let names = names.iter().flat_map(|name| ["--test", name]);
        ["test", "--package", "loom-tests"].into_iter().chain(names).map(ToOwned::to_owned).collect()
    };
    if options.no_cluster {
        test(&["test", "--workspace", "--exclude", "loom-tests"], filter, &[])?;
        let all = all_end_to_end()?;
        let local: Vec<_> = all.iter().map(String::as_str).filter(|name| !NOT_LOCAL.contains(name)).collect();
        test(&end_to_end(&local), filter, &[])?;
    } else {
        let named = std::env::var_os(KUBECONFIG).filter(|path| !path.is_empty()).map(PathBuf::from);
        let own = if named.is_none() { Some(cluster::OwnedCluster::start(&binaries)?) } else { None };
        let kubeconfig = named.or(own.as_ref().map(cluster::OwnedCluster::kubeconfig)).unwrap_or_default();
        let kubeconfig = kubeconfig.to_string_lossy();
        test(&["test", "--workspace"], filter, &[(KUBECONFIG, &kubeconfig)])?;
        test(&end_to_end(&BOTH_BACKENDS), filter, &[(KUBECONFIG, &kubeconfig), (BACKEND, "kubernetes")])?;
    }
    // The simulator stops the clock, which no binary may be built with: a run of its own.
    test(&["test", "--package", "loom-tunnel", "--features", "simulated-time", "--test", "simulation"], filter, &[])
}

/// The names of all end-to-end tests.
fn all_end_to_end() -> Result<Vec<String>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn test(arguments: &[impl AsRef<str>], filter: Option<&str>, env: &[(&str, &str)]) -> Result<()> {
    let mut arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    if let Some(filter) = filter {
        if !arguments.contains(&"--test") {
            arguments.push("--tests");
        }
        arguments.extend(["--", filter]);
    }
    build::cargo(&arguments, env)
}
