//! `cargo xtask test`: every test of the repository.

use anyhow::Result;
use clap::Args;

use crate::{build, tools};

/// Runs all tests.
#[derive(Args)]
pub(crate) struct Options {
    /// Only end-to-end tests whose names contain this.
    filter: Option<String>,
}

/// Installs, builds, tests.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_tests()?;
    build::binaries(false)?;
    if let Some(filter) = &options.filter {
        return build::cargo(&["test", "--workspace", "--tests", "--", filter]);
    }
    build::cargo(&["test", "--workspace"])?;
    // The simulator stops the clock, which no binary may be built with: a run of its own.
    build::cargo(&["test", "--package", "loom-tunnel", "--features", "simulated-time", "--test", "simulation"])
}
