//! What the server holds: a thousand real weavers with their agents connected, as many devices on its relay, many clients
//! at once, and strangers who attack it meanwhile.
//!
//! The figures are also a check: [`measure`] fails when the server misses one of its floors.

mod fleet;
mod http;
mod load;
mod logins;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::strangers::{Stranger, attack};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

use self::{
    fleet::Fleet,
    load::{Client, Tally},
};
use crate::product::{mebibytes, memory, processor_seconds};

/// Weavers that run, and devices that are connected.
const WEAVERS: usize = 1000;
/// Clients that ask at the same time, and how long. Eight keep two cores busy, so that each waits for the others; with
/// four there is still time to spare.
const CLIENTS: usize = 8;
const FEW: usize = 4;
const SHORT: Duration = Duration::from_secs(10);
/// The same for the crowd.
const CROWD: usize = 64;
const MINUTE: Duration = Duration::from_secs(60);
/// How long the server is watched at rest.
const REST: Duration = Duration::from_secs(20);
/// How long an attack is watched before anybody else asks for something.
const ALONE: Duration = Duration::from_secs(10);
/// The kinds of requests.
const LIST: &str = "`GET /api/weavers`, 1,000 listed";
const CREATE: &str = "`POST /api/weavers`";
const DELETE: &str = "`DELETE /api/weavers/ID`";

/// What was measured: rows of tables in Markdown.
#[derive(Default)]
struct Report {
    resources: Vec<String>,
    requests: Vec<String>,
    logins: Vec<String>,
    missed: Vec<String>,
}

/// Measures all of it, in seven minutes.
pub(crate) fn measure() -> Result<()> {
    raise_limit_of_files()?;
    let mut report = Report::default();
    let result = measure_into(&mut report);
    report.print();
    result?;
    ensure!(report.missed.is_empty(), "floors were missed: {}", report.missed.join("; "));
    Ok(())
}

fn measure_into(report: &mut Report) -> Result<()> {
    let mut fleet = Fleet::start()?;
    report.at_rest("no weaver", &fleet)?;
    let live = load::run(fleet.server, &fleet.token, CLIENTS, SHORT, |client| {
        client.request("`GET /livez`, the ceiling", "GET", "/livez", "").map(drop)
    })?;
    report.requests("8 clients", &live);

    let start = Instant::now();
    fleet.make_weavers(WEAVERS)?;
    eprintln!("{WEAVERS} weavers run after {}", seconds(start.elapsed()));
    let resident = report.at_rest("1,000 weavers, all connected", &fleet)?;
    report.floor("1,000 connected weavers under 150 MiB", resident < 150 << 20);
    fleet.connect_devices()?;
    report.at_rest("and 1,000 devices: 2,000 relay connections", &fleet)?;

    report.requests("1 client", &list_load(&fleet, 1)?);
    let lists = list_load(&fleet, FEW)?;
    report.requests("4 clients", &lists);
    report.floor("list p99 under 50 ms with 4 clients", lists.p99(LIST) < Duration::from_millis(50));
    report.requests("8 clients", &list_load(&fleet, CLIENTS)?);
    let changes = change_load(&fleet)?;
    report.requests("8 clients", &changes);
    fleet.settle(WEAVERS)?;

    eprintln!("{CROWD} clients for a minute");
    let crowd = load::run(fleet.server, &fleet.token, CROWD, MINUTE, |client| {
        list(client, &fleet)?;
        change(client)
    })?;
    report.requests("64 clients", &crowd);
    let failed = crowd.count(|status| status >= 500);
    report.floor("no request answered 5xx under 64 clients for a minute", failed == 0);
    fleet.settle(WEAVERS)?;
    report.at_rest("afterwards", &fleet)?;

    under_attack(&fleet, report, "silent connections", Stranger::connect)?;
    under_attack(&fleet, report, "half heads", Stranger::send_half_a_head)?;
    under_attack(&fleet, report, "unfinished bodies", Stranger::send_an_unfinished_body)?;
    logins::measure(&fleet, report)?;
    let connected = fleet.connected()?;
    report.floor("agents and devices stay connected throughout", connected == (WEAVERS, WEAVERS));
    let elapsed = fleet.stop()?;
    eprintln!("all weavers were deleted and gone after {}", seconds(elapsed));
    Ok(())
}

