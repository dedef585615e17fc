//! Loom itself, through its real binaries.

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver,
    processes::{self, Memory},
    system::TIMEOUT,
    terminal::Terminal,
    wireguard_go::WireGuardGo,
};

use crate::{PORT, print_row};

/// How often each command is timed.
const ITERATIONS: usize = 10;
/// The end of a shell's prompt in the workspace.
const PROMPT: &str = ":/workspace$";
/// How many weavers the server's memory is measured with.
const WEAVERS: usize = 100;

/// One stream and the echo, from a local socket through daemon, tunnel and agent to a program in a weaver.
pub(crate) fn measure_tunnel() -> Result<()> {
    {
        let system = System::start()?;
        let weaver = system.new_weaver(&[])?;
        let _server = serve_in(&system, &weaver)?;
        system.run(&["tunnel", "up", &weaver.id])?;
        print_row("loom, user space both sides, direct", &system.local_address(&weaver)?, PORT)?;
        match WireGuardGo::connect(&system, &weaver) {
            Ok(client) => print_row("wireguard-go (TUN) to a loom agent, direct", &client.peer_address, PORT)?,
            Err(error) => println!("wireguard-go to a loom agent was not measured: {error:#}"),
        }
        let agent = system.sidecar(&weaver)?;
        println!("agent memory under this load, at its highest: {}", mebibytes(memory(agent.pid)?.peak));
        system.stop()?;
    }
    let system = System::start_with(&[("LOOM_SERVER_AGENT_UDP", "off")])?;
    let weaver = system.new_weaver(&[])?;
    let _server = serve_in(&system, &weaver)?;
    system.run(&["tunnel", "up", &weaver.id])?;
    print_row("loom, user space both sides, relayed", &system.local_address(&weaver)?, PORT)?;
    system.stop()
}

/// How long people wait.
pub(crate) fn measure_times() -> Result<()> {
    let system = System::start()?;
    let mut times = Vec::new();
    for _ in 0..ITERATIONS {
        let (terminal, elapsed) = new_until_prompt(&system, "timed")?;
        times.push(elapsed);
        drop(terminal);
        system.run(&["delete", "--yes", "timed"])?;
    }
    print_times("loom new until its prompt is there", times);

    let weaver = system.new_weaver(&[])?;
    let mut cold = Vec::new();
    for _ in 0..ITERATIONS {
        if let Some(daemon) = system.daemon() {
            daemon.kill();
        }
        cold.push(timed(|| system.run(&["ssh", &weaver.id, "--", "true"]))?.1);
    }
    print_times("loom ssh ID -- true, cold (no daemon)", cold);
    let warm = (0..ITERATIONS)
        .map(|_| Ok(timed(|| system.run(&["ssh", &weaver.id, "--", "true"]))?.1))
        .collect::<Result<_>>()?;
    print_times("loom ssh ID -- true, warm", warm);
    system.stop()
}

/// Makes a weaver, and says how long it took until its prompt was there.
pub(crate) fn new_until_prompt(system: &System, name: &str) -> Result<(Terminal, Duration)> {
    let new = system.loom(&["new", "--name", name]);
    timed(|| {
        let terminal = Terminal::spawn(&new)?;
        terminal.expect(PROMPT, TIMEOUT)?;
        Ok(terminal)
    })
}

/// What it costs to keep.
pub(crate) fn measure_memory() -> Result<()> {
    let system = System::start_with(&[("LOOM_SERVER_MAX_WEAVERS", "200")])?;
    let weaver = system.new_weaver(&[])?;
    println!("agent memory, idle: {}", mebibytes(memory(system.sidecar(&weaver)?.pid)?.resident));
    let server = system.server_pid().context("the server runs")?;
    println!("server memory with 1 weaver: {}", mebibytes(memory(server)?.resident));
    for _ in 1..WEAVERS {
        system.new_weaver(&[])?;
    }
    println!("server memory with {WEAVERS} weavers: {}", mebibytes(memory(server)?.resident));
    system.stop()
}

/// Copies this program into the weaver and serves the measured traffic there.
fn serve_in(system: &System, weaver: &Weaver) -> Result<Running> {
    let program = std::fs::read(std::env::current_exe()?)?;
    let copied = system.output_with_input(
        &["exec", &weaver.id, "--", "sh", "-c", "cat > ~/loom-bench && chmod +x ~/loom-bench"],
        &program,
    )?;
    ensure!(copied.status.success(), "copying: {}", String::from_utf8_lossy(&copied.stderr));
    let serve = format!("exec ~/loom-bench serve {PORT}");
    let child = system.loom(&["ssh", &weaver.id, "--", &serve]).stdout(Stdio::null()).spawn()?;
    let ports = || -> Result<Option<()>> {
        let described = system.describe(weaver)?;
        let ports = described["agent"]["ports"].as_array().cloned().unwrap_or_default();
        Ok(ports.iter().any(|port| *port == PORT).then_some(()))
    };
    loom_tests::eventually("the server in the weaver", TIMEOUT, ports)?;
    Ok(Running(child))
}

/// A child that ends with its owner.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn timed<T>(action: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let value = action()?;
    Ok((value, start.elapsed()))
}

pub(crate) fn print_times(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{name:<44} median {:>7.1} ms   best {:>7.1} ms   worst {:>7.1} ms",
        milliseconds(times[times.len() / 2]),
        milliseconds(times[0]),
        milliseconds(times[times.len() - 1]),
    );
}

pub(crate) fn memory(pid: i32) -> Result<Memory> {
    processes::memory(pid).context("the process has gone")
}

/// User and system time of a process (proc(5), fields 14 and 15 of `stat`), in seconds.
pub(crate) fn processor_seconds(pid: i32) -> Result<f64> {
    let fields = processes::stat(pid).context("the process has gone")?;
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    // Always a hundred to the second, for user space.
    Ok(ticks / 100.0)
}

pub(crate) fn mebibytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    format!("{mebibytes:.1} MiB")
}
