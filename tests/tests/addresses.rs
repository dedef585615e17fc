//! Where clients come from: IPv4, IPv6, or a proxy that speaks for them. Limits count by the client's own address, and
//! nobody chooses another one by a header.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use loom_tests::{
    System, api, eventually,
    strangers::{Stranger, is_closed},
    system::{TIMEOUT, free_port},
};
use serde_json::Value;

/// Logins that one address may begin at once.
const LOGINS: usize = 20;
/// Long before any deadline of a connection.
const SOON: Duration = Duration::from_secs(5);
const PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);
const NO_PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 67);

#[test]
fn a_weaver_is_reached_through_a_server_with_an_ipv6_address() -> Result<()> {
    let system = System::start_at("[::1]:0", &[])?;
    ensure!(system.url().starts_with("http://[::1]:"), "{}", system.url());
    let weaver = system.new_weaver(&[])?;
    assert_eq!(system.run(&["ssh", &weaver.id, "--", "echo", "here"])?.trim(), "here");
    system.stop()
}

#[test]
fn a_dual_stack_listener_tells_ipv4_clients_apart() -> Result<()> {
    let port = free_port()?;
    // The main listener of the local backend is for loopback only; this one has the same limits.
    let system = System::start_with(&[
        ("LOOM_SERVER_METRICS_LISTEN", &format!("[::]:{port}")),
        ("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "5"),
    ])?;
    let from = |address| Stranger { server: SocketAddr::from(([127, 0, 0, 1], port)), address, number: 0 };
    let other = from(NO_PROXY).connect()?;
    let flood = (0..20).map(|_| from(PROXY).connect()).collect::<Result<Vec<_>>>()?;
    closed_but(5, &flood)?;
    ensure!(!is_closed(&other), "an IPv4 client was closed because of another one");
    assert!(api::metrics(&format!("[::1]:{port}"))?.contains("connections_refused_total{reason=\"displaced\"} 15"));
    system.stop()
}

#[test]
fn a_trusted_proxy_says_whose_its_connections_are() -> Result<()> {
    let system = System::start_with(&[
        ("LOOM_SERVER_TRUSTED_PROXIES", "127.0.0.66"),
        ("LOOM_SERVER_PROXIES_SEND", "proxy-protocol"),
        ("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "5"),
    ])?;
    let proxy = Stranger { server: server_of(&system)?, address: PROXY, number: 0 };
    let open = |client: &str| -> Result<TcpStream> {
        let mut stream = proxy.connect()?;
        stream.write_all(format!("PROXY TCP4 {client} 127.0.0.1 1 1\r\n").as_bytes())?;
        Ok(stream)
    };
    let flood = (0..20).map(|_| open("192.0.2.1")).collect::<Result<Vec<_>>>()?;
    let other = open("192.0.2.2")?;
    closed_but(5, &flood)?;
    assert_eq!(ask(other, "GET", "/livez", "")?.0, 200);
    // Without its word the proxy is nobody.
    let mut mute = proxy.connect()?;
    mute.write_all(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")?;
    eventually("the connection without a header to be closed", TIMEOUT, || Ok(is_closed(&mute).then_some(())))?;
    system.stop()
}

#[test]
fn a_trusted_proxy_says_whose_its_requests_are() -> Result<()> {
    const REQUESTS: usize = 5;
    let metrics = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_with(&[
        ("LOOM_SERVER_TRUSTED_PROXIES", &PROXY.to_string()),
        ("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", &REQUESTS.to_string()),
        ("LOOM_SERVER_METRICS_LISTEN", &metrics),
    ])?;
    let proxy = Stranger { server: server_of(&system)?, address: PROXY, number: 0 };
    let client = |address: &str| format!("X-Forwarded-For: 203.0.113.9, {address}\r\n");
    let (one, other) = (client("192.0.2.1"), client("192.0.2.2"));
    // How often each may begin a login counts by the client, not by the proxy or by what the client itself wrote.
    begin_logins_until_refused(&proxy, |_| one.clone())?;
    assert_eq!(ask(proxy.connect()?, "POST", "/api/login/device", &other)?.0, 200);
    // So do requests that are under way.
    let unfinished = (0..REQUESTS)
        .map(|_| {
            let mut stream = proxy.connect()?;
            write!(stream, "POST /api/login/token HTTP/1.1\r\nHost: here\r\n{one}Content-Type: application/json\r\n")?;
            write!(stream, "Content-Length: 100\r\n\r\n")?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()?;
    let (status, body) = eventually("another request to be one too many", SOON, || {
        Ok(Some(ask(proxy.connect()?, "GET", "/livez", &one)?).filter(|(status, _)| *status != 200))
    })?;
    assert_eq!((status, &body["error"]["code"]), (429, &Value::from("too_many_requests")));
    assert!(body["error"]["message"].as_str().is_some_and(|message| message.contains("192.0.2.1")), "{body}");
    assert!(body["error"]["hint"].is_string(), "{body}");
    assert!(api::metrics(&metrics)?.contains("loom_connections_refused_total{reason=\"requests\"} 1"));
    assert_eq!(ask(proxy.connect()?, "GET", "/livez", &other)?.0, 200);
    // The proxy's own connections are not bounded by the limit of one client.
    ensure!(!unfinished.iter().any(is_closed), "a request of the proxy's was cut");
    drop(unfinished);
    eventually("the client to be served again", SOON, || {
        Ok((ask(proxy.connect()?, "GET", "/livez", &one)?.0 == 200).then_some(()))
    })?;
    system.stop()
}

#[test]
fn nobody_else_chooses_an_address_by_a_header() -> Result<()> {
    let system = System::start_with(&[
        ("LOOM_SERVER_TRUSTED_PROXIES", &PROXY.to_string()),
        ("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "5"),
    ])?;
    let server = server_of(&system)?;
    let stranger = Stranger { server, address: NO_PROXY, number: 0 };
    let forged = |number: usize| format!("X-Forwarded-For: 192.0.2.{number}\r\n");
    begin_logins_until_refused(&stranger, forged)?;
    // The one whose address was forged is not concerned.
    let proxy = Stranger { server, address: PROXY, number: 0 };
    assert_eq!(ask(proxy.connect()?, "POST", "/api/login/device", &forged(1))?.0, 200);
    let flood = (0..20).map(|number| {
        let mut stream = stranger.connect()?;
        write!(stream, "GET /livez HTTP/1.1\r\nHost: here\r\n{}", forged(number))?;
        Ok(stream)
    });
    closed_but(5, &flood.collect::<Result<Vec<_>>>()?)?;
    system.stop()
}

fn server_of(system: &System) -> Result<SocketAddr> {
    let url = system.url();
    Ok(url.split_once("://").context("a URL")?.1.parse()?)
}

/// Begins as many logins as may be begun at once, and a few more if that took so long that more are allowed.
fn begin_logins_until_refused(from: &Stranger, headers: impl Fn(usize) -> String) -> Result<()> {
    for number in 0..2 * LOGINS {
        let (status, body) = ask(from.connect()?, "POST", "/api/login/device", &headers(number))?;
        if number >= LOGINS && status == 429 {
            ensure!(body["error"]["code"] == "too_many_requests", "{body}");
            return Ok(());
        }
        ensure!(status == 200, "login {number}: {status} {body}");
    }
    bail!("{} logins were begun", 2 * LOGINS)
}

/// Waits until all but `open` of the connections are closed.
fn closed_but(open: usize, streams: &[TcpStream]) -> Result<()> {
    eventually(&format!("all but {open} connections to be closed"), SOON, || {
        Ok((streams.iter().filter(|stream| !is_closed(stream)).count() == open).then_some(()))
    })
}

/// Makes a request with further headers, and with what begins a login if it is a POST; the status, and the body if it
/// is JSON.
fn ask(mut stream: TcpStream, method: &str, path: &str, headers: &str) -> Result<(u16, Value)> {
    let body = if method == "POST" { r#"{"client_name":"test"}"# } else { "" };
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n{headers}")?;
    write!(stream, "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    Ok((status, serde_json::from_str(body).unwrap_or_default()))
}
