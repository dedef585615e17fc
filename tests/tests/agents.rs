//! A compromised sidecar, which has its weaver's credential: what it says is bounded, stands where it cannot be
//! mistaken for somebody else's words, and is about its own weaver only.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver,
    agent::Agent,
    api::UPGRADE,
    eventually,
    keys::KeyPair,
    service::{HonestUser, PROMPT},
    system::TIMEOUT,
};
use serde_json::{Value, json};
use tungstenite::Message;

/// How long an agent says as much as it can.
const FLOOD: Duration = Duration::from_secs(12);
/// Messages that the server reads of an agent at once, and then in a second (docs/protocols.md).
const BURST: u64 = 100;
const PER_SECOND: u64 = 2;
/// By how much the database may grow in a flood: its log, which the next writes use again, has up to 4 MiB.
const GROWTH_ON_DISK: u64 = 8 << 20;
/// By how much the server's memory may grow. A message has at most 128 KiB.
const GROWTH_IN_MEMORY: u64 = 8 << 20;

/// A stream that nobody asked for.
const NO_STREAM: &str = "01890000-0000-7000-8000-000000000000";
/// Words that end their line, move the cursor, set the window's title, and begin a line as the server's log does.
const FORGERY: &str =
    "\r\n2026-01-01T00:00:00.000000Z  WARN loom_server: all is lost\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m";

fn events(system: &System, weaver: &Weaver) -> Result<Vec<Value>> {
    let path = format!("/api/weavers/{}/events", weaver.id);
    let answer = system.request(Some(&system.admin_token()?), "GET", &path, None)?;
    answer.body.as_array().cloned().context("events")
}

/// Waits for an event with these words.
fn event(system: &System, weaver: &Weaver, words: &str) -> Result<Value> {
    eventually(&format!("the event {words:?}"), TIMEOUT, || {
        let found = events(system, weaver)?.into_iter();
        Ok(found.rev().find(|event| event["message"].as_str().is_some_and(|message| message.contains(words))))
    })
}

#[test]
fn a_flood_of_events_fills_nothing_and_keeps_nobody_waiting() -> Result<()> {
    let system = System::start()?;
    let (hostile, honest) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    system.run(&["ssh", &honest.id, "--", "true"])?;
    let agent = Agent::in_place_of_the_real_one(&system, &hostile)?;
    let (before, had, start) = (system.database_size()?, events(&system, &hostile)?.len(), Instant::now());
    let mut user = HonestUser::new(&system, &honest);
    let links = thread::scope(|scope| {
        let flood = scope.spawn(|| flood(&agent, start + FLOOD));
        user.work_for(FLOOD)?;
        flood.join().map_err(|_| anyhow::anyhow!("the flood"))
    })?;
    let wrote = (events(&system, &hostile)?.len() - had) as u64;
    let most = BURST + PER_SECOND * (start.elapsed().as_secs() + 1);
    let grown = system.database_size()?.saturating_sub(before);
    eprintln!("{wrote} events on {links} links, the database grew by {} KiB, slowest {:?}", grown >> 10, user.slowest);
    ensure!(wrote <= most, "{wrote} events were written on {links} links, more than {most}");
    ensure!(grown <= GROWTH_ON_DISK, "the database grew by {grown} bytes");
    ensure!(user.slowest < PROMPT, "something took {:?}", user.slowest);

    system.run(&["delete", "--yes", &hostile.id])?;
    let last = events(&system, &hostile)?.pop().context("events")?;
    assert_eq!(last["kind"], "deleted");
    drop(agent);
    system.stop()
}

/// Tells of events as fast as the link takes them, and on another link when it takes no more. How many links it took.
fn flood(agent: &Agent<'_>, until: Instant) -> usize {
    let message = "x".repeat(1000);
    let mut links = 0;
    while Instant::now() < until {
        // The server may keep this one waiting, too.
        let Ok(mut link) = agent.connect() else { continue };
        links += 1;
        if link.limit(Duration::from_millis(100)).is_ok() {
            while Instant::now() < until && link.tell("cloning", &message).is_ok() {}
        }
    }
    links
}

