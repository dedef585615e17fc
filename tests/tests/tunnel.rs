//! Reaching a weaver's ports privately: `loom tunnel` with a real PostgreSQL, `psql`, `curl` and forwards.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, eventually, postgres,
    system::{TIMEOUT, free_port},
    terminal::Terminal,
};

#[test]
fn psql_reaches_a_database_that_listens_on_the_weavers_localhost_only() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver_with_postgres()?;
    system.start_postgres(&weaver)?;
    system.run(&["tunnel", "up", &weaver.id])?;
    let address = system.local_address(&weaver)?;
    ensure!(address.starts_with("127."), "{address} is no loopback address");
    eventually("the database's port to appear", TIMEOUT, || {
        Ok(TcpStream::connect((address.as_str(), postgres::PORT)).is_ok().then_some(()))
    })?;
    assert_eq!(system.psql(&address, postgres::PORT, "select 6 * 7")?, "42");
    let long = system.psql(&address, postgres::PORT, "select repeat('x', 20000000)")?;
    assert_eq!(long.len(), 20_000_000, "much data comes whole");
    // It was not the machine's own database: nothing answers on the machine's localhost.
    assert!(system.psql("127.0.0.1", postgres::PORT, "select 1").is_err());

    let status = system.json(&["tunnel", "status", "--json"])?.to_string();
    assert!(status.contains("direct"), "on one machine the path is direct: {status}");
    system.run(&["tunnel", "down", &weaver.id])?;
    assert!(TcpStream::connect((address.as_str(), postgres::PORT)).is_err(), "down closes the listeners");
    system.stop()
}

#[test]
fn forwards_and_socks_reach_any_port_and_a_closed_one_is_refused() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    system.run(&["exec", &weaver.id, "--", "sh", "-c", "echo hello-from-inside > page"])?;
    let mut serve = system
        .loom(&["exec", &weaver.id, "--", "python3", "-m", "http.server", "--bind", "127.0.0.1", "8123"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let (forward, socks) = (free_port()?, free_port()?);
    let forward_option = format!("{forward}:8123");
    let socks_address = format!("127.0.0.1:{socks}");
    system.run(&["tunnel", "up", &weaver.id, "-L", &forward_option, "--socks", &socks_address])?;

    let fetch = |arguments: &[&str]| -> Result<String> {
        let output =
            Command::new("curl").args(["-sS", "--max-time", "20", "--noproxy", ""]).args(arguments).output()?;
        ensure!(output.status.success(), "curl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let page = format!("http://127.0.0.1:{forward}/page");
    eventually("the web server", TIMEOUT, || Ok(fetch(&[&page]).ok().filter(|text| text == "hello-from-inside\n")))?;
    let proxy = format!("socks5h://{socks_address}");
    let named = format!("http://{}.loom:8123/page", weaver.id);
    assert_eq!(fetch(&["--proxy", &proxy, &named])?, "hello-from-inside\n");
    let closed = format!("http://{}.loom:8124/", weaver.id);
    assert!(fetch(&["--proxy", &proxy, &closed]).is_err(), "a closed port is refused");
    assert_eq!(fetch(&[&page])?, "hello-from-inside\n", "and one refusal harms no other forward");

    // A client that resets its connection harms nobody either.
    let mut rude = TcpStream::connect(("127.0.0.1", forward))?;
    rude.write_all(b"GET /page HTTP/1.0\r\n")?;
    drop(rude);
    // Half-close: the request's end is passed on, and the answer still comes.
    let mut polite = TcpStream::connect(("127.0.0.1", forward))?;
    polite.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
    polite.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    polite.read_to_string(&mut answer)?;
    assert!(answer.ends_with("hello-from-inside\n"), "{answer}");
    serve.kill()?;
    serve.wait()?;
    system.stop()
}

#[test]
fn without_udp_the_relay_carries_everything_and_its_restart_breaks_nothing() -> Result<()> {
    let mut system = System::start_with(&[("LOOM_SERVER_AGENT_UDP", "off")])?;
    let weaver = system.new_weaver(&[])?;
    let output = system.output_with_input(&["exec", &weaver.id, "--", "wc", "-c"], &vec![b'x'; 5_000_000])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "5000000");
    let status = system.json(&["tunnel", "status", &weaver.id, "--json"])?;
    assert_eq!(status["path"], "relay", "{status}");

    let mut ssh = Terminal::spawn(&system.loom(&["ssh", &weaver.id]))?;
    ssh.send("echo before-$((1+0))\r")?;
    ssh.expect("before-1", TIMEOUT)?;
    system.kill_server()?;
    ssh.send("echo typed-while-the-relay-is-away-$((1+0))\r")?;
    system.start_server()?;
    ssh.expect("typed-while-the-relay-is-away-1", TIMEOUT)?;
    drop(ssh);
    system.stop()
}

#[test]
fn two_commands_share_one_daemon_that_ends_cleanly() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let children = (0..4)
        .map(|_| system.loom(&["exec", &weaver.id, "--", "true"]).spawn().context("loom"))
        .collect::<Result<Vec<_>>>()?;
    for mut child in children {
        ensure!(child.wait()?.success(), "a command that raced to start the daemon failed");
    }
    let daemon = system.daemon().context("a daemon")?;
    daemon.kill();
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "healed"])?, "healed\n");
    let again = system.daemon().context("a daemon")?;
    assert_ne!(again.pid, daemon.pid);
    system.stop()
}
