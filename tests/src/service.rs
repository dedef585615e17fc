//! What an honest user gets of a server that somebody else troubles at the same time.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    System, Weaver,
    processes::{Memory, memory},
};

/// What an honest user or a probe may wait, the start of `loom` or `curl` included: a second, on a machine that also
/// attacks and may have other work. A server that is taken down does not answer at all.
pub const PROMPT: Duration = Duration::from_secs(3);

/// An honest user, who has a weaver, and what the server was like so far.
pub struct HonestUser<'a> {
    system: &'a System,
    weaver: &'a Weaver,
    /// The longest that anything took.
    pub slowest: Duration,
    /// The most memory that the server had resident, in bytes.
    pub most_memory: u64,
}

impl<'a> HonestUser<'a> {
    pub fn new(system: &'a System, weaver: &'a Weaver) -> Self {
        Self { system, weaver, slowest: Duration::ZERO, most_memory: 0 }
    }

    /// Lists weavers, runs a program in one by SSH, and probes the server.
    pub fn work(&mut self) -> Result<()> {
        let (system, weaver) = (self.system, self.weaver);
        self.timed("loom ps", || system.run(&["ps"]).map(drop))?;
        self.timed("loom ssh", || system.run(&["ssh", &weaver.id, "--", "true"]).map(drop))?;
        self.timed("the probe", || {
            let answer = system.request(None, "GET", "/readyz", None)?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })?;
        self.most_memory = self.most_memory.max(system.server_memory()?.resident);
        Ok(())
    }

    /// The same over and over for a time.
    pub fn work_for(&mut self, time: Duration) -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < time {
            self.work()?;
        }
        Ok(())
    }

    fn timed(&mut self, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        act().with_context(|| format!("{what} while the server is troubled"))?;
        self.slowest = self.slowest.max(start.elapsed());
        Ok(())
    }
}

impl System {
    /// How much memory the server takes.
    pub fn server_memory(&self) -> Result<Memory> {
        self.server_pid().and_then(memory).context("the server has gone")
    }

    /// The size of the server's database in bytes, its journal included.
    pub fn database_size(&self) -> Result<u64> {
        let mut size = 0;
        for entry in fs::read_dir(self.path("data"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("loom.db") {
                size += entry.metadata()?.len();
            }
        }
        Ok(size)
    }
}