#[test]
fn what_an_agent_says_is_cut_escaped_and_no_event_of_somebody_elses() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    agent.register("1\u{1b}[2J\u{9b}31m")?;
    let document = system.request(None, "GET", "/api/openapi.json", None)?;
    let kinds = document.body["components"]["schemas"]["EventKind"]["enum"].as_array().context("the kinds")?.clone();
    assert!(kinds.len() > 10, "{kinds:?}");

    let mut link = agent.connect()?;
    for kind in kinds.iter().filter_map(Value::as_str).chain(["made-up"]) {
        link.tell(kind, &format!("forged as {kind}"))?;
    }
    link.tell("cloned", &"é".repeat(30_000))?;
    link.tell("cloned", &format!("escaped {FORGERY}"))?;
    // What cannot be read is logged, with the words that cannot be.
    link.say(&json!({"type": FORGERY}))?;
    link.say(&json!({"type": "é".repeat(30_000)}))?;
    let escaped = event(&system, &weaver, "escaped")?;
    assert!(escaped["message"].as_str().is_some_and(|message| message.contains("all is lost")));
    let all = events(&system, &weaver)?;
    let mut forged: Vec<_> =
        all.iter().filter_map(|event| event["message"].as_str()?.strip_prefix("forged as ")).collect();
    forged.sort_unstable();
    assert_eq!(forged, ["cloned", "cloning"]);
    let longest = all.iter().filter_map(|event| event["message"].as_str()).map(str::len).max();
    assert_eq!(longest, Some(1024));

    // On the user's terminal.
    let running = system.output(&["ps", "--json"])?;
    assert!(String::from_utf8_lossy(&running.stdout).contains("[2J"), "the version is shown");
    assert_clean("loom ps --json", &running.stdout);
    let asked = thread::scope(|scope| {
        let logs = scope.spawn(|| system.output(&["logs", &weaver.id]));
        let stream = link.hear("open_stream")?["stream"].clone();
        link.say(&json!({"type": "stream_failed", "stream": stream, "reason": FORGERY}))?;
        logs.join().map_err(|_| anyhow::anyhow!("loom logs"))?
    })?;
    assert_clean("loom logs", &[asked.stdout, asked.stderr].concat());
    link.say(&json!({"type": "failed", "reason": format!("failed {FORGERY}")}))?;
    eventually("the weaver to have failed", TIMEOUT, || {
        Ok((system.describe(&weaver)?["status"] == "Failed").then_some(()))
    })?;
    for arguments in [
        &["events", &weaver.id][..],
        &["events", &weaver.id, "--json"],
        &["events", &weaver.id, "--follow"],
        &["events", &weaver.id, "--follow", "--json"],
        &["ps", "--all"],
        &["ps", "--all", "--wide"],
        &["ps", "--all", "--json"],
        &["attach", &weaver.id],
    ] {
        let output = system.output(arguments)?;
        assert!(!output.stdout.is_empty() || !output.stderr.is_empty(), "{arguments:?} says nothing");
        assert_clean(&format!("{arguments:?}"), &[output.stdout, output.stderr].concat());
    }

    // In the server's log.
    let log = system.server_log();
    assert_clean("the log", log.as_bytes());
    let forged: Vec<_> = log.lines().filter(|line| line.starts_with("2026-01-01T00:00:00")).collect();
    assert!(forged.is_empty(), "forged lines: {forged:?}");
    assert!(log.contains("all is lost"), "what was said is logged");
    let longest = log.lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 8 << 10, "a line of the log has {longest} bytes");
    drop(agent);
    system.stop()
}

/// Checks that nothing in a text but its lines' ends is a control character.
fn assert_clean(what: &str, text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let control: Vec<_> = text.lines().filter(|line| line.contains(char::is_control)).collect();
    assert!(control.is_empty(), "{what} has control characters: {control:?}");
}

