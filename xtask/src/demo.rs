//! `cargo xtask demo`: runs the main scenario once, on this machine.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loom_tests::{System, Weaver, postgres};

use crate::{build, tools};

/// Shows a weaver end to end.
#[derive(Args)]
pub(crate) struct Options {
    /// Leaves the server, the weaver and the tunnel running, and says how to use and end them.
    #[arg(long)]
    keep: bool,
}

/// Builds, then goes through the tour of the README.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_demo()?;
    let binaries = build::binaries(false)?;

    step("Start loom-server: SQLite, the local backend, loopback, and a directory of repositories to clone from");
    let repositories = repositories()?;
    let offered = repositories.path().to_string_lossy();
    let mut system = System::start_from(&binaries, &[("LOOM_SERVER_LOCAL_REPOSITORIES", &*offered)])?;
    say(&format!("it listens at {}", system.url()));

    step("Log in: device code, approved on the server's own page");
    log_in(&system)?;

    step("Make a weaver with a git repository in it");
    let repository = make_repository(repositories.path())?;
    let weaver = make_weaver(&system, &repository)?;
    show(&system, &["ps"])?;

    step("Open the WireGuard tunnel, in user space");
    show(&system, &["tunnel", "up", "demo"])?;

    step("Run a command over loom ssh");
    show(&system, &["ssh", "demo", "--", "id; pwd; cat README"])?;

    step("Start PostgreSQL in the weaver, on its localhost only, and ask it from outside through the tunnel");
    system.start_postgres(&weaver)?;
    let address = system.local_address(&weaver)?;
    loom_tests::eventually("the database's port to appear", loom_tests::system::TIMEOUT, || {
        Ok(std::net::TcpStream::connect((address.as_str(), postgres::PORT)).is_ok().then_some(()))
    })?;
    say(&format!("$ psql -h {address} -U loom postgres -c 'select version()'"));
    say(&system.psql(&address, postgres::PORT, "select version()")?);
    show(&system, &["tunnel", "status", "demo"])?;

    if options.keep {
        leave_running(&mut system, &address);
        return Ok(());
    }
    step("Delete the weaver, and leave nothing behind");
    system.stop()?;
    println!("\nThe demo is over. To keep it and play with it: cargo xtask demo --keep");
    Ok(())
}

/// `loom login`, with the part of the person at the browser played by `curl`.
fn log_in(system: &System) -> Result<()> {
    let mut login = system.loom(&["login", "--no-browser"]).stderr(Stdio::piped()).spawn()?;
    let stderr = login.stderr.take().context("standard error was piped")?;
    let mut approved = false;
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        say(&line);
        if let (false, Some(code)) = (approved, find_user_code(&line)) {
            system.approve_login(code, &system.sign_in_token()?)?;
            approved = true;
        }
    }
    ensure!(login.wait()?.success(), "the login failed");
    Ok(())
}

/// A user code is two groups of four letters: `BCDF-GHJK`.
fn find_user_code(line: &str) -> Option<&str> {
    line.split(|character: char| !character.is_ascii_uppercase() && character != '-')
        .find(|word| word.len() == 9 && word.as_bytes()[4] == b'-' && word.matches('-').count() == 1)
}

/// A directory that the weaver's user can read.
fn repositories() -> Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    let readable = std::fs::Permissions::from_mode(0o755);
    Ok(tempfile::Builder::new().prefix("loom-repositories-").permissions(readable).tempdir_in("/tmp")?)
}

fn make_repository(repositories: &Path) -> Result<String> {
    let directory = repositories.join("project");
    let script = "set -e; git init -q -b main .; echo 'Hello from the repository' > README; git add README; \
                  git -c user.name=Loom -c user.email=loom@example.org commit -q -m 'A first commit'";
    std::fs::create_dir(&directory)?;
    let status = Command::new("sh").args(["-c", script]).current_dir(&directory).status()?;
    ensure!(status.success(), "making a git repository failed");
    Ok(format!("file://{}", directory.display()))
}

fn make_weaver(system: &System, repository: &str) -> Result<Weaver> {
    let arguments = ["new", "--no-attach", "--name", "demo", "--repo", repository];
    say(&format!("$ loom {}", arguments.join(" ")));
    let start = Instant::now();
    let output = system.loom(&arguments).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "making a weaver failed");
    say(&format!("ready after {:.1} s", start.elapsed().as_secs_f32()));
    Ok(Weaver { id: String::from_utf8(output.stdout)?.trim().to_owned() })
}

fn leave_running(system: &mut System, address: &str) {
    step("Everything goes on running. To go on with it, in this shell:");
    for (name, value) in system.environment() {
        println!("  export {name}={value}");
    }
    println!("  alias loom={}", system.loom_binary());
    println!();
    println!("  loom attach demo                       # the main terminal; Ctrl+D leaves it running");
    println!("  loom ssh demo                          # a shell of your own");
    println!("  psql -h {address} -U loom postgres     # the database inside");
    println!("  loom tunnel status demo");
    println!("  loom new                               # another weaver");
    println!();
    let pid = system.server_pid().unwrap_or_default();
    let directory = system.keep().display().to_string();
    println!("To end it:");
    println!("  loom delete --yes demo; loom tunnel down; kill {pid}; rm -r {directory}");
}

fn show(system: &System, arguments: &[&str]) -> Result<()> {
    say(&format!("$ loom {}", arguments.join(" ")));
    let status = system.loom(arguments).status()?;
    ensure!(status.success(), "loom {arguments:?} failed");
    Ok(())
}

fn step(what: &str) {
    println!("\n==> {what}");
}

fn say(what: &str) {
    println!("    {what}");
}
