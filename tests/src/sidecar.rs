//! A weaver's sidecar on the local backend, by its log.

use std::{collections::BTreeSet, fs};

use anyhow::{Context as _, Result};

use crate::{System, Weaver, eventually, system::TIMEOUT};

/// Stands in the first line that a sidecar logs.
const START: &str = "sidecar: settings: ";

impl System {
    fn sidecar_log(&self, weaver: &Weaver) -> Result<String> {
        fs::read_to_string(self.weaver_directory(weaver).join("pod.log")).context("the weaver's log")
    }

    /// Kills a weaver's sidecar, and waits until its supervisor has started another one.
    pub fn restart_sidecar(&self, weaver: &Weaver) -> Result<()> {
        let starts = || Ok::<_, anyhow::Error>(self.sidecar_log(weaver)?.matches(START).count());
        let before = starts()?;
        self.sidecar(weaver)?.kill();
        eventually("another sidecar", TIMEOUT, || Ok((starts()? > before).then_some(())))
    }

    /// The public keys of the devices that a weaver's sidecar, the one that runs now, has admitted and not removed.
    pub fn admitted_devices(&self, weaver: &Weaver) -> Result<BTreeSet<String>> {
        let log = self.sidecar_log(weaver)?;
        let last_start = log.rfind(START).context("the sidecar's start")?;
        let mut admitted = BTreeSet::new();
        for line in log[last_start..].lines() {
            let Some((_, rest)) = line.split_once(" peer=") else { continue };
            let peer = rest.split_whitespace().next().unwrap_or_default();
            if line.contains("a device is admitted") {
                admitted.insert(peer.to_owned());
            } else if line.contains("a device is removed") {
                admitted.remove(peer);
            }
        }
        Ok(admitted)
    }
}
