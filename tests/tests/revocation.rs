//! Whoever loses a right loses everything that was opened with it, within a second: a token revoked or expired, a user
//! suspended or removed, a membership ended.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::DirBuilderExt as _,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use loom_tests::{
    System, Weaver,
    agent::Agent,
    api::{self, UPGRADE},
    eventually,
    keys::KeyPair,
    processes,
    system::{TIMEOUT, free_port},
    terminal::Terminal,
};
use rustix::process::Signal;
use serde_json::json;
use tungstenite::{Message, WebSocket};

/// The product says a second; the rest is the machine's.
const SOON: Duration = Duration::from_secs(2);

/// How attach is closed, and a word of why, when its token is good no longer.
const UNAUTHORIZED: (u16, &str) = (3000, "revoked or has expired");

/// A colleague in an organisation, where a weaver runs.
struct Colleague {
    system: System,
    weaver: Weaver,
    /// The colleague's login.
    login: String,
}

/// What somebody has open.
struct Opened {
    attached: WebSocket<TcpStream>,
    events: Child,
    logs: Child,
    /// Shells by SSH, over UDP and over the relay.
    shells: [Child; 2],
}

impl Colleague {
    fn new() -> Result<Self> {
        let system = System::start()?;
        let login = system.add_user("ada")?;
        system.manage(&["org", "create", "engines"])?;
        for member in ["ada", "admin"] {
            system.manage(&["org", "add-member", "engines", member])?;
        }
        let weaver = system.new_weaver(&["--org", "engines"])?;
        for private in ["direct", "relayed"] {
            fs::DirBuilder::new().mode(0o700).create(system.path(private))?;
        }
        Ok(Self { system, weaver, login })
    }

    /// `loom` with a token, and with a daemon that uses UDP or not.
    fn loom(&self, token: &str, path: &str, arguments: &[&str]) -> Command {
        let mut command = self.system.loom(arguments);
        command.env("LOOM_TOKEN", token).env("XDG_RUNTIME_DIR", self.system.path(path));
        command.env("LOOM_UDP", if path == "relayed" { "off" } else { "on" });
        command
    }

    /// Revokes a token of the colleague's by its name, as an operator does.
    fn revoke(&self, name: &str) -> Result<()> {
        let list = self.system.manage(&["token", "list", "--user", "ada"])?;
        let row = list.lines().find(|line| line.contains(name)).context("the token's row")?;
        self.system.manage(&["token", "revoke", row.split_whitespace().next().context("its number")?]).map(drop)
    }

    fn follow(&self, token: &str, path: &str) -> Result<Child> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--no-buffer", "--noproxy", "*", "--config", "-"]);
        curl.arg(format!("{}/api/weavers/{}/{path}", self.system.url(), self.weaver.id));
        let mut child = curl.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let config = format!("header = \"Authorization: Bearer {token}\"\n");
        child.stdin.take().context("standard input")?.write_all(config.as_bytes())?;
        Ok(child)
    }

    /// The loop that a shell by SSH runs in the weaver.
    fn running(&self, path: &str) -> bool {
        let script = script(path);
        processes::with_variable(&format!("LOOM_WEAVER_ID={}", self.weaver.id))
            .iter()
            .any(|process| process.arguments.contains(&script))
    }

    /// Opens one of everything, and waits until all of it is there.
    fn open(&self, token: &str) -> Result<Opened> {
        let shells = ["direct", "relayed"].map(|path| {
            self.loom(token, path, &["ssh", &self.weaver.id, "--", "sh", "-c", &format!("'{}'", script(path))])
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
        });
        let [direct, relayed] = shells;
        let opened = Opened {
            attached: self.system.attach_socket_as(token, &self.weaver, Some("loom.attach.v2"))?,
            events: self.follow(token, "events?follow=true")?,
            logs: self.follow(token, "logs?follow=true")?,
            shells: [direct?, relayed?],
        };
        for path in ["direct", "relayed"] {
            eventually("the shells to run", TIMEOUT, || Ok(self.running(path).then_some(())))?;
        }
        let status = self.loom(token, "direct", &["tunnel", "status", "--json"]).output()?;
        let status = String::from_utf8(status.stdout)?;
        ensure!(status.contains("\"direct\""), "on one machine the path is direct: {status}");
        Ok(opened)
    }

    /// Checks that everything ends soon, that attach says why with a close code and a word, and that nothing can be
    /// opened again.
    fn all_ends(&self, token: &str, mut opened: Opened, why: (u16, &str)) -> Result<Output> {
        let began = Instant::now();
        let left = |what: &str| SOON.checked_sub(began.elapsed()).with_context(|| format!("{what} goes on"));
        let (last, code) = ends(&mut opened.attached, left("attach")?).context("attach")?;
        ensure!(last.contains("\"type\":\"error\"") && last.contains(why.1), "attach ended with {last:?}");
        ensure!(code == Some(why.0), "attach was closed with {code:?}");
        let [direct, relayed] = &mut opened.shells;
        let children =
            [("events", &mut opened.events), ("logs", &mut opened.logs), ("ssh", direct), ("relayed ssh", relayed)];
        for (what, child) in children {
            eventually(&format!("{what} to end"), left(what)?, || Ok(child.try_wait()?))?;
        }
        for shell in &mut opened.shells {
            let mut said = String::new();
            shell.stderr.take().context("standard error")?.read_to_string(&mut said)?;
            ensure!(said.contains("the connection was lost: "), "ssh does not say why: {said:?}");
        }
        for path in ["direct", "relayed"] {
            let what = format!("the program of the {path} shell to end");
            eventually(&what, left(path)?, || Ok((!self.running(path)).then_some(())))?;
        }
        for path in ["direct", "relayed"] {
            let again = self.loom(token, path, &["ssh", &self.weaver.id, "--", "true"]).output()?;
            ensure!(!again.status.success(), "a new {path} ssh works");
        }
        Ok(self.loom(token, "direct", &["ssh", &self.weaver.id, "--", "true"]).output()?)
    }
}

