//! Measures Loom beside its peers in one run, and prints a table. `cargo xtask bench` builds for release and runs it;
//! `docs/benchmarks.md` says what the figures mean and what limits them.

mod kubernetes;
mod peers;
mod product;
mod server;
mod traffic;

use std::net::TcpStream;

use anyhow::{Result, bail, ensure};
use loom_tests::{eventually, system::TIMEOUT};

/// Seconds of each stream.
const SECONDS: u8 = 5;
/// Where the measured traffic is served.
const PORT: u16 = 8_900;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", port] => traffic::serve(port.parse()?),
        ["client", name, server] => print_row(name, server, PORT),
        [] => measure(""),
        [filter] => measure(filter),
        _ => bail!("usage: loom-bench [FILTER]"),
    }
}

/// Runs every group of measurements whose name contains `filter`.
fn measure(filter: &str) -> Result<()> {
    // Those want a cluster, which `cargo xtask bench kubernetes` starts.
    if filter.starts_with("kubernetes") {
        return kubernetes::measure(filter);
    }
    // It takes eight minutes and starts thousands of processes, so it is not part of a run of everything.
    if filter == "server" {
        return server::measure();
    }
    let wanted = |name: &str| name.contains(filter);
    if wanted("peers") {
        measure_peers()?;
    }
    if wanted("tunnel") {
        product::measure_tunnel()?;
    }
    if wanted("times") {
        product::measure_times()?;
    }
    if wanted("memory") {
        product::measure_memory()?;
    }
    Ok(())
}

/// The ceiling, and the nearest relative: raw TCP and wireguard-go over one virtual cable.
fn measure_peers() -> Result<()> {
    let mut cable = peers::Cable::new()?;
    cable.serve(PORT)?;
    row("raw TCP, virtual cable", &cable, peers::RAW[1])?;
    cable.start_wireguard_go()?;
    row("wireguard-go both sides (TUN)", &cable, peers::TUNNELLED[1])
}

/// The client has to run on host `a`: this program again, there.
fn row(name: &str, cable: &peers::Cable, server: &str) -> Result<()> {
    let program = std::env::current_exe()?;
    let status = cable.on(0, &program.to_string_lossy()).args(["client", name, server]).status()?;
    ensure!(status.success(), "measuring {name} failed");
    Ok(())
}

/// Measures one path, and prints its line.
pub(crate) fn print_row(name: &str, server: &str, port: u16) -> Result<()> {
    let server = (server, port);
    eventually("the measurement's server", TIMEOUT, || Ok(TcpStream::connect(server).is_ok().then_some(())))?;
    let latency = traffic::echo(server)?;
    let up = traffic::upload(server, SECONDS)?;
    let down = traffic::download(server, SECONDS)?;
    println!(
        "{name:<44} up {:>6.2} Gbit/s   down {:>6.2} Gbit/s   echo {:>8.3} ms median, {:>8.3} ms p99",
        up.gigabits,
        down.gigabits,
        latency.median.as_secs_f64() * 1e3,
        latency.p99.as_secs_f64() * 1e3,
    );
    Ok(())
}
