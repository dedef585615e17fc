//! What dies and what goes on: a killed server, a killed agent, under live sessions.

use std::time::Duration;

use anyhow::{Context as _, Result};
use loom_tests::{System, eventually, system::PATIENCE, terminal::Terminal};

#[test]
fn a_killed_server_breaks_neither_ssh_nor_attach() -> Result<()> {
    let mut system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut ssh = Terminal::spawn(&system.loom(&["ssh", &weaver.id]))?;
    ssh.send("echo ssh-$((1+0))\r")?;
    ssh.expect("ssh-1", PATIENCE)?;
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("echo attach-$((1+0)); for i in $(seq 1 200); do echo tick-$i; sleep 0.05; done; echo the-end\r")?;
    attach.expect("tick-5", PATIENCE)?;

    system.kill_server()?;
    // The direct path needs no server.
    ssh.send("echo ssh-$((1+1))\r")?;
    ssh.expect("ssh-2", PATIENCE)?;
    system.start_server()?;
    ssh.send("echo ssh-$((1+2))\r")?;
    ssh.expect("ssh-3", PATIENCE)?;
    attach.expect("the-end", PATIENCE)?;
    attach.send("echo attach-$((1+1))\r")?;
    attach.expect("attach-2", PATIENCE)?;
    drop((ssh, attach));
    system.stop()
}

#[test]
fn a_server_that_stops_politely_leaves_the_weavers_running() -> Result<()> {
    let mut system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let before = system.pod_identity(&weaver)?;
    system.stop_server()?;
    assert_eq!(system.pod_identity(&weaver)?, before);
    system.start_server()?;
    eventually("the weaver to be reachable again", PATIENCE, || {
        Ok(system.output(&["exec", &weaver.id, "--", "true"])?.status.success().then_some(()))
    })?;
    assert_eq!(system.describe(&weaver)?["status"], "Running");
    system.stop()
}

#[test]
fn a_killed_agent_costs_no_shell_and_ssh_returns() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("marker=alive-$((40+2)); echo ready\r")?;
    attach.expect("ready", PATIENCE)?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "before"])?, "before\n");

    let sidecar = system.sidecar(&weaver)?;
    sidecar.kill();
    eventually("another sidecar", PATIENCE, || Ok((system.sidecar(&weaver)?.pid != sidecar.pid).then_some(())))?;
    attach.send("echo $marker\r")?;
    attach.expect("alive-42", PATIENCE)?;
    let output = eventually("SSH to return", Duration::from_secs(30), || {
        let output = system.output(&["exec", &weaver.id, "--", "echo", "after"])?;
        Ok(output.status.success().then_some(output))
    })?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "after\n");
    drop(attach);
    system.stop()
}

#[test]
fn a_server_killed_while_a_weaver_is_made_finishes_it_later() -> Result<()> {
    let mut system = System::start()?;
    let mut creating =
        system.loom(&["new", "--no-attach", "--name", "early"]).stderr(std::process::Stdio::null()).spawn()?;
    eventually("the weaver's row", PATIENCE, || {
        let list = system.json(&["ps", "--json"])?;
        Ok(list.as_array().is_some_and(|list| !list.is_empty()).then_some(()))
    })?;
    system.kill_server()?;
    let _ = creating.kill();
    creating.wait()?;
    system.start_server()?;
    let described = eventually("the weaver to run", PATIENCE, || {
        let list = system.json(&["ps", "--json"])?;
        let list = list.as_array().context("an array")?;
        assert_eq!(list.len(), 1, "one weaver, not two: {list:?}");
        Ok((list[0]["status"] == "Running").then(|| list[0].clone()))
    })?;
    assert_eq!(described["name"], "early");
    assert_eq!(system.run(&["exec", "early", "--", "echo", "in"])?, "in\n");
    system.stop()
}