#[test]
fn messages_without_sense_or_measure_harm_nobody() -> Result<()> {
    let system = System::start()?;
    let (weaver, honest) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    system.run(&["ssh", &honest.id, "--", "true"])?;
    let agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    let before = system.server_memory()?.peak;

    let mut link = agent.connect()?;
    for text in
        ["", "{", "[]", "null", "\"\\ud800\"", r#"{"type":"status"}"#, r#"{"type":"grant_applied","serial":-1}"#]
    {
        link.send(Message::text(text))?;
    }
    link.send(Message::text("[".repeat(100_000)))?;
    link.send(Message::text(r#"{"type":"status","main":{"state":"running"},"ports":[],"load":1e999}"#))?;
    for _ in 0..20 {
        link.send(Message::binary(vec![0xff; 100_000]))?;
    }
    let main = json!({"state": "running"});
    let ports: Vec<u16> = (1..=20_000).collect();
    link.say(&json!({"type": "status", "main": main, "ports": ports, "load": 1.0}))?;
    link.say(&json!({"type": "candidates", "candidates": vec!["[::1]:9"; 10_000]}))?;
    link.tell("cloned", "all of it was read")?;
    event(&system, &weaver, "all of it was read")?;
    let kept = system.describe(&weaver)?["agent"]["ports"].as_array().context("ports")?.len();
    assert_eq!(kept, 1024);
    let device = KeyPair::generate()?;
    let answer = thread::scope(|scope| {
        let opened = scope.spawn(|| system.open_tunnel(&system.admin_token()?, &weaver, &device));
        let serial = link.hear("grant")?["serial"].clone();
        link.say(&json!({"type": "grant_applied", "serial": serial}))?;
        opened.join().map_err(|_| anyhow::anyhow!("opening a tunnel"))?
    })?;
    assert_eq!(answer.body["candidates"].as_array().map(Vec::len), Some(16), "{answer:?}");
    drop(link);

    for too_long in [
        json!({"type": "status", "main": main, "ports": vec![1; 100_000], "load": 1.0}),
        json!({"type": "candidates", "candidates": vec!["[::1]:9"; 100_000]}),
        json!({"type": "event", "kind": "cloned", "message": "x".repeat(15 << 20)}),
    ] {
        let mut link = agent.connect()?;
        // It need not be taken whole.
        let _ = link.say(&too_long);
        link.ended()?;
    }
    let grown = system.server_memory()?.peak - before;
    eprintln!("memory grew by {} KiB", grown >> 10);
    ensure!(grown <= GROWTH_IN_MEMORY, "the server's memory grew by {} KiB", grown >> 10);
    let mut user = HonestUser::new(&system, &honest);
    user.work()?;
    ensure!(user.slowest < PROMPT, "something took {:?}", user.slowest);
    drop(agent);
    system.stop()
}

#[test]
fn nothing_that_an_agent_says_is_read_without_measure() -> Result<()> {
    /// What the two ends of a connection hold, and more.
    const ALL: usize = 48 << 20;
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    let padding = "x".repeat(100_000);
    let unasked = |message: Value| Message::text(message.to_string());
    for (what, frame) in [
        ("acknowledgements", unasked(json!({"type": "grant_applied", "serial": 1, "padding": padding}))),
        ("failures", unasked(json!({"type": "stream_failed", "stream": NO_STREAM, "reason": padding}))),
        ("binary frames", Message::binary(padding.clone().into_bytes())),
        ("pings", Message::Ping(vec![b'x'; 100].into())),
    ] {
        // Refused as long as the flood before has to be paid for.
        let mut link = eventually("a link", TIMEOUT, || Ok(agent.connect().ok()))?;
        link.limit(Duration::from_millis(500))?;
        let size = frame.len();
        let taken = (0..ALL / size).take_while(|_| link.send(frame.clone()).is_ok()).count();
        ensure!(taken < ALL / size, "the server read {taken} {what} of {size} bytes");
    }
    drop(agent);
    system.stop()
}

#[test]
fn an_agent_that_registers_or_connects_too_often_is_refused_for_a_while() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    agent.register("0.1.0")?;
    let (start, mut links) = (Instant::now(), 0);
    while agent.connect().is_ok() {
        links += 1;
        ensure!(2 * links <= BURST + PER_SECOND * (start.elapsed().as_secs() + 1), "{links} links were taken");
    }
    let refused = system.request_with(Some(&agent.token), "GET", "/api/agent/control", None, &UPGRADE)?;
    assert_eq!((refused.status, refused.code()), (429, "too_many_requests"));
    let refused = eventually("a registration to be refused", TIMEOUT, || {
        let answer = agent.ask_to_register("0.1.0")?;
        Ok((answer.status != 200).then_some(answer))
    })?;
    assert_eq!((refused.status, refused.code()), (429, "too_many_requests"));
    // The real one waits its turn, and comes back.
    drop(agent);
    eventually("the real sidecar", TIMEOUT, || {
        Ok(system.output(&["exec", &weaver.id, "--", "true"])?.status.success().then_some(()))
    })?;
    system.stop()
}

#[test]
fn an_agents_token_is_of_no_use_to_a_user() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    let device = KeyPair::generate()?;
    let document = system.request(None, "GET", "/api/openapi.json", None)?;
    let mut refused = 0;
    for (path, operations) in document.body["paths"].as_object().context("paths")? {
        for (method, operation) in operations.as_object().context("operations")? {
            // The relay is for both, and goes by the key.
            if !operation["security"].is_array() || operation["tags"] == json!(["agent"]) || path == "/api/relay" {
                continue;
            }
            let address = path.replace("{id}", &weaver.id).replace("{key}", &device.in_url());
            let answer =
                system.request_with(Some(&agent.token), &method.to_uppercase(), &address, Some("{}"), &UPGRADE)?;
            assert_eq!((answer.status, answer.code()), (403, "forbidden"), "{method} {path}");
            refused += 1;
        }
    }
    assert!(refused > 12, "only {refused} routes are for users");
    assert!(system.weaver_directory(&weaver).exists(), "nothing was done to the weaver");
    drop(agent);
    system.stop()
}

#[test]
fn an_agent_cannot_act_for_another_weaver() -> Result<()> {
    let system = System::start()?;
    let admin = system.admin_token()?;
    let (own, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let hostile = Agent::in_place_of_the_real_one(&system, &own)?;
    let victim = Agent::in_place_of_the_real_one(&system, &other)?;
    let (mut link, mut victims_link) = (hostile.connect()?, victim.connect()?);

    // An admission that the victim has not acknowledged.
    let device = KeyPair::generate()?;
    let open = || system.open_tunnel(&admin, &other, &device);
    let answer = thread::scope(|scope| {
        let opened = scope.spawn(open);
        let serial = victims_link.hear("grant")?["serial"].clone();
        link.say(&json!({"type": "grant_applied", "serial": serial}))?;
        opened.join().map_err(|_| anyhow::anyhow!("opening a tunnel"))?
    })?;
    assert_eq!((answer.status, answer.code()), (504, "agent_unreachable"));

    // A place on the relay.
    for (whose, key) in [("another agent's", &victim.keys), ("a device's", &device)] {
        let path = format!("/api/relay?key={}", key.in_url());
        let answer = system.request_with(Some(&hostile.token), "GET", &path, None, &UPGRADE)?;
        assert_eq!((answer.status, answer.code()), (403, "forbidden"), "{whose}");
    }
    let path = format!("/api/relay?key={}", hostile.keys.in_url());
    system.web_socket(&hostile.token, &path, Some("loom.relay.v1")).context("its own place")?;

    // A stream that was asked of the victim.
    thread::scope(|scope| {
        let attached = scope.spawn(|| system.attach_socket(&other, Some("loom.attach.v2")));
        let stream = victims_link.hear("open_stream")?["stream"].as_str().context("a stream")?.to_owned();
        link.say(&json!({"type": "stream_failed", "stream": stream, "reason": "forged"}))?;
        link.tell("cloned", "the failure was read")?;
        event(&system, &own, "the failure was read")?;
        let path = format!("/api/agent/streams/{stream}");
        let answer = system.request_with(Some(&hostile.token), "GET", &path, None, &UPGRADE)?;
        assert_eq!((answer.status, answer.code()), (404, "not_found"));
        victim.dial(&stream).context("the agent that was asked")?;
        attached.join().map_err(|_| anyhow::anyhow!("attaching"))??;
        anyhow::Ok(())
    })?;
    drop((hostile, victim));
    system.stop()
}
