//! Programs that `cargo xtask` builds for the tests, in `target/tools`.

use std::path::PathBuf;

use anyhow::{Result, ensure};

/// The path of a program.
pub fn find(name: &str) -> Result<PathBuf> {
    let mut directory = std::env::current_exe()?;
    let tools = loop {
        ensure!(directory.pop(), "the test does not run from a target directory");
        let tools = directory.join("tools");
        if tools.is_dir() {
            break tools;
        }
    };
    let program = tools.join(name);
    ensure!(program.exists(), "{} is missing: run `cargo xtask test`", program.display());
    Ok(program)
}
