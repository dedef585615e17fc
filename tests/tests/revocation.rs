//! Whoever loses a right loses everything that was opened with it, within a second: a token revoked or expired, a user
//! suspended or removed, a membership ended.

use std::{
    fs,
    io::Write as _,
    net::TcpStream,
    os::unix::fs::DirBuilderExt as _,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use loom_tests::{System, Weaver, api::UPGRADE, eventually, processes, system::PATIENCE};
use rustix::process::Signal;
use serde_json::json;
use tungstenite::WebSocket;

/// The product says a second; the rest is the machine's.
const SOON: Duration = Duration::from_secs(2);

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
                .stderr(Stdio::null())
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
            eventually("the shells to run", PATIENCE, || Ok(self.running(path).then_some(())))?;
        }
        let status = self.loom(token, "direct", &["tunnel", "status", "--json"]).output()?;
        let status = String::from_utf8(status.stdout)?;
        ensure!(status.contains("\"direct\""), "on one machine the path is direct: {status}");
        Ok(opened)
    }

    /// Checks that everything ends soon, and that nothing can be opened again.
    fn all_ends(&self, token: &str, mut opened: Opened) -> Result<Output> {
        let began = Instant::now();
        let left = |what: &str| SOON.checked_sub(began.elapsed()).with_context(|| format!("{what} goes on"));
        opened.attached.get_ref().set_read_timeout(Some(left("attach")?))?;
        loop {
            match opened.attached.read() {
                Ok(message) if message.is_close() => break,
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    bail!("attach goes on after {:?}", began.elapsed());
                }
                Err(_) => break,
            }
        }
        let [direct, relayed] = &mut opened.shells;
        let children =
            [("events", &mut opened.events), ("logs", &mut opened.logs), ("ssh", direct), ("relayed ssh", relayed)];
        for (what, child) in children {
            eventually(&format!("{what} to end"), left(what)?, || Ok(child.try_wait()?))?;
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
    let list = system.manage(&["token", "list", "--user", "ada"])?;
    let row = list.lines().find(|line| line.contains("lost laptop")).context("the token's row")?;
    system.manage(&["token", "revoke", row.split_whitespace().next().context("its number")?])?;
    says(&colleague.all_ends(token, opened)?, "revoked")?;
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
    eventually("the token to expire", PATIENCE, || Ok((Instant::now() >= expires).then_some(())))?;
    says(&colleague.all_ends(token, opened)?, "expired")
}

#[test]
fn a_suspended_user_is_shut_out() -> Result<()> {
    let colleague = Colleague::new()?;
    let opened = colleague.open(&colleague.login)?;
    colleague.system.manage(&["user", "suspend", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened)?, "suspended")
}

#[test]
fn a_removed_user_is_shut_out_and_the_weavers_in_the_personal_organisation_end() -> Result<()> {
    let colleague = Colleague::new()?;
    let system = &colleague.system;
    let own = system.request(Some(&colleague.login), "POST", "/api/weavers", Some("{}"))?;
    let own = Weaver { id: own.body["id"].as_str().context("an id")?.to_owned() };
    let opened = colleague.open(&colleague.login)?;
    system.manage(&["user", "remove", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened)?, "revoked")?;
    eventually(
        "the personal weaver to be removed",
        PATIENCE,
        || Ok((!system.has_left_something(&own)?).then_some(())),
    )?;
    assert!(system.has_left_something(&colleague.weaver)?, "the organisation's weaver stays");
    Ok(())
}

#[test]
fn an_ended_membership_shuts_out_of_the_organisations_weavers() -> Result<()> {
    let colleague = Colleague::new()?;
    let opened = colleague.open(&colleague.login)?;
    colleague.system.manage(&["org", "remove-member", "engines", "ada"])?;
    says(&colleague.all_ends(&colleague.login, opened)?, "no weaver")?;
    let me = colleague.system.request(Some(&colleague.login), "GET", "/api/me", None)?;
    assert_eq!(me.status, 200, "the token is still good");
    Ok(())
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
