//! Strangers who begin device logins as fast as they can, and an honest user who logs in meanwhile.

use std::{
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{System, strangers::Stranger};

use super::{Report, fleet::Fleet, http::Connection, load::each, seconds};

/// Logins that the strangers begin.
const STARTS: usize = 24_000;
/// How many begin one at a time.
const STRANGERS: usize = 16;

/// Begins all the logins from one address, then each from an address of its own.
pub(super) fn measure(fleet: &Fleet, report: &mut Report) -> Result<()> {
    let honest = honest_login(&fleet.system)?;
    report.logins.push(format!("| an honest login alone | | | | {} |", seconds(honest)));
    let row = flood(fleet, "from one address", from_one_address)?;
    report.logins.push(row);
    let row = flood(fleet, "each from an address of its own", from_many_addresses)?;
    report.logins.push(row);
    Ok(())
}

/// Has strangers begin logins, and an honest user log in at the same time; a row of the table.
fn flood(fleet: &Fleet, what: &str, begin: impl Fn(SocketAddr, usize) -> Result<usize> + Sync) -> Result<String> {
    let before = fleet.system.database_size()?;
    let (begun, elapsed, honest) = thread::scope(|scope| {
        let honest = scope.spawn(|| honest_login(&fleet.system));
        let start = Instant::now();
        let begun = each(STRANGERS, |stranger| begin(fleet.server, stranger))?;
        let elapsed = start.elapsed();
        let honest = honest.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        anyhow::Ok((begun.iter().sum::<usize>(), elapsed, honest))
    })?;
    let honest = honest.map_or_else(|error| format!("refused: {error:#}"), seconds);
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let grown = fleet.system.database_size()?.saturating_sub(before) as f64 / f64::from(1 << 20);
    Ok(format!("| {STARTS} starts {what} | {} | {begun} | {grown:.1} MiB | {honest} |", seconds(elapsed)))
}

/// Begins a login; whether it was recorded.
fn begin(connection: &mut Connection) -> Result<bool> {
    let body = r#"{"client_name":"eve@laptop"}"#;
    let (status, answer) = connection.request("POST", "/api/login/device", "", body)?;
    ensure!(status == 200 || status == 429, "beginning a login: {status} {}", String::from_utf8_lossy(answer));
    Ok(status == 200)
}

fn from_one_address(server: SocketAddr, stranger: usize) -> Result<usize> {
    let stranger = Stranger { server, address: Ipv4Addr::new(127, 0, 0, 66), number: stranger };
    let mut connection = Connection::over(stranger.connect()?)?;
    let mut begun = 0;
    for _ in (stranger.number..STARTS).step_by(STRANGERS) {
        begun += usize::from(begin(&mut connection)?);
    }
    Ok(begun)
}

fn from_many_addresses(server: SocketAddr, stranger: usize) -> Result<usize> {
    let mut begun = 0;
    for number in (stranger..STARTS).step_by(STRANGERS) {
        let [_, high, middle, low] = u32::try_from(number)?.to_be_bytes();
        let stranger = Stranger { server, address: Ipv4Addr::new(127, 2 + high, middle, low), number };
        begun += usize::from(begin(&mut Connection::over(stranger.connect()?)?)?);
    }
    Ok(begun)
}

/// How long `loom login` takes when its user approves it at once.
fn honest_login(system: &System) -> Result<Duration> {
    let start = Instant::now();
    let mut login = system.loom(&["login", "--no-browser"]).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(login.stderr.take().context("standard error was piped")?).lines();
    let is_code = |line: &String| line.len() == 9 && line.as_bytes()[4] == b'-';
    let mut said = Vec::new();
    for line in lines.by_ref() {
        let line = line?.trim().to_owned();
        if is_code(&line) {
            system.approve_login(&line, &system.admin_token()?)?;
        }
        said.push(line);
    }
    ensure!(login.wait()?.success(), "{}", said.join(" "));
    Ok(start.elapsed())
}
