//! Strangers who hold connections open in every way that needs no login, while an honest user works: `loom ps`, `loom
//! ssh` and a probe stay prompt, the server's memory stays bounded, and the strangers are shown the door.
//!
//! The attacks come from loopback addresses of their own, because limits are per address.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver, api, eventually,
    service::HonestUser,
    strangers::{Stranger, attack, is_closed},
    system::{TIMEOUT, free_port},
};

/// How long each attack goes on: longer than any deadline for what it does not send.
const ATTACK: Duration = Duration::from_secs(60);
/// What an honest user or a probe may wait, the start of `loom` or `curl` included; undisturbed it is about 0.1 s.
const PROMPT: Duration = Duration::from_secs(1);
/// The same on a machine that is busy with other work: so many times what it takes there undisturbed.
const SLOWDOWN: u32 = 8;
/// By how much the server's memory may grow.
const GROWTH: u64 = 64 << 20;
/// Unfinished handshakes that one address may have at a time.
const HANDSHAKES: usize = 64;
/// The longest that a stranger's connection may stay: a request's body has the longest deadline, 30 s.
const CLOSED: Duration = Duration::from_secs(40);

#[test]
fn half_heads_disturb_nobody() -> Result<()> {
    let (system, weaver) = system_with_weaver(System::start()?)?;
    withstands(&system, &weaver, Stranger::send_half_a_head)?;
    system.stop()
}

#[test]
fn unfinished_bodies_disturb_nobody() -> Result<()> {
    let (system, weaver) = system_with_weaver(System::start()?)?;
    withstands(&system, &weaver, Stranger::send_an_unfinished_body)?;
    system.stop()
}

#[test]
fn silent_connections_to_a_tls_server_disturb_nobody() -> Result<()> {
    let (system, weaver) = system_with_weaver(System::start_with_tls(free_port()?, &[])?)?;
    withstands(&system, &weaver, Stranger::connect)?;
    system.stop()
}

