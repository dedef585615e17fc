//! Parts of the cluster away, and back. In a file of its own, and one after another: nothing else can run meanwhile.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{System, cluster::Cluster, eventually, system::TIMEOUT, terminal::Terminal, tools};
use parking_lot::Mutex;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// One part of the cluster that does not run; it is started again at the end, also when the test fails.
struct Outage {
    cluster: Cluster,
    part: &'static str,
}

impl Outage {
    /// Nothing when the cluster is not ours.
    fn begin(part: &'static str) -> Result<Option<Self>> {
        let directory = tools::find("kube")?;
        let cluster = Cluster::new(directory.parent().context("the tools' directory")?);
        if !cluster.running().iter().any(|running| running == part) {
            eprintln!("this cluster's {part} is not ours to stop: nothing is shown");
            return Ok(None);
        }
        cluster.kill(part)?;
        Ok(Some(Self { cluster, part }))
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        if let Err(error) = self.cluster.restart(self.part) {
            eprintln!("the {} could not be started again: {error:#}", self.part);
        }
    }
}

/// A `loom new` that has to wait for the API server.
struct Creating(Child);

impl Creating {
    fn begin(system: &System) -> Result<Self> {
        let mut new = system.loom(&["new", "--no-attach", "--name", "late"]);
        let creating = Self(new.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        eventually("the reason for the wait", TIMEOUT, || {
            let list = system.json(&["ps", "--json"])?;
            let late = list.as_array().and_then(|list| list.iter().find(|weaver| weaver["name"] == "late"));
            Ok(late.and_then(|late| late["reason"].as_str()).filter(|reason| reason.contains("API server")).map(drop))
        })?;
        Ok(creating)
    }

    fn end(&mut self) -> Result<()> {
        let ended = eventually("the weaver that had to wait", TIMEOUT, || Ok(self.0.try_wait()?))?;
        ensure!(ended.success(), "it was not made: {ended}");
        Ok(())
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn weavers_outlive_an_outage_of_the_api_server_and_new_ones_wait_for_its_end() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock();
    let system = System::start_on_kubernetes(&[])?;
    let (weaver, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("echo before-$((1+0))\r")?;
    attach.expect("before-1", TIMEOUT)?;

    // The cluster is a step ahead of the server's watch on pods, which hears of steps that are not its own once a minute: an
    // API server that starts anew does not remember so far back, and says that the watch has expired (410).
    let namespace = system.namespace().context("the system runs on Kubernetes")?;
    namespace.kubectl(&["create", "configmap", "step", "--namespace", namespace.name()])?;
    let Some(outage) = Outage::begin("apiserver")? else { return system.stop() };
    attach.send("echo during-$((1+0))\r")?;
    attach.expect("during-1", TIMEOUT)?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");
    let mut creating = Creating::begin(&system)?;
    // A weaver that is deleted meanwhile is closed at once, and its pod goes later.
    system.run(&["delete", "--yes", &other.id])?;
    eventually("the deleted weaver to be closed", Duration::from_secs(2), || {
        Ok((system.output(&["exec", &other.id, "--", "true"])?.status.code() == Some(255)).then_some(()))
    })?;

    drop(outage);
    creating.end()?;
    eventually("the deleted weaver's pod to go", TIMEOUT, || Ok((!system.has_left_something(&other)?).then_some(())))?;
    let log = system.server_log();
    assert!(log.contains("the watch on pods broke") && log.contains("too old resource version"), "{log}");
    // The watch goes on: what happens now is seen.
    attach.send("echo after-$((1+0))\r")?;
    attach.expect("after-1", TIMEOUT)?;
    drop(attach);
    system.kill_pod(&weaver)?;
    eventually("the loss of a pod to be seen", TIMEOUT, || {
        Ok((system.describe(&weaver)?["status"] == "Failed").then_some(()))
    })?;
    system.stop()
}

#[test]
fn a_server_that_starts_during_an_outage_serves_what_runs() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock();
    let mut system = System::start_on_kubernetes(&[])?;
    let weaver = system.new_weaver(&[])?;
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("echo before-$((1+0))\r")?;
    attach.expect("before-1", TIMEOUT)?;

    let Some(outage) = Outage::begin("apiserver")? else { return system.stop() };
    system.kill_server()?;
    system.start_server()?;
    attach.send("echo during-$((1+0))\r")?;
    attach.expect("during-1", TIMEOUT)?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");
    let mut creating = Creating::begin(&system)?;

    drop(outage);
    creating.end()?;
    assert_eq!(system.describe(&weaver)?["status"], "Running");
    drop(attach);
    system.stop()
}

#[test]
fn a_node_that_is_gone_is_said_and_one_that_is_back_is_used() -> Result<()> {
    /// Controllers give a node the time to come back: its lease's, then that of the collector of pods.
    const CONTROLLERS: Duration = Duration::from_secs(180);
    let _alone = ONE_AT_A_TIME.lock();
    let system = System::start_on_kubernetes(&[])?;
    let weaver = system.new_weaver(&[])?;
    let namespace = system.namespace().context("the system runs on Kubernetes")?;
    let node = namespace.pod(&weaver)?.context("its pod")?["spec"]["nodeName"].as_str().context("a node")?.to_owned();

    let Some(outage) = Outage::begin("kubelet")? else { return system.stop() };
    namespace.kubectl(&["delete", "node", &node])?;
    eventually(
        "the weaver's end",
        CONTROLLERS,
        || Ok((system.describe(&weaver)?["status"] == "Failed").then_some(())),
    )?;
    let reason = system.describe(&weaver)?["reason"].as_str().unwrap_or_default().to_owned();
    assert!(reason.starts_with("its node is gone"), "{reason}");

    drop(outage);
    let next = system.new_weaver(&[])?;
    assert_eq!(system.run(&["exec", &next.id, "--", "echo", "in"])?, "in\n");
    system.stop()
}
