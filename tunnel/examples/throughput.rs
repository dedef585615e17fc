//! Measures one TCP stream through the tunnel on this machine, and the latency of an echo.
//!
//! ```text
//! cargo run -p loom-tunnel --example throughput -- [direct|relay] [SECONDS]
//! ```
//!
//! Both ends run in this process, each with a thread of its own, and meet over UDP on loopback or over a relay in
//! memory. Beside it, plain TCP over loopback in the same run is the ceiling.

#[path = "../tests/pair/mod.rs"]
mod pair;

use std::{
    io,
    time::{Duration, Instant},
};

use pair::{CLIENT, Hub, SERVER, TIMEOUT, loopback, peer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
};

use loom_tunnel::{Config, Incoming, PublicKey, StaticSecret, Tunnel};

const CHUNK: usize = 64 << 10;
const ECHOES: usize = 2000;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let relayed = match arguments.next().as_deref() {
        None | Some("direct") => false,
        Some("relay") => true,
        Some(other) => panic!("expected `direct` or `relay`, not {other:?}"),
    };
    let seconds = arguments.next().map_or(5.0, |text| text.parse().expect("SECONDS is a number"));
    let duration = Duration::from_secs_f64(seconds);

    let (here, there) = (thread(), thread());
    let (address, rate) = plain(&here, &there, duration);
    println!("tcp {address}: {}", rate);

    let hub = Hub::default();
    let udp = if relayed { Vec::new() } else { vec![loopback()] };
    let start = |runtime: &Runtime, seed: u8, address| {
        let _guard = runtime.enter();
        let private_key = StaticSecret::from([seed; 32]);
        let started = Tunnel::start(Config { private_key, address, udp: udp.clone() }).expect("loopback can be bound");
        if relayed {
            let (tunnel, connector) = (started.0.clone(), hub.connector(started.0.public_key()));
            runtime.spawn(async move { tunnel.run_relay(connector).await });
        }
        started
    };
    let (server, incoming, _events) = start(&there, 1, SERVER);
    let (client, _incoming, _events) = start(&here, 2, CLIENT);
    server.add_peer(peer(&client, CLIENT, Vec::new()), false);
    client.add_peer(peer(&server, SERVER, server.candidates()), true);
    there.spawn(serve(incoming));
    here.block_on(async {
        let begun = Instant::now();
        let stream = client.connect(SERVER, 1, TIMEOUT).await.expect("the server accepts");
        println!("first connection: {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
        println!("echo: {}", echo(stream).await.expect("it stands"));
        let stream = client.connect(SERVER, 2, TIMEOUT).await.expect("the server accepts");
        println!("up: {}", send(stream, duration).await.expect("it stands"));
        let stream = client.connect(SERVER, 3, TIMEOUT).await.expect("the server accepts");
        println!("down: {}", receive(stream, duration).await.expect("it stands"));
        report(&client, &server.public_key());
    });
}

fn thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a thread can be made")
}

/// Port 1 echoes, port 2 swallows and says how much, port 3 sends until the client ends.
async fn serve(mut incoming: Incoming) {
    while let Some(connection) = incoming.next().await {
        tokio::spawn(async move {
            let port = connection.port;
            let mut stream = connection.accept().await?;
            stream_service(port, &mut stream).await
        });
    }
}

async fn stream_service(port: u16, stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    match port {
        1 => loop {
            let count = stream.read(&mut buffer).await?;
            if count == 0 {
                return stream.shutdown().await;
            }
            stream.write_all(&buffer[..count]).await?;
        },
        2 => {
            let mut total = 0;
            loop {
                match stream.read(&mut buffer).await? {
                    0 => break,
                    count => total += count as u64,
                }
            }
            stream.write_u64(total).await?;
            stream.shutdown().await
        }
        _ => loop {
            stream.write_all(&buffer).await?;
        },
    }
}

async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<String> {
    let mut times = Vec::with_capacity(ECHOES);
    for _ in 0..ECHOES {
        let begun = Instant::now();
        stream.write_all(&[1; 32]).await?;
        stream.read_exact(&mut [0; 32]).await?;
        times.push(begun.elapsed());
    }
    times.sort();
    let micros = |at: usize| times[at].as_secs_f64() * 1e6;
    Ok(format!("median {:.0} µs, 99th percentile {:.0} µs", micros(ECHOES / 2), micros(ECHOES * 99 / 100)))
}

async fn send(mut stream: impl AsyncRead + AsyncWrite + Unpin, duration: Duration) -> io::Result<String> {
    let (buffer, begun) = (vec![1; CHUNK], Instant::now());
    while begun.elapsed() < duration {
        stream.write_all(&buffer).await?;
    }
    stream.shutdown().await?;
    let total = stream.read_u64().await?;
    Ok(rate(total, begun.elapsed()))
}

async fn receive(mut stream: impl AsyncRead + AsyncWrite + Unpin, duration: Duration) -> io::Result<String> {
    let (mut buffer, begun, mut total) = (vec![0; CHUNK], Instant::now(), 0);
    while begun.elapsed() < duration {
        total += stream.read(&mut buffer).await? as u64;
    }
    Ok(rate(total, begun.elapsed()))
}

fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.2} Gbit/s", bytes as f64 * 8.0 / time.as_secs_f64() / 1e9)
}

fn plain(here: &Runtime, there: &Runtime, duration: Duration) -> (std::net::SocketAddr, String) {
    let listener = there.block_on(TcpListener::bind(loopback())).expect("loopback can be bound");
    let address = listener.local_addr().expect("it is bound");
    there.spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream_service(2, &mut stream).await
    });
    let rate = here.block_on(async { send(TcpStream::connect(address).await?, duration).await });
    (address, rate.expect("loopback works"))
}

fn report(client: &Tunnel, server: &PublicKey) {
    for status in client.peers().iter().filter(|status| &status.public_key == server) {
        for path in &status.paths {
            println!("path {:?}: active {}, round trip {:?}", path.kind, path.active, path.rtt);
        }
    }
    println!("dropped: {:?}", client.counters());
    // Both nodes and what they carried; Linux only.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS")) {
        println!("{line}");
    }
}