#[test]
fn one_address_has_a_bounded_number_of_connections_and_the_oldest_gives_way() -> Result<()> {
    let system = System::start_with(&[("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "20")])?;
    let stranger = Stranger { server: server_of(&system)?, address: Ipv4Addr::new(127, 0, 0, 66), number: 0 };
    let streams = (0..60).map(|_| stranger.connect()).collect::<Result<Vec<_>>>()?;
    // Long before any deadline.
    eventually("the oldest to be closed", Duration::from_secs(5), || {
        let open = streams.iter().filter(|stream| !is_closed(stream)).count();
        Ok((open == 20).then_some(()))
    })?;
    assert!(streams[..40].iter().all(is_closed) && !streams[40..].iter().any(is_closed));
    // A newcomer of that address is served too.
    let mut newcomer = stranger.connect()?;
    newcomer.write_all(b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    newcomer.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    system.stop()
}

#[test]
fn bodies_are_small_where_nobody_logs_in() -> Result<()> {
    let system = System::start()?;
    let body = |length: usize| format!("{{\"x\": \"{}\"}}", "a".repeat(length));
    for path in ["/api/login/device", "/api/login/token"] {
        assert_eq!(system.request(None, "POST", path, Some(&body(5 << 10)))?.status, 413, "{path}");
        assert_eq!(system.request(None, "POST", path, Some(&body(3 << 10)))?.status, 400, "{path}");
    }
    let register = "/api/agent/register";
    assert_eq!(system.request(None, "POST", register, Some(&body(10 << 10)))?.status, 400);
    assert_eq!(system.request(None, "POST", register, Some(&body(20 << 10)))?.status, 413);
    let token = system.admin_token()?;
    assert_eq!(system.request(Some(&token), "POST", "/api/weavers", Some(&body(20 << 10)))?.status, 400);
    system.stop()
}

#[test]
fn probes_are_also_answered_beside_the_metrics() -> Result<()> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_with(&[("LOOM_SERVER_METRICS_LISTEN", &address)])?;
    assert!(api::metrics(&address)?.contains("loom_weavers"));
    for path in ["/livez", "/readyz"] {
        ensure!(probe(address.parse()?, path)?.starts_with("HTTP/1.1 200"), "{path}");
    }
    system.stop()
}

#[test]
fn one_address_has_few_unfinished_tls_handshakes_and_the_oldest_gives_way() -> Result<()> {
    let metrics = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_with_tls(free_port()?, &[("LOOM_SERVER_METRICS_LISTEN", &metrics)])?;
    let stranger = Stranger { server: server_of(&system)?, address: Ipv4Addr::new(127, 0, 0, 66), number: 0 };
    // Each begins a handshake, and sends no more of it. The connections are far fewer than an address may have.
    let streams = (0..HANDSHAKES + 100)
        .map(|_| {
            let mut stream = stranger.connect()?;
            stream.write_all(b"\x16\x03\x01")?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()?;
    // Long before any deadline.
    eventually("the oldest to be closed", Duration::from_secs(5), || {
        let open = streams.iter().filter(|stream| !is_closed(stream)).count();
        Ok((open == HANDSHAKES).then_some(()))
    })?;
    assert!(streams[..100].iter().all(is_closed) && !streams[100..].iter().any(is_closed));
    let refused = api::metrics(&metrics)?;
    assert!(refused.contains("loom_connections_refused_total{reason=\"displaced_newcomer\"} 100"), "{refused}");
    assert_eq!(system.request(None, "GET", "/readyz", None)?.status, 200);
    system.stop()
}

#[test]
fn a_client_that_takes_nothing_of_its_answers_is_given_up() -> Result<()> {
    const REQUESTS: usize = 300;
    let metrics = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_with(&[("LOOM_SERVER_METRICS_LISTEN", &metrics)])?;
    let stranger = Stranger { server: server_of(&system)?, address: Ipv4Addr::new(127, 0, 0, 66), number: 0 };
    let mut stream = stranger.connect()?;
    // Answers beyond what the kernel holds for both sides.
    stream.write_all("GET /api/openapi.json HTTP/1.1\r\nHost: here\r\n\r\n".repeat(REQUESTS).as_bytes())?;
    eventually("the connection to be given up", TIMEOUT, || {
        let figures = api::metrics(&metrics)?;
        Ok(figures.contains("loom_connections_refused_total{reason=\"stalled\"} 1").then_some(()))
    })?;
    let mut answers = Vec::new();
    // What the kernel holds is still there, then the connection ends or is reset.
    let _ = stream.read_to_end(&mut answers);
    let answered = String::from_utf8_lossy(&answers).matches("HTTP/1.1 200").count();
    assert!((1..REQUESTS).contains(&answered), "{answered} answers");
    system.stop()
}

fn system_with_weaver(system: System) -> Result<(System, Weaver)> {
    let weaver = system.new_weaver(&[])?;
    system.run(&["ssh", &weaver.id, "--", "true"])?;
    Ok((system, weaver))
}

fn server_of(system: &System) -> Result<SocketAddr> {
    let url = system.url();
    Ok(url.split_once("://").context("a URL")?.1.parse()?)
}

/// The longest that an honest user waits for anything now.
fn time_undisturbed(system: &System, weaver: &Weaver) -> Result<Duration> {
    let mut user = HonestUser::new(system, weaver);
    user.work_for(Duration::from_secs(3))?;
    Ok(user.slowest)
}

/// Attacks the server, while an honest user works.
fn withstands(system: &System, weaver: &Weaver, open: impl Fn(&Stranger) -> Result<TcpStream> + Sync) -> Result<()> {
    let before = system.server_memory()?.resident;
    let undisturbed = time_undisturbed(system, weaver)?;
    let mut user = HonestUser::new(system, weaver);
    let streams = attack(server_of(system)?, ATTACK, open, || user.work())?;
    let (slowest, most) = (user.slowest, user.most_memory.max(system.server_memory()?.resident));
    eprintln!("slowest {slowest:?}, memory from {} to {} MiB, {} connections", before >> 20, most >> 20, streams.len());
    ensure!(streams.len() > 2000, "only {} connections were made", streams.len());
    eventually("the strangers' connections to be closed", CLOSED, || Ok(streams.iter().all(is_closed).then_some(())))?;
    let undisturbed = undisturbed.max(time_undisturbed(system, weaver)?);
    let limit = PROMPT.max(undisturbed * SLOWDOWN);
    ensure!(slowest < limit, "something took {slowest:?}, and {undisturbed:?} undisturbed");
    ensure!(most < before + GROWTH, "the server grew from {} to {} MiB", before >> 20, most >> 20);
    Ok(())
}

fn probe(server: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
