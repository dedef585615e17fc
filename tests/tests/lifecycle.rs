//! From `loom new` to nothing left: clones, deadlines, errors.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use loom_tests::{
    System, cluster::registry, eventually, git::Repository, processes, system::TIMEOUT, terminal::Terminal,
};

#[test]
fn a_weaver_holds_the_repository_and_leaves_no_trace() -> Result<()> {
    let system = System::start()?;
    let repository = Repository::serve(&system)?;
    let url = repository.url();
    let weaver = system.new_weaver(&["--name", "work", "--repo", url, "--branch", "feature", "-e", "COLOUR=green"])?;
    assert_eq!(
        system.run(&["exec", "work", "--", "sh", "-c", "cat README; echo $COLOUR; pwd"])?,
        "on feature\ngreen\n/workspace/project\n"
    );

    let described = system.describe(&weaver)?;
    assert_eq!(described["status"], "Running");
    assert_eq!(described["lifetime_hours"], 4.0);
    let table = system.run(&["ps"])?;
    let header: Vec<&str> = table.lines().next().context("a header")?.split_whitespace().collect();
    assert_eq!(header, ["ID", "IMAGE", "STATUS", "AGE", "TTL"]);
    assert!(table.contains(&weaver.id) && table.contains("Running"), "{table}");
    let kinds: Vec<String> = system
        .json(&["events", "work", "--json"])?
        .as_array()
        .context("an array")?
        .iter()
        .map(|event| event["kind"].as_str().unwrap_or_default().to_owned())
        .collect();
    for kind in ["created", "started", "agent_connected", "cloning", "cloned", "ready"] {
        assert!(kinds.iter().any(|k| k == kind), "no {kind} in {kinds:?}");
    }

    // No secret stands where another process can read it.
    for process in processes::belonging_to(&system.weaver_directory(&weaver)) {
        assert!(!process.arguments.iter().any(|argument| argument.contains("green")), "{process:?}");
    }
    // What was written last stands in the journal.
    let files = ["data/loom.db", "data/loom.db-wal"].map(|file| fs::read(system.path(file)).unwrap_or_default());
    let database = String::from_utf8_lossy(&files.concat()).into_owned();
    assert!(database.is_empty() || database.contains(url), "the weaver is recorded");
    assert!(!database.contains("COLOUR") && !database.contains("green"), "the environment is sealed at rest");

    system.run(&["delete", "--yes", "work"])?;
    eventually("the weaver to be closed", Duration::from_secs(2), || {
        Ok((system.output(&["exec", &weaver.id, "--", "true"])?.status.code() == Some(255)).then_some(()))
    })?;
    assert_eq!(system.output(&["logs", &weaver.id])?.status.code(), Some(6), "a deleted weaver is gone, not unknown");
    drop(repository);
    system.stop()
}

#[test]
fn a_weaver_ends_on_the_second_and_extending_moves_that() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&["--ttl", "8s"])?;
    let other = system.new_weaver(&["--ttl", "8s"])?;
    system.run(&["extend", &other.id, "1"])?;
    let described = system.describe(&weaver)?;
    let created = described["created_at"].as_str().context("created_at")?.to_owned();
    eventually("the weaver to be gone", TIMEOUT, || Ok((!system.has_left_something(&weaver)?).then_some(())))?;
    let events = system.json(&["events", &weaver.id, "--json"])?;
    let expired = events.as_array().into_iter().flatten().find(|event| event["kind"] == "expired");
    let expired = expired.and_then(|event| event["at"].as_str()).context("no event says that it expired")?;
    let lived = epoch_seconds(expired)? - epoch_seconds(&created)?;
    assert!((8.0..9.0).contains(&lived), "it lived {lived:.3} s of 8");
    assert_eq!(system.describe(&other)?["status"], "Running", "the extended one lives on");

    let output = system.output(&["extend", &other.id, "47"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("48"), "{output:?}");
    system.stop()
}

