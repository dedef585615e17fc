//! What Loom is measured beside, in the same run: two network namespaces joined by a virtual cable, raw and with
//! wireguard-go on both sides.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{eventually, system::TIMEOUT};

/// Two hosts, `a` and `b`, each a network namespace; removed when dropped.
pub(crate) struct Cable {
    names: [String; 2],
    processes: Vec<Child>,
    sockets: Vec<PathBuf>,
}

/// The addresses of the hosts on the bare cable.
pub(crate) const RAW: [&str; 2] = ["10.213.7.1", "10.213.7.2"];
/// Their addresses inside wireguard-go's tunnel.
pub(crate) const TUNNELLED: [&str; 2] = ["10.213.8.1", "10.213.8.2"];
/// wireguard-go's UDP port on both.
const UDP_PORT: u16 = 51_820;

impl Cable {
    /// Makes the hosts and the cable.
    pub(crate) fn new() -> Result<Self> {
        let unique = std::process::id();
        let cable = Self {
            names: ["a", "b"].map(|end| format!("loombench{unique}{end}")),
            processes: Vec::new(),
            sockets: Vec::new(),
        };
        let [a, b] = &cable.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b])?;
        for (name, address) in cable.names.iter().zip(RAW) {
            ip(&["-n", name, "address", "add", &format!("{address}/24"), "dev", "cable"])?;
            ip(&["-n", name, "link", "set", "cable", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(cable)
    }

    /// Starts `loom-bench serve` on host `b`.
    pub(crate) fn serve(&mut self, port: u16) -> Result<()> {
        let program = std::env::current_exe()?;
        let child = self.on(1, &program.to_string_lossy()).args(["serve", &port.to_string()]).spawn()?;
        self.processes.push(child);
        Ok(())
    }

    /// A command on host `a` (0) or `b` (1).
    pub(crate) fn on(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host], program]);
        command
    }

    /// Joins the hosts by wireguard-go on both.
    pub(crate) fn start_wireguard_go(&mut self) -> Result<()> {
        let program = wireguard_go()?;
        let keys = [wireguard_keys()?, wireguard_keys()?];
        for host in 0..2 {
            let interface = format!("bench{host}");
            let child = self
                .on(host, &program.to_string_lossy())
                .args(["-f", &interface])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            self.processes.push(child);
            let socket = PathBuf::from(format!("/var/run/wireguard/{interface}.sock"));
            self.sockets.push(socket.clone());
            let mut control =
                eventually("wireguard-go's configuration socket", TIMEOUT, || Ok(UnixStream::connect(&socket).ok()))?;
            write!(
                control,
                "set=1\nprivate_key={}\nlisten_port={UDP_PORT}\npublic_key={}\nendpoint={}:{UDP_PORT}\nallowed_ip={}/32\n\n",
                keys[host].0,
                keys[1 - host].1,
                RAW[1 - host],
                TUNNELLED[1 - host],
            )?;
            let mut answer = String::new();
            BufReader::new(control).read_line(&mut answer)?;
            ensure!(answer.trim() == "errno=0", "wireguard-go refused its settings: {answer}");
            let name = &self.names[host];
            ip(&["-n", name, "address", "add", &format!("{}/24", TUNNELLED[host]), "dev", &interface])?;
            ip(&["-n", name, "link", "set", &interface, "mtu", "1280", "up"])?;
        }
        Ok(())
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        for name in &self.names {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

/// A key pair in hexadecimal, private and public, by OpenSSL.
fn wireguard_keys() -> Result<(String, String)> {
    let script = "openssl genpkey -algorithm X25519 -outform DER | tee /dev/fd/3 | tail -c 32 | od -An -v -tx1";
    let script = format!(
        "exec 3>\"$1\"; {script}; exec 3>&-; openssl pkey -inform DER -in \"$1\" -pubout -outform DER | tail -c 32 | od -An -v -tx1"
    );
    let directory = tempfile::tempdir()?;
    let output = Command::new("bash").args(["-c", &script, "keys"]).arg(directory.path().join("key")).output()?;
    let text: String = String::from_utf8(output.stdout)?.split_whitespace().collect();
    ensure!(text.len() == 128, "openssl made no key: {}", String::from_utf8_lossy(&output.stderr));
    Ok((text[..64].to_owned(), text[64..].to_owned()))
}

fn wireguard_go() -> Result<PathBuf> {
    loom_tests::tools::find("wireguard").context("wireguard-go")
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
