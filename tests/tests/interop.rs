//! A WireGuard that is not ours, as the client of an agent.

use std::process::Command;

use anyhow::{Result, ensure};
use loom_tests::{System, eventually, system::TIMEOUT, wireguard_go::WireGuardGo};

#[test]
fn wireguard_go_moves_tcp_to_a_weaver_both_ways() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let make = "head -c 20000000 /dev/urandom > data; sha256sum < data";
    let sum = system.run(&["exec", &weaver.id, "--", "sh", "-c", make])?;
    let mut serve = system
        .loom(&["exec", &weaver.id, "--", "python3", "-m", "http.server", "--bind", "127.0.0.1", "8123"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;

    let client = WireGuardGo::connect(&system, &weaver)?;
    let url = format!("http://[{}]:8123/data", client.peer_address);
    let fetch = format!("curl -gsS --noproxy '*' --max-time 60 '{url}' | sha256sum");
    let fetched = eventually("the file through wireguard-go", TIMEOUT, || {
        let output = Command::new("sh").args(["-c", &fetch]).output()?;
        Ok((output.stdout == sum.as_bytes()).then_some(()))
    });
    serve.kill()?;
    serve.wait()?;
    fetched?;

    // The other way, and the agent's SSH server, which needs no login from a granted peer.
    std::fs::write(system.path("up"), vec![b'x'; 5_000_000])?;
    let upload = format!(
        "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR loom@{} 'wc -c' < '{}'",
        client.peer_address,
        system.path("up").display()
    );
    let output = Command::new("sh").args(["-c", &upload]).output()?;
    ensure!(output.status.success(), "ssh: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "5000000");
    drop(client);
    system.stop()
}