fn list(client: &mut Client<'_>, fleet: &Fleet) -> Result<()> {
    let (status, body) = client.request(LIST, "GET", &fleet.list(), "")?;
    // Each has an id of 38 bytes, and much more.
    ensure!(status != 200 || body.len() > WEAVERS * 38, "a list of only {} bytes", body.len());
    Ok(())
}

/// Makes a weaver and deletes it, whatever became of it meanwhile.
fn change(client: &mut Client<'_>) -> Result<()> {
    let (status, body) = client.request(CREATE, "POST", "/api/weavers", r#"{"command":["sleep","100000"]}"#)?;
    if status != 201 {
        return Ok(());
    }
    let made: Value = serde_json::from_slice(body)?;
    let path = format!("/api/weavers/{}", made["id"].as_str().context("an id")?);
    client.request(DELETE, "DELETE", &path, "").map(drop)
}

fn list_load(fleet: &Fleet, clients: usize) -> Result<Tally> {
    load::run(fleet.server, &fleet.token, clients, SHORT, |client| list(client, fleet))?.all_succeeded()
}

fn change_load(fleet: &Fleet) -> Result<Tally> {
    load::run(fleet.server, &fleet.token, CLIENTS, SHORT, change)?.all_succeeded()
}

/// Has strangers attack the server, first alone, then while others list weavers, then while they make and delete them.
fn under_attack(
    fleet: &Fleet,
    report: &mut Report,
    what: &str,
    open: impl Fn(&Stranger) -> Result<std::net::TcpStream> + Sync,
) -> Result<()> {
    eprintln!("attack: {what}");
    // From here on the kernel keeps the peak anew (proc(5)).
    std::fs::write(format!("/proc/{}/clear_refs", fleet.pid), "5")?;
    let before = memory(fleet.pid)?.resident;
    let mut rows = None;
    attack(fleet.server, ALONE + SHORT * 2, open, || {
        if rows.is_none() {
            let busy = processor_share(fleet.pid, ALONE)?;
            rows = Some((busy, list_load(fleet, CLIENTS)?, change_load(fleet)?));
        }
        Ok(())
    })?;
    let (busy, lists, changes) = rows.context("the attack was too short")?;
    report.requests(&format!("8 clients, {what}"), &lists);
    report.requests(&format!("8 clients, {what}"), &changes);
    let peak = memory(fleet.pid)?.peak;
    report.resources.push(format!("| under attack: {what} | {} at most | | {busy} |", mebibytes(peak)));
    report.floor(&format!("{what} take less than 64 MiB"), peak < before + (64 << 20));
    fleet.settle(WEAVERS)
}

/// How much of one core a process takes, watched for a while.
fn processor_share(pid: i32, duration: Duration) -> Result<String> {
    let before = processor_seconds(pid)?;
    // What is measured is what happens by itself meanwhile.
    thread::sleep(duration);
    let share = (processor_seconds(pid)? - before) / duration.as_secs_f64();
    Ok(format!("{:.1} %", share * 100.0))
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// Each weaver's two connections and each device's are files of the server's.
fn raise_limit_of_files() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    ensure!(maximum.is_none_or(|files| files >= 16_384), "this needs 16,384 open files; see ulimit -Hn");
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

impl Report {
    /// Watches the server while nothing is asked of it; its resident memory.
    fn at_rest(&mut self, what: &str, fleet: &Fleet) -> Result<u64> {
        eprintln!("at rest: {what}");
        let busy = processor_share(fleet.pid, REST)?;
        let memory = memory(fleet.pid)?;
        let (resident, private) = (mebibytes(memory.resident), mebibytes(memory.private));
        self.resources.push(format!("| {what} | {resident} | {private} | {busy} |"));
        Ok(memory.resident)
    }

    fn requests(&mut self, load: &str, tally: &Tally) {
        self.requests.extend(tally.rows(load));
    }

    fn floor(&mut self, floor: &str, holds: bool) {
        if !holds {
            self.missed.push(floor.to_owned());
        }
    }

    fn print(&self) {
        for (head, rows) in [
            (
                "| server with | resident | private | processor, of one core |\n| --- | --- | --- | --- |",
                &self.resources,
            ),
            (
                "| load | request | per second | median | p99 | worst |\n| --- | --- | --- | --- | --- | --- |",
                &self.requests,
            ),
            (
                "| device logins | took | recorded | database grew by | honest login beside it |\n\
                 | --- | --- | --- | --- | --- |",
                &self.logins,
            ),
        ] {
            println!("\n{head}");
            rows.iter().for_each(|row| println!("{row}"));
        }
    }
}
