//! Another WireGuard implementation as a weaver's client: wireguard-go on a TUN device of this machine, which needs root.
//! It is configured through its own protocol (the WireGuard cross-platform interface), without `wg`.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::{System, Weaver, keys::KeyPair, system::TIMEOUT, tools, wait::eventually};

/// A running wireguard-go with one peer. Its interface goes with it.
pub struct WireGuardGo {
    process: Child,
    /// The interface's name.
    pub interface: String,
    /// The weaver's address inside the tunnel.
    pub peer_address: String,
}

impl WireGuardGo {
    /// Has the server admit a new device to the weaver, and connects it straight to the agent's UDP port.
    pub fn connect(system: &System, weaver: &Weaver) -> Result<Self> {
        let keys = KeyPair::generate()?;
        let answer = system.open_tunnel(&system.admin_token()?, weaver, &keys)?;
        ensure!(answer.status == 200, "opening a tunnel: {answer:?}");
        let grant = answer.body;
        let text = |name: &str| grant[name].as_str().with_context(|| format!("no {name} in the grant"));
        let endpoint = grant["candidates"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .find(|candidate| !candidate.starts_with('['))
            .context("the agent has no IPv4 candidate")?
            .to_owned();
        let peer_address = text("peer_address")?.to_owned();

        let interface = format!("loomwg{}", std::process::id() % 100_000);
        let process = Command::new(tools::find("wireguard")?)
            .args(["-f", &interface])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting wireguard-go")?;
        let running = Self { process, interface, peer_address };

        let mut settings = String::from("set=1\n");
        writeln!(settings, "private_key={}", hex(keys.private.as_bytes()))?;
        writeln!(settings, "public_key={}", hex(&STANDARD.decode(text("peer_key")?)?))?;
        writeln!(settings, "preshared_key={}", hex(&STANDARD.decode(text("preshared_key")?)?))?;
        writeln!(settings, "endpoint={endpoint}")?;
        writeln!(settings, "allowed_ip={}/128\n", running.peer_address)?;
        running.configure(&settings)?;
        running.ip(&[
            "-6",
            "address",
            "add",
            &format!("{}/128", text("device_address")?),
            "dev",
            &running.interface,
        ])?;
        running.ip(&["link", "set", &running.interface, "mtu", "1280", "up"])?;
        running.ip(&["-6", "route", "add", &format!("{}/128", running.peer_address), "dev", &running.interface])?;
        Ok(running)
    }

    fn configure(&self, settings: &str) -> Result<()> {
        let path = format!("/var/run/wireguard/{}.sock", self.interface);
        let mut socket =
            eventually("wireguard-go's configuration socket", TIMEOUT, || Ok(UnixStream::connect(&path).ok()))?;
        socket.write_all(settings.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(socket).read_line(&mut answer)?;
        ensure!(answer.trim() == "errno=0", "wireguard-go refused its settings: {answer}");
        Ok(())
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new("ip").args(arguments).output()?;
        ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for WireGuardGo {
    fn drop(&mut self) {
        // The interface is the process's own: it goes when the process does.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(format!("/var/run/wireguard/{}.sock", self.interface));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
