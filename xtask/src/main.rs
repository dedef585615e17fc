//! The developer's commands. Everything that a fresh machine needs is set up here, and nowhere else.

mod bench;
mod build;
mod cluster;
mod demo;
mod images;
mod oci;
mod test;
mod tools;

use anyhow::Result;
use clap::Parser;

/// Builds, shows, tests and measures Loom weavers.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Command {
    /// Builds everything and runs the main scenario: a weaver, its shell, its database.
    Demo(demo::Options),
    /// Installs what the tests need and runs them all.
    Test(test::Options),
    /// Measures what docs/benchmarks.md reports.
    Bench(bench::Options),
    /// A real Kubernetes on this machine, as the tests use it.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Builds an image as an OCI archive, without Docker.
    Image(images::Options),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Cluster(command) => cluster::run(&command),
        Command::Image(options) => images::run(&options),
    }
}
