//! The cluster's API server away, and back. In a file of its own: nothing else can run meanwhile.

use std::time::Duration;

use anyhow::{Context as _, Result};
use loom_tests::{System, cluster::Cluster, eventually, system::PATIENCE, terminal::Terminal, tools};

/// Starts the API server again, also when the test fails.
struct Outage(Cluster);

impl Outage {
    fn begin() -> Result<Option<Self>> {
        let directory = tools::find("kube")?;
        let cluster = Cluster::new(directory.parent().context("the tools' directory")?);
        if !cluster.running().iter().any(|part| part == "apiserver") {
            return Ok(None);
        }
        cluster.kill("apiserver")?;
        Ok(Some(Self(cluster)))
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        if let Err(error) = self.0.restart("apiserver") {
            eprintln!("the API server could not be started again: {error:#}");
        }
    }
}

#[test]
fn weavers_outlive_an_outage_of_the_api_server_and_new_ones_wait_for_its_end() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let (weaver, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("echo before-$((1+0))\r")?;
    attach.expect("before-1", PATIENCE)?;

    let Some(outage) = Outage::begin()? else {
        eprintln!("this cluster's API server is not ours to stop: nothing is shown");
        return system.stop();
    };
    attach.send("echo during-$((1+0))\r")?;
    attach.expect("during-1", PATIENCE)?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");
    let mut creating = system
        .loom(&["new", "--no-attach", "--name", "late"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    eventually("the reason for the wait", PATIENCE, || {
        let list = system.json(&["ps", "--json"])?;
        let late = list.as_array().and_then(|list| list.iter().find(|weaver| weaver["name"] == "late"));
        Ok(late.and_then(|late| late["reason"].as_str()).filter(|reason| reason.contains("API server")).map(drop))
    })?;
    // A weaver that is deleted meanwhile is closed at once, and its pod goes later.
    system.run(&["delete", "--yes", &other.id])?;
    eventually("the deleted weaver to be closed", Duration::from_secs(2), || {
        Ok((system.output(&["exec", &other.id, "--", "true"])?.status.code() == Some(255)).then_some(()))
    })?;

    drop(outage);
    assert!(creating.wait()?.success(), "the weaver that had to wait");
    eventually("the deleted weaver's pod to go", PATIENCE, || Ok((!system.has_left_something(&other)?).then_some(())))?;
    // The watch goes on: what happens now is seen.
    attach.send("echo after-$((1+0))\r")?;
    attach.expect("after-1", PATIENCE)?;
    drop(attach);
    system.kill_pod(&weaver)?;
    eventually("the loss of a pod to be seen", PATIENCE, || {
        Ok((system.describe(&weaver)?["status"] == "Failed").then_some(()))
    })?;
    system.stop()
}
