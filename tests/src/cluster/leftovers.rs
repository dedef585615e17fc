//! What containers leave on the machine when nobody ended them: processes, mounts, interfaces, control groups.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    mount::{UnmountFlags, unmount},
    process::Signal,
};

use super::run;
use crate::{processes, system::output_with_input, wait::eventually};

/// How long killed processes may take to be gone.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Ends every container, and the shims that hold them.
pub(super) fn end_containers(directory: &Path) {
    let parents = parents();
    let shims: Vec<i32> = processes::belonging_to(directory)
        .into_iter()
        .filter(|process| process.arguments[0].contains("containerd-shim"))
        .map(|process| process.pid)
        .collect();
    // The children first: a shim's end would leave them to somebody else.
    for (child, parent) in &parents {
        if shims.contains(parent) {
            processes::signal(*child, Signal::KILL);
        }
    }
    for shim in shims {
        processes::signal(shim, Signal::KILL);
    }
}

/// Removes mounts, interfaces, control groups and files.
pub(super) fn remove(directory: &Path, bridges: &[&str], pods: &str) -> Result<()> {
    eventually("the cluster's processes to be gone", TIMEOUT, || {
        let left = processes::belonging_to(directory);
        // Whoever looks at the cluster from a shell names the directory too.
        let ours = |process: &processes::Process| process.arguments[0].contains("containerd-shim");
        Ok((!left.iter().any(ours)).then_some(()))
    })?;
    for mount in mounts_below(directory)?.into_iter().rev() {
        // What it holds is of no interest any more.
        unmount(&mount, UnmountFlags::DETACH).with_context(|| format!("unmounting {}", mount.display()))?;
    }
    for bridge in bridges {
        if Path::new("/sys/class/net").join(bridge).exists() {
            run("ip", &["link", "delete", bridge])?;
        }
    }
    remove_filters()?;
    let mut rule = vec!["-t", "nat", "-D", "POSTROUTING"];
    rule.extend(masquerade(pods));
    while Command::new("iptables").args(&rule).output().is_ok_and(|output| output.status.success()) {}
    remove_control_groups();
    remove_links(directory);
    fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))
}

/// Takes Kubernetes' chains and sets out of the machine's packet filter: its parts leave them, for a restart.
fn remove_filters() -> Result<()> {
    for family in ["iptables", "ip6tables"] {
        let rules = Command::new(format!("{family}-save")).output().context("reading the packet filter")?.stdout;
        let rules = String::from_utf8_lossy(&rules).into_owned();
        let others: String =
            rules.lines().filter(|line| !line.contains("KUBE-")).map(|line| format!("{line}\n")).collect();
        if others.lines().count() < rules.lines().count() {
            // One table at a time, each at once and whole.
            output_with_input(Command::new(format!("{family}-restore")), others.as_bytes())?;
        }
    }
    let sets = Command::new("ipset").args(["list", "-name"]).output().map(|output| output.stdout).unwrap_or_default();
    for set in String::from_utf8_lossy(&sets).lines() {
        let name = set.trim_start_matches("inet6:");
        if name.starts_with("KUBE-") || name.starts_with("kube-router-") {
            run("ipset", &["destroy", set])?;
        }
    }
    Ok(())
}

/// The kubelet links each container's log in a place that cannot be set.
fn remove_links(directory: &Path) {
    let Ok(links) = fs::read_dir("/var/log/containers") else { return };
    for link in links.flatten().map(|entry| entry.path()) {
        if fs::read_link(&link).is_ok_and(|target| target.starts_with(directory)) {
            // The next cluster's removal tries again.
            let _ = fs::remove_file(link);
        }
    }
}

/// The rule that lets pods out to the world.
pub(super) fn masquerade(pods: &str) -> Vec<&str> {
    vec!["-s", pods, "!", "-d", "10.0.0.0/8", "-m", "comment", "--comment", "loom-cluster", "-j", "MASQUERADE"]
}

/// Each process's parent.
fn parents() -> HashMap<i32, i32> {
    let parent = |pid| processes::stat(pid)?.get(1)?.parse().ok();
    processes::all().iter().filter_map(|process| Some((process.pid, parent(process.pid)?))).collect()
}

/// In the order in which they were mounted.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(targets.filter(|target| target.starts_with(directory)).collect())
}

/// The kubelet's control groups, where they are empty: another kubelet's are not.
fn remove_control_groups() {
    let Ok(controllers) = fs::read_dir("/sys/fs/cgroup") else { return };
    let roots = controllers.flatten().map(|entry| entry.path().join("kubepods"));
    for root in roots.chain([PathBuf::from("/sys/fs/cgroup/kubepods")]) {
        remove_empty(&root);
    }
}

fn remove_empty(group: &Path) {
    let Ok(entries) = fs::read_dir(group) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_empty(&entry.path());
    }
    // Not empty: not ours.
    let _ = fs::remove_dir(group);
}
