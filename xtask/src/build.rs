//! Building the product, and running cargo.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ is in the repository")
}

/// Runs cargo in the repository, with more variables in its environment.
pub(crate) fn cargo(arguments: &[&str], env: &[(&str, &str)]) -> Result<()> {
    eprintln!("$ cargo {}", arguments.join(" "));
    let mut command = Command::new(env!("CARGO"));
    // The variables that cargo sets for this program would make build scripts run again.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name.to_string_lossy().starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    let status =
        command.args(arguments).envs(env.iter().copied()).current_dir(root()).status().context("starting cargo")?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}

/// Builds the three binaries; the directory that they are in.
pub(crate) fn binaries(release: bool) -> Result<PathBuf> {
    let mut arguments = vec!["build", "--workspace", "--bins"];
    if release {
        arguments.push("--release");
    }
    cargo(&arguments, &[])?;
    // This program runs from the directory of the profile that it was built with: target/<host>/debug.
    let running = std::env::current_exe()?;
    let host = running.parent().and_then(Path::parent).context("xtask does not run from a target directory")?;
    Ok(host.join(if release { "release" } else { "debug" }))
}

/// The target directory, where tools are kept too.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}
