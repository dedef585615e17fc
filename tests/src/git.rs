//! A git repository on this machine, served by git's own daemon where weavers reach it.

use std::{
    fs,
    net::TcpStream,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    System, cluster,
    system::{TIMEOUT, free_port},
    wait::eventually,
};

/// A repository with the branches `main` and `feature`, each with a `README` that names it.
pub struct Repository {
    daemon: Child,
    url: String,
}

impl Repository {
    /// Makes one in the system's directory, and serves it.
    pub fn serve(system: &System) -> Result<Self> {
        let base = system.path("repositories");
        let at = base.join("project");
        fs::create_dir_all(&at)?;
        let script = "set -e; git init -q -b main .; echo 'on main' > README; git add README; git commit -q -m first; \
                      git checkout -q -b feature; echo 'on feature' > README; git commit -q -a -m second; \
                      git checkout -q main";
        let status = Command::new("sh")
            .args(["-c", script])
            .envs(["GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"].map(|name| (name, "Test")))
            .envs(["GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"].map(|name| (name, "test@example.org")))
            .current_dir(&at)
            .status()?;
        ensure!(status.success(), "making a repository failed");
        let address = if system.namespace().is_some() { cluster::NODE } else { "127.0.0.1" };
        let port = free_port()?;
        // Not `git daemon`, whose end would leave the daemon running.
        let programs = String::from_utf8(Command::new("git").arg("--exec-path").output()?.stdout)?;
        let daemon = Command::new(format!("{}/git-daemon", programs.trim()))
            .args(["--export-all", "--reuseaddr", "--log-destination=none"])
            .arg(format!("--listen={address}"))
            .arg(format!("--port={port}"))
            .arg(format!("--base-path={}", base.display()))
            .arg(&base)
            // It refuses another user's repository.
            .envs([("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "safe.directory"), ("GIT_CONFIG_VALUE_0", "*")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting git daemon")?;
        let repository = Self { daemon, url: format!("git://{address}:{port}/project") };
        eventually("git's daemon", TIMEOUT, || Ok(TcpStream::connect((address, port)).is_ok().then_some(())))?;
        Ok(repository)
    }

    /// Where it is cloned from.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Drop for Repository {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}