/// An RFC 3339 time as seconds since 1970, by `date`.
fn epoch_seconds(time: &str) -> Result<f64> {
    let output = Command::new("date").args(["-d", time, "+%s.%N"]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

#[test]
fn a_failed_clone_is_a_failed_weaver_with_the_reason() -> Result<()> {
    let system = System::start()?;
    let repository = Repository::serve(&system)?;
    let url = repository.url();
    let output = system.output(&["new", "--no-attach", "--repo", url, "--branch", "absent"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("absent"), "{output:?}");

    let missing = format!("{url}-missing");
    let output = system.output(&["new", "--no-attach", "--repo", &missing])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("clone"), "{output:?}");
    drop(repository);
    system.stop()
}

#[test]
fn a_program_that_ends_at_once_is_seen_with_its_output_and_its_code() -> Result<()> {
    let system = System::start()?;
    // Whether it ends before anybody can attach or after is chance, and must not matter.
    let mut terminal = Terminal::spawn(&system.loom(&["new", "--", "sh", "-c", "echo boom-$((1+0)); exit 3"]))?;
    assert_eq!(terminal.wait(TIMEOUT)?.code(), Some(3), "{}", terminal.screen());
    terminal.expect("boom-1", TIMEOUT)?;
    terminal.expect("code 3", TIMEOUT)?;
    drop(terminal);
    // In a script it is an error, unless the weaver was ready before.
    let new =
        system.output(&["new", "--no-attach", "--", "sh", "-c", "printf '\\033[31mboom-1\\033[0m\\n'; exit 3"])?;
    let error = String::from_utf8_lossy(&new.stderr);
    assert!(new.status.success() || (error.contains("code 3") && error.contains("\n  boom-1\n")), "{error}");
    let new = system.output(&["new", "--no-attach", "--", "true"])?;
    assert!(new.status.success() && new.stdout.starts_with(b"W-"), "{new:?}");
    system.stop()
}

#[test]
fn nonsense_is_refused_with_a_reason_and_changes_nothing() -> Result<()> {
    let system = System::start()?;
    for (arguments, code, word) in [
        (&["new", "--no-attach", "--ttl", "49"][..], 1, "48"),
        (&["new", "--no-attach", "--ttl", "-1"], 2, "ttl"),
        (&["new", "--no-attach", "--ttl", "NaN"], 2, "ttl"),
        (&["new", "--no-attach", "--image", "UPPER case"], 1, "image"),
        (&["new", "--no-attach", "--name", "Not_a_label"], 1, "name"),
        (&["new", "--no-attach", "--repo", "--upload-pack=x"], 2, "repo"),
        (&["new", "--no-attach", "--repo", "ext::sh -c id"], 1, "repo"),
        (&["new", "--no-attach", "--repo", "https://ada:s3cret@host/x"], 1, "-e git_token"),
        (&["new", "--no-attach", "--branch", "main"], 2, "repo"),
        (&["new", "--no-attach", "-e", "1=2"], 1, "env"),
        (&["attach", "nobody"], 5, "no weaver"),
        (&["delete", "--yes", "nobody"], 5, "no weaver"),
        (&["frobnicate"], 2, "frobnicate"),
    ] {
        let output = system.output(arguments)?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.to_lowercase().contains(word), "{arguments:?}: {errors}");
    }
    assert_eq!(system.json(&["ps", "--all", "--json"])?, serde_json::json!([]));
    system.stop()
}

#[test]
fn an_image_that_is_not_there_is_said_so_at_once() -> Result<()> {
    let system = System::start()?;
    let image = registry::image("absent");
    let start = Instant::now();
    let output = system.output(&["new", "--no-attach", "--image", &image])?;
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(errors.contains(&image) && !errors.contains("Pending"), "{errors}");
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    system.stop()
}

#[test]
fn a_pod_whose_processes_are_killed_becomes_a_failed_weaver_with_a_reason() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    system.kill_pod(&weaver)?;
    let described = eventually("the weaver to be Failed", TIMEOUT, || {
        let described = system.describe(&weaver)?;
        Ok((described["status"] == "Failed").then_some(described))
    })?;
    assert!(described["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{described}");
    eventually("what is left of it to go", TIMEOUT, || Ok((!system.has_left_something(&weaver)?).then_some(())))?;
    system.stop()
}

#[test]
fn nobody_comes_in_without_a_login() -> Result<()> {
    let system = System::start_logged_out(&[])?;
    let output = system.output(&["ps"])?;
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains("loom login"), "{output:?}");
    let output = system.output_with_input(&["login", "--token", "-"], b"loom_wrong")?;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    system.login_with_token()?;
    assert!(system.run(&["whoami"])?.contains("admin"));
    system.run(&["logout"])?;
    assert_eq!(system.output(&["ps"])?.status.code(), Some(4));
    system.login_with_token()?;
    system.stop()
}
