//! `loom tunnel up`, `status` and `down`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use clap_complete::ArgValueCandidates;

use crate::{
    completion,
    context::Context,
    daemon::{
        self, client,
        protocol::{Forward, Operation, TunnelStatus},
    },
    error::{Exit, Result},
    output,
    progress::Progress,
};

/// Reach a weaver's ports from this machine, privately
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom tunnel up ID        the weaver's ports, on a loopback address of its own
  loom tunnel status       path, latency, bytes and forwards of each
  loom tunnel down         all of them")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

/// The background process takes no arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct DaemonArgs {}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Bring a weaver's tunnel up
    Up(Up),
    /// Show the tunnels: path, latency, bytes, forwards
    Status(Status),
    /// Take a tunnel down, or all
    Down(Down),
}

/// Bring a weaver's tunnel up
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The ports that the weaver's programs listen on, on its localhost too, appear on a loopback address of the weaver's own, under the same
numbers; new ones follow within a second. No root is needed, and nobody else on the network sees them.

Examples:
  loom tunnel up ID                          then: psql -h 127.… , http://127.…:8080
  loom tunnel up ID -L 8080                  the weaver's port 8080 as localhost:8080
  loom tunnel up ID -L 0.0.0.0:9000:8080     another address and port here
  loom tunnel up ID --socks 127.0.0.1:1080   then: curl --proxy socks5h://127.0.0.1:1080 http://ID.loom:8080/")]
struct Up {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    weaver: String,
    /// Listen on a local port, and forward to a port of the weaver
    #[arg(short = 'L', value_name = "[ADDR:]PORT[:REMOTE]", value_parser = parse_forward)]
    forward: Vec<Forward>,
    /// Serve SOCKS5 on this address, for names such as ID.loom
    #[arg(long, value_name = "ADDR:PORT")]
    socks: Option<SocketAddr>,
    /// Print the tunnel as JSON
    #[arg(long)]
    json: bool,
}

/// Show the tunnels: path, latency, bytes, forwards
#[derive(Debug, clap::Args)]
struct Status {
    /// Only this weaver's tunnel
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    weaver: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take a tunnel down, or all
#[derive(Debug, clap::Args)]
struct Down {
    /// Only this weaver's tunnel
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    weaver: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    match &args.command {
        Command::Up(args) => up(context, args).await,
        Command::Status(args) => status(context, args).await,
        Command::Down(args) => {
            client::tunnels_if_running(context, Operation::Down { weaver: args.weaver.clone() }).await?;
            Ok(Exit::OK)
        }
    }
}

/// Runs the daemon in this process.
pub(crate) async fn run_daemon(_context: &Context, _args: &DaemonArgs) -> Result<Exit> {
    Box::pin(daemon::run()).await
}

async fn up(context: &Context, args: &Up) -> Result<Exit> {
    let progress = Progress::start("bringing the tunnel up");
    let operation = Operation::Up { weaver: args.weaver.clone(), forwards: args.forward.clone(), socks: args.socks };
    let tunnels = client::tunnels(context, operation).await?;
    drop(progress);
    show(&tunnels, args.json)
}

async fn status(context: &Context, args: &Status) -> Result<Exit> {
    let one = args.weaver.is_some();
    let tunnels = if one {
        client::tunnels(context, Operation::Status { weaver: args.weaver.clone() }).await?
    } else {
        client::tunnels_if_running(context, Operation::Status { weaver: None }).await?
    };
    if tunnels.is_empty() && !args.json {
        output::note("no tunnel is up; to bring one up: loom tunnel up ID");
        return Ok(Exit::OK);
    }
    match (tunnels.first(), one && args.json) {
        (Some(tunnel), true) => output::json(tunnel).map(|()| Exit::OK),
        _ => show(&tunnels, args.json),
    }
}

fn show(tunnels: &[TunnelStatus], json: bool) -> Result<Exit> {
    if json {
        output::json(&tunnels)?;
    } else {
        for tunnel in tunnels {
            output::line(&describe(tunnel))?;
        }
    }
    Ok(Exit::OK)
}

/// Formats a tunnel's status for people.
fn describe(tunnel: &TunnelStatus) -> String {
    let path = match (&tunnel.endpoint, tunnel.path.as_str()) {
        (Some(endpoint), _) => format!("direct to {endpoint}"),
        (None, "relay") => "through the server's relay".to_owned(),
        _ => "no path works now".to_owned(),
    };
    let latency = tunnel.latency_ms.map(|latency| format!(", {latency:.1} ms")).unwrap_or_default();
    let age = |age: Option<u64>| age.map_or_else(|| "never".to_owned(), |seconds| format!("{seconds} s ago"));
    let mut lines = vec![
        tunnel.weaver_id.clone(),
        format!("  path       {path}{latency}"),
        format!("  handshake  {}, last heard {}", age(tunnel.last_handshake_secs), age(tunnel.last_received_secs)),
        format!("  traffic    {} bytes sent, {} received", tunnel.sent_bytes, tunnel.received_bytes),
    ];
    if let Some(address) = &tunnel.address {
        lines.push(format!("  address    {address}"));
    }
    for forward in &tunnel.forwards {
        let problem = forward.error.as_ref().map(|error| format!("  not open: {error}")).unwrap_or_default();
        lines.push(format!("  forward    {} -> {}{problem}", forward.local, forward.remote_port));
    }
    if tunnel.up && tunnel.forwards.is_empty() {
        lines.push("  forward    nothing listens in the weaver yet; its ports will appear here".to_owned());
    }
    if let Some(socks) = tunnel.socks {
        lines.push(format!("  socks      {socks}"));
    }
    if let Some(problem) = &tunnel.problem {
        lines.push(format!("  problem    {problem}"));
    }
    lines.join("\n")
}

/// Parses `[ADDR:]PORT[:REMOTE]`, with an IPv6 address in brackets.
fn parse_forward(text: &str) -> std::result::Result<Forward, String> {
    let bad = || format!("{text:?} is not [ADDR:]PORT[:REMOTE]");
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(bad);
    let (address, ports) = match text.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
        Some((address, ports)) => (address.parse::<IpAddr>().map_err(|_| bad())?, ports),
        None => match text.split_once(':') {
            Some((address, ports)) if address.contains('.') => (address.parse().map_err(|_| bad())?, ports),
            _ => (IpAddr::V4(Ipv4Addr::LOCALHOST), text),
        },
    };
    let (local, remote) = ports.split_once(':').unwrap_or((ports, ports));
    Ok(Forward { local: SocketAddr::new(address, port(local)?), remote: port(remote)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_in_every_form() {
        for (text, local, remote) in [
            ("8080", "127.0.0.1:8080", 8080),
            ("9000:8080", "127.0.0.1:9000", 8080),
            ("0.0.0.0:9000:8080", "0.0.0.0:9000", 8080),
            ("127.0.0.2:9000", "127.0.0.2:9000", 9000),
            ("[::1]:9000:80", "[::1]:9000", 80),
        ] {
            assert_eq!(parse_forward(text), Ok(Forward { local: local.parse().unwrap(), remote }), "{text}");
        }
        for bad in ["", "0", "x", "1:2:3", "8080:", ":8080", "1.2.3:4", "70000", "[::1]8080", "8080:0"] {
            assert!(parse_forward(bad).is_err(), "{bad}");
        }
    }
}