/// Waits until the server has ended a WebSocket: the last text on it, and the code that it was closed with.
fn ends(socket: &mut WebSocket<TcpStream>, limit: Duration) -> Result<(String, Option<u16>)> {
    let (began, mut last) = (Instant::now(), String::new());
    loop {
        let left = limit.checked_sub(began.elapsed()).context("it goes on")?;
        socket.get_ref().set_read_timeout(Some(left))?;
        match socket.read() {
            Ok(Message::Text(text)) => text.as_str().clone_into(&mut last),
            Ok(Message::Close(frame)) => return Ok((last, frame.map(|frame| frame.code.into()))),
            Ok(_) => {}
            Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return Ok((last, None)),
        }
    }
}

fn script(path: &str) -> String {
    format!("while :; do echo {path}; sleep 0.1; done")
}

fn says(output: &Output, word: &str) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(text.contains(word), "{text:?} does not say {word:?}");
    Ok(())
}

#[test]
fn a_revoked_token_ends_what_was_opened_with_it_and_nothing_else() -> Result<()> {
    let colleague = Colleague::new()?;
    let system = &colleague.system;
    let made = system.request(Some(&colleague.login), "POST", "/api/tokens", Some(r#"{"name":"lost laptop"}"#))?;
    let token = made.body["token"].as_str().context("a token")?;
    let opened = colleague.open(token)?;
    let mut other = colleague.follow(&colleague.login, "events?follow=true")?;
    colleague.revoke("lost laptop")?;
    says(&colleague.all_ends(token, opened, UNAUTHORIZED)?, "revoked")?;
    assert!(other.try_wait()?.is_none(), "another token of the same user goes on");
    other.kill()?;
    other.wait()?;
    Ok(())
}

#[test]
fn programs_in_the_weaver_end_even_when_the_client_does_not_hear_of_it() -> Result<()> {
    let colleague = Colleague::new()?;
    let mut opened = colleague.open(&colleague.login)?;
    let daemons: Vec<_> = ["direct", "relayed"]
        .iter()
        .flat_map(|path| processes::belonging_to(&colleague.system.path(path)))
        .filter(|process| process.has("daemon"))
        .collect();
    assert_eq!(daemons.len(), 2, "{daemons:?}");
    for daemon in &daemons {
        processes::signal(daemon.pid, Signal::STOP);
    }
    colleague.system.manage(&["user", "suspend", "ada"])?;
    for path in ["direct", "relayed"] {
        eventually("the shells' programs to end", SOON, || Ok((!colleague.running(path)).then_some(())))?;
    }
    daemons.iter().for_each(processes::Process::kill);
    for child in opened.shells.iter_mut().chain([&mut opened.events, &mut opened.logs]) {
        child.wait()?;
    }
    Ok(())
}

#[test]
fn an_expired_token_ends_what_was_opened_with_it() -> Result<()> {
    const LIFE: Duration = Duration::from_secs(12);
    let colleague = Colleague::new()?;
    let body = json!({"name": "short", "ttl_hours": LIFE.as_secs_f64() / 3600.0}).to_string();
    let made = colleague.system.request(Some(&colleague.login), "POST", "/api/tokens", Some(&body))?;
    let expires = Instant::now() + LIFE;
    let token = made.body["token"].as_str().context("a token")?;
    let opened = colleague.open(token)?;
    ensure!(Instant::now() < expires, "opening everything took longer than the token lives");
    eventually("the token to expire", TIMEOUT, || Ok((Instant::now() >= expires).then_some(())))?;
    says(&colleague.all_ends(token, opened, UNAUTHORIZED)?, "expired")
}

#[test]
fn a_suspended_user_is_shut_out() -> Result<()> {
    let colleague = Colleague::new()?;
    let opened = colleague.open(&colleague.login)?;
    colleague.system.manage(&["user", "suspend", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened, (3000, "suspended"))?, "suspended")
}

#[test]
fn a_removed_user_is_shut_out_and_the_weavers_in_the_personal_organisation_end() -> Result<()> {
    let colleague = Colleague::new()?;
    let system = &colleague.system;
    let own = system.request(Some(&colleague.login), "POST", "/api/weavers", Some("{}"))?;
    let own = Weaver { id: own.body["id"].as_str().context("an id")?.to_owned() };
    let opened = colleague.open(&colleague.login)?;
    system.manage(&["user", "remove", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened, (3000, "removed"))?, "revoked")?;
    eventually("the personal weaver to be removed", TIMEOUT, || Ok((!system.has_left_something(&own)?).then_some(())))?;
    assert!(system.has_left_something(&colleague.weaver)?, "the organisation's weaver stays");
    Ok(())
}

#[test]
fn an_ended_membership_shuts_out_of_the_organisations_weavers() -> Result<()> {
    let colleague = Colleague::new()?;
    let opened = colleague.open(&colleague.login)?;
    colleague.system.manage(&["org", "remove-member", "engines", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened, (3003, "member"))?, "no weaver")?;
    let me = colleague.system.request(Some(&colleague.login), "GET", "/api/me", None)?;
    assert_eq!(me.status, 200, "the token is still good");
    Ok(())
}

#[test]
fn revoked_devices_stay_revoked_while_others_are_admitted() -> Result<()> {
    const MANY: usize = 250;
    let metrics = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_with(&[("LOOM_SERVER_METRICS_LISTEN", &metrics)])?;
    let (weaver, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let token = system.admin_token()?;
    let keys = |count: usize| (0..count).map(|_| KeyPair::generate()).collect::<Result<Vec<_>>>();
    let (devices, staying) = (keys(MANY)?, keys(4)?);
    let all: Vec<_> = devices.iter().chain(&staying).map(|device| (token.as_str(), device)).collect();
    assert_eq!(system.open_tunnels(&weaver, &all, &[])?, [(200, MANY + 4)].into());

    let revoked = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = staying
            .iter()
            .map(|device| {
                scope.spawn(|| -> Result<usize> {
                    let mut opened = 0;
                    while !revoked.load(Ordering::Relaxed) {
                        let answer = system.open_tunnel(&token, &weaver, device)?;
                        ensure!(answer.status == 200, "{answer:?}");
                        opened += 1;
                    }
                    Ok(opened)
                })
            })
            .collect();
        let revoking = devices.iter().try_for_each(|device| {
            let answer = system.request(Some(&token), "DELETE", &format!("/api/devices/{}", device.in_url()), None)?;
            ensure!(answer.status == 204, "{answer:?}");
            Ok(())
        });
        revoked.store(true, Ordering::Relaxed);
        for client in clients {
            let opened = client.join().map_err(|_| anyhow::anyhow!("a client"))??;
            ensure!(opened > 10, "only {opened} tunnels were opened at the same time");
        }
        revoking
    })?;

    // On the relay, without a place of theirs and without a word to the agent.
    for device in &devices {
        let path = format!("/api/relay?key={}", device.in_url());
        let answer = system.request_with(Some(&token), "GET", &path, None, &UPGRADE)?;
        assert_eq!((answer.status, answer.code()), (403, "forbidden"));
    }
    let agent_of = |weaver| -> Result<Vec<u8>> {
        let answer = system.open_tunnel(&token, weaver, &staying[0])?;
        Ok(STANDARD.decode(answer.body["peer_key"].as_str().context("the agent's key")?)?)
    };
    let (agent, others_agent) = (agent_of(&weaver)?, agent_of(&other)?);
    let again: Vec<_> = devices.iter().map(|device| (token.as_str(), device)).collect();
    assert_eq!(system.open_tunnels(&other, &again, &[])?, [(200, MANY)].into());
    let forwarded = || -> Result<usize> {
        let text = api::metrics(&metrics)?;
        let line = text.lines().find_map(|line| line.strip_prefix("loom_relay_bytes_total "));
        Ok(line.context("the relay's bytes")?.trim().parse()?)
    };
    let before = forwarded()?;
    let (large, small) = (relay_frame(&agent, 1000), relay_frame(&others_agent, 1));
    let mut open = Vec::new();
    for device in &devices {
        let path = format!("/api/relay?key={}", device.in_url());
        let mut place = system.web_socket(&token, &path, Some("loom.relay.v1"))?;
        for frame in [&large, &small] {
            place.send(Message::binary(frame.clone()))?;
        }
        open.push(place);
    }
    let wanted = before + MANY * small.len();
    eventually("what is for the other weaver to be forwarded", TIMEOUT, || Ok((forwarded()? >= wanted).then_some(())))?;
    assert_eq!(forwarded()?, wanted, "something was forwarded to the weaver that they must not reach");
    let path = format!("/api/relay?key={}", staying[0].in_url());
    system.web_socket(&token, &path, Some("loom.relay.v1"))?.send(Message::binary(large.clone()))?;
    let wanted = wanted + large.len();
    eventually("what may be sent to be forwarded", TIMEOUT, || Ok((forwarded()? == wanted).then_some(())))?;

    // In the agent, also in one that asks anew.
    let wanted: BTreeSet<_> = staying.iter().map(KeyPair::public).collect();
    let only_the_others = || {
        eventually("only the others to be admitted", TIMEOUT, || {
            Ok((system.admitted_devices(&weaver)? == wanted).then_some(()))
        })
    };
    only_the_others()?;
    system.restart_sidecar(&weaver)?;
    only_the_others()?;
    drop(open);
    system.stop()
}

#[test]
fn loom_says_why_it_was_cut_off_and_what_to_do() -> Result<()> {
    let colleague = Colleague::new()?;
    let (login, weaver) = (&colleague.login, &colleague.weaver);
    let mut attached = Terminal::spawn(&colleague.loom(login, "direct", &["attach", &weaver.id]))?;
    attached.send("echo in-$((1+0))\r")?;
    attached.expect("in-1", TIMEOUT)?;
    let mut followers = Vec::new();
    for (command, first) in [("logs", "in-1"), ("events", "ready")] {
        let mut loom = colleague.loom(login, "direct", &[command, &weaver.id, "-f"]);
        let mut child = loom.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("standard output")?;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(first) {
            let mut more = [0; 4096];
            let length = output.read(&mut more)?;
            ensure!(length > 0, "loom {command} ended with {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&more[..length]);
        }
        followers.push((command, child, output));
    }
    colleague.revoke("tests")?;
    let began = Instant::now();
    assert_eq!(attached.wait(SOON)?.code(), Some(4));
    attached.expect("error: the attach has ended: your token was revoked", TIMEOUT)?;
    attached.expect("hint: log in again: loom login", TIMEOUT)?;
    for (command, mut child, output) in followers {
        let left = SOON.checked_sub(began.elapsed()).with_context(|| format!("loom {command} goes on"))?;
        let status = eventually(&format!("loom {command} to end"), left, || Ok(child.try_wait()?))?;
        drop(output);
        let mut error = String::new();
        child.stderr.take().context("standard error")?.read_to_string(&mut error)?;
        ensure!(error.contains("revoked") && error.contains("loom login"), "loom {command} says {error:?}");
        assert_eq!(status.code(), Some(4), "loom {command}: {error}");
    }
    Ok(())
}

#[test]
fn a_logs_stream_that_the_server_cuts_does_not_look_complete() -> Result<()> {
    let mut system = System::start()?;
    let weaver = system.new_weaver(&["--", "sh", "-c", "echo begun; exec sleep 1000"])?;
    let mut loom = system.loom(&["logs", &weaver.id, "-f"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut begun = [0; 5];
    loom.stdout.as_mut().context("standard output")?.read_exact(&mut begun)?;
    system.stop_server()?;
    let output = loom.wait_with_output()?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    says(&output, "was cut off")?;
    system.start_server()?;
    system.stop()
}

#[test]
fn what_an_agent_has_opened_ends_when_it_registers_anew() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
    let (mut link, mut relay) = (agent.connect()?, relay_place(&system, &agent)?);
    // A stream, which it dials for somebody who attaches.
    let (mut attached, mut stream) = thread::scope(|scope| -> Result<_> {
        let attaching = scope.spawn(|| system.attach_socket(&weaver, Some("loom.attach.v2")));
        let wanted = link.hear("open_stream")?;
        let stream = agent.dial(wanted["stream"].as_str().context("a stream")?)?;
        Ok((attaching.join().map_err(|_| anyhow::anyhow!("attaching"))??, stream))
    })?;
    let old = agent.token.clone();
    agent.register("0.1.0")?;
    let began = Instant::now();
    let left = |what: &str| SOON.checked_sub(began.elapsed()).with_context(|| format!("{what} goes on"));
    assert_eq!(ends(&mut relay, left("the relay")?).context("the relay")?.1, UNAUTHORIZED.0.into());
    assert_eq!(ends(&mut stream, left("the stream")?).context("the stream")?.1, Some(1000));
    // Whoever is attached comes back by way of the new one.
    assert_eq!(ends(&mut attached, left("attach")?).context("attach")?.1, Some(1012));
    link.ended()?;
    left("the control link")?;
    for path in ["/api/agent/control".to_owned(), format!("/api/relay?key={}", agent.keys.in_url())] {
        let refused = system.request_with(Some(&old), "GET", &path, None, &UPGRADE)?;
        assert_eq!((refused.status, refused.code()), (401, "unauthorized"), "{path}");
    }
    // What the new token opens stays.
    let (mut link, mut relay) = (agent.connect()?, relay_place(&system, &agent)?);
    ensure!(ends(&mut relay, SOON).is_err(), "the new place on the relay ended");
    link.tell("cloning", "still here")?;
    drop(link);
    drop(agent);
    system.stop()
}

#[test]
fn an_agents_connections_end_with_its_weaver() -> Result<()> {
    let system = System::start()?;
    for (arguments, ends_itself) in [(&[][..], false), (&["--ttl", "8s"][..], true)] {
        let weaver = system.new_weaver(arguments)?;
        let agent = Agent::in_place_of_the_real_one(&system, &weaver)?;
        let (link, mut relay) = (agent.connect()?, relay_place(&system, &agent)?);
        if !ends_itself {
            system.run(&["delete", "--yes", &weaver.id])?;
        }
        // Its deadline, or the deletion; a weaver gets some seconds to end in.
        ends(&mut relay, TIMEOUT).with_context(|| format!("the relay's place of a weaver {arguments:?}"))?;
        link.ended()?;
        for path in ["/api/agent/control".to_owned(), format!("/api/relay?key={}", agent.keys.in_url())] {
            let refused = system.request_with(Some(&agent.token), "GET", &path, None, &UPGRADE)?;
            ensure!(refused.status >= 400, "{path}: {refused:?}");
        }
    }
    system.stop()
}

/// The agent's place on the relay.
fn relay_place(system: &System, agent: &Agent<'_>) -> Result<WebSocket<TcpStream>> {
    system.web_socket(&agent.token, &format!("/api/relay?key={}", agent.keys.in_url()), Some("loom.relay.v1"))
}

/// A frame for the relay with one packet of `length` bytes (docs/protocols.md).
fn relay_frame(to: &[u8], length: u16) -> Vec<u8> {
    [&[1, 1], to, &length.to_be_bytes(), &vec![0xff; length.into()]].concat()
}

#[test]
fn connections_of_one_user_are_limited() -> Result<()> {
    let system = System::start_with(&[("LOOM_SERVER_MAX_USER_CONNECTIONS", "2")])?;
    let weaver = system.new_weaver(&[])?;
    let _open = [system.attach_socket(&weaver, None)?, system.attach_socket(&weaver, None)?];
    let path = format!("/api/weavers/{}/attach", weaver.id);
    let refused = system.request_with(Some(&system.admin_token()?), "GET", &path, None, &UPGRADE)?;
    assert_eq!((refused.status, refused.code()), (429, "too_many_connections"));
    Ok(())
}
