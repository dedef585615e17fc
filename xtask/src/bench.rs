//! `cargo xtask bench`: builds for release and measures.

use anyhow::{Result, ensure};
use clap::Args;

use crate::{build, tools};

/// Measures, and prints a table for docs/benchmarks.md.
#[derive(Args)]
pub(crate) struct Options {
    /// Only measurements whose names contain this.
    filter: Option<String>,
}

/// Builds the release binaries and runs the measuring program among them.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_tests()?;
    let binaries = build::binaries(true)?;
    let status = std::process::Command::new(binaries.join("loom-bench")).args(&options.filter).status()?;
    ensure!(status.success(), "the measurements failed");
    Ok(())
}
