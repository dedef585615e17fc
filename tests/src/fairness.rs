//! One organisation's trouble beside another organisation's `loom new`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{System, Weaver};

/// How often a start is measured.
const STARTS: usize = 5;
/// What is forgiven besides: on a loaded machine with two cores a start of a fraction of a second takes that much more
/// or less by chance. One that waits for another organisation's would take seconds.
const NOISE: Duration = Duration::from_millis(500);

impl System {
    /// How long the user's `loom new` takes: the median of a few. Their weavers are deleted again.
    pub fn time_of_a_start(&self) -> Result<Duration> {
        let mut times = Vec::new();
        for _ in 0..STARTS {
            let start = Instant::now();
            let weaver = self.new_weaver(&[])?;
            times.push(start.elapsed());
            self.run(&["delete", "--yes", &weaver.id])?;
        }
        times.sort_unstable();
        Ok(times[STARTS / 2])
    }

    /// Has another user, in an organisation of their own, make many weavers, and does not wait for them.
    pub fn crowd(&self, token: &str, count: usize, body: &Value) -> Result<Vec<Weaver>> {
        let path = "/api/weavers".to_owned();
        let requests = vec![(token, "POST", path, body.to_string()); count];
        let answers = self.request_all(&requests)?;
        ensure!(answers.get(&201) == Some(&count), "making weavers: {answers:?}");
        self.weavers_of(token)?.iter().map(|weaver| Ok(Weaver { id: id(weaver)?.to_owned() })).collect()
    }

    /// What the API lists for a token.
    pub fn weavers_of(&self, token: &str) -> Result<Vec<Value>> {
        let answer = self.request(Some(token), "GET", "/api/weavers?limit=100", None)?;
        answer.body.as_array().cloned().with_context(|| format!("a list of weavers: {answer:?}"))
    }

    /// Deletes weavers.
    pub fn delete_all(&self, token: &str, weavers: &[Weaver]) -> Result<()> {
        let requests: Vec<_> = weavers
            .iter()
            .map(|weaver| (token, "DELETE", format!("/api/weavers/{}", weaver.id), String::new()))
            .collect();
        let answers = self.request_all(&requests)?;
        ensure!(answers.get(&204) == Some(&weavers.len()), "deleting weavers: {answers:?}");
        Ok(())
    }
}

/// Checks that a start beside another organisation's trouble took at most twice the time of one alone.
pub fn ensure_fair(alone: Duration, beside: Duration) -> Result<()> {
    eprintln!("loom new took {alone:?} alone and {beside:?} beside the trouble");
    ensure!(beside <= alone * 2 + NOISE, "loom new took {beside:?}, and {alone:?} alone");
    Ok(())
}

fn id(weaver: &Value) -> Result<&str> {
    weaver["id"].as_str().context("an id")
}
