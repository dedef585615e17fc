//! What dies and what goes on: a killed server, a killed agent, under live sessions.

use std::{fs, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, eventually,
    system::{BACKEND, TIMEOUT},
    terminal::Terminal,
};

#[test]
fn a_killed_server_breaks_neither_ssh_nor_attach() -> Result<()> {
    let mut system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut ssh = Terminal::spawn(&system.loom(&["ssh", &weaver.id]))?;
    ssh.send("echo ssh-$((1+0))\r")?;
    ssh.expect("ssh-1", TIMEOUT)?;
    let mut attach = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    attach.send("echo attach-$((1+0)); for i in $(seq 1 200); do echo tick-$i; sleep 0.05; done; echo the-end\r")?;
    attach.expect("tick-5", TIMEOUT)?;

    system.kill_server()?;
    // The direct path needs no server.
    ssh.send("echo ssh-$((1+1))\r")?;
    ssh.expect("ssh-2", TIMEOUT)?;
    system.start_server()?;
    ssh.send("echo ssh-$((1+2))\r")?;
    ssh.expect("ssh-3", TIMEOUT)?;
    attach.expect("the-end", TIMEOUT)?;
    attach.send("echo attach-$((1+1))\r")?;
    attach.expect("attach-2", TIMEOUT)?;
    drop((ssh, attach));
    system.stop()
}

/// What a further server says that refuses to start on the data of a [`System`].
fn refusal_to_start(system: &System) -> Result<String> {
    let mut server = system.program("timeout");
    server.arg("20").arg(System::binary("loom-server")?).args(["--listen", "127.0.0.1:0", "--data-dir"]);
    let output = server.arg(system.path("data")).output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{error}");
    Ok(error)
}

#[test]
fn a_server_that_has_lost_its_secret_does_not_go_on_with_another() -> Result<()> {
    let mut system = System::start()?;
    system.stop_server()?;
    let (secret, aside) = (system.path("data/secret.key"), system.path("data/aside.key"));
    fs::rename(&secret, &aside)?;
    let error = refusal_to_start(&system)?;
    assert!(error.contains("secret.key is missing") && !secret.exists(), "{error}");
    fs::rename(&aside, &secret)?;
    system.start_server()?;
    system.stop()
}

#[test]
fn a_second_server_keeps_off_the_data_of_the_first() -> Result<()> {
    let mut system = System::start()?;
    let error = refusal_to_start(&system)?;
    assert!(error.contains("another server runs on"), "{error}");
    system.kill_server()?;
    system.start_server()?;
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
    eventually("the weaver to be reachable again", TIMEOUT, || {
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
    attach.expect("ready", TIMEOUT)?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "before"])?, "before\n");

    let sidecar = system.sidecar(&weaver)?;
    sidecar.kill();
    eventually("another sidecar", TIMEOUT, || Ok((system.sidecar(&weaver)?.pid != sidecar.pid).then_some(())))?;
    attach.send("echo $marker\r")?;
    attach.expect("alive-42", TIMEOUT)?;
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
        system.loom(&["new", "--no-attach", "--name", "early"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    eventually("the weaver's row", TIMEOUT, || {
        let list = system.json(&["ps", "--json"])?;
        Ok(list.as_array().is_some_and(|list| !list.is_empty()).then_some(()))
    })?;
    system.kill_server()?;
    let _ = creating.kill();
    creating.wait()?;
    system.start_server()?;
    let described = eventually("the weaver to run", TIMEOUT, || {
        let list = system.json(&["ps", "--json"])?;
        let list = list.as_array().context("an array")?;
        assert_eq!(list.len(), 1, "one weaver, not two: {list:?}");
        Ok((list[0]["status"] == "Running").then(|| list[0].clone()))
    })?;
    assert_eq!(described["name"], "early");
    assert_eq!(system.run(&["exec", "early", "--", "echo", "in"])?, "in\n");
    system.stop()
}

/// Starts a server that dies at a point.
fn start_with_fault(point: &str) -> Result<System> {
    System::start_with(&[("LOOM_SERVER_FAULT", point)])
}

/// Waits for the server's death, and starts it without a fault.
fn revive(system: &mut System) -> Result<()> {
    system.wait_for_server_end()?;
    system.set("LOOM_SERVER_FAULT", "");
    system.start_server()
}

#[test]
fn a_server_killed_between_any_two_writes_of_a_start_makes_one_weaver() -> Result<()> {
    let on_kubernetes = std::env::var(BACKEND).is_ok_and(|backend| backend == "kubernetes");
    let of_the_backend = if on_kubernetes {
        &["image-pinned"][..]
    } else {
        &["directory-prepared", "directory-made", "supervisor-started"]
    };
    for point in [&["weaver-recorded"], of_the_backend, &["pod-made"]].concat() {
        let mut system = start_with_fault(point)?;
        // Its client goes on through the server's death, with the same key.
        let mut creating = system
            .loom(&["new", "--no-attach", "--name", "one"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        revive(&mut system).with_context(|| format!("at {point}"))?;
        let listed = eventually("the weaver to run", TIMEOUT, || {
            let list = system.json(&["ps", "--json"])?;
            let list = list.as_array().context("an array")?;
            assert!(list.len() <= 1, "{point}: one weaver, not more: {list:?}");
            Ok(list.first().filter(|weaver| weaver["status"] == "Running").cloned())
        })
        .with_context(|| format!("at {point}"))?;
        assert_eq!(listed["name"], "one");
        assert_eq!(system.count_pods()?, 1, "{point}");
        let _ = creating.kill();
        creating.wait()?;
        assert_eq!(system.run(&["exec", "one", "--", "echo", "in"])?, "in\n");
        system.stop().with_context(|| format!("at {point}"))?;
    }
    Ok(())
}

#[test]
fn a_server_killed_between_any_two_writes_of_an_end_leaves_nothing() -> Result<()> {
    for point in ["end-recorded", "grants-removed", "pod-removed"] {
        let mut system = start_with_fault(point)?;
        let weaver = system.new_weaver(&[])?;
        system.run(&["exec", &weaver.id, "--", "true"])?;
        // Its answer is lost with the server, and that is no promise broken.
        let _ = system.output(&["delete", "--yes", &weaver.id])?;
        revive(&mut system).with_context(|| format!("at {point}"))?;
        eventually("the pod to be gone", TIMEOUT, || Ok((system.count_pods()? == 0).then_some(())))
            .with_context(|| format!("at {point}"))?;
        assert_eq!(system.json(&["ps", "--json"])?, serde_json::json!([]), "{point}");
        let code = system.output(&["exec", &weaver.id, "--", "true"])?.status.code();
        assert_eq!(code, Some(255), "{point}: nobody comes in any more");
        system.stop().with_context(|| format!("at {point}"))?;
    }
    Ok(())
}

#[test]
fn a_server_killed_during_its_first_start_starts_again() -> Result<()> {
    for point in ["file-written", "sign-in-token-written", "first-user-made"] {
        let mut system = System::start_logged_out(&[])?;
        system.stop_server()?;
        fs::remove_dir_all(system.path("data"))?;
        system.set("LOOM_SERVER_FAULT", point);
        assert!(system.start_server().is_err(), "the server did not die at {point}");
        system.set("LOOM_SERVER_FAULT", "");
        system.start_server().with_context(|| format!("at {point}"))?;
        system.login_with_token().with_context(|| format!("at {point}"))?;
        let weaver = system.new_weaver(&[])?;
        assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");
        system.stop().with_context(|| format!("at {point}"))?;
    }
    Ok(())
}
