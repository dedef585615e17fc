//! Local ports and SOCKS5 through the tunnel to services behind the other node.

mod pair;

use std::{io, net::SocketAddr, time::Duration};

use loom_tunnel::forward;
use pair::{Pair, SERVER, loopback};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Port 7 echoes, port 9 resets in the middle, everything else is refused.
struct Forwarding {
    pair: Pair,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
}

impl Forwarding {
    fn start() -> Self {
        let mut pair = Pair::direct();
        let mut tasks = JoinSet::new();
        let mut incoming = pair.take_incoming();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Some(connection) = incoming.next().await {
                let port = connection.port;
                match port {
                    7 | 9 => {
                        _ = connections.spawn(async move {
                            let mut stream = connection.accept().await.expect("the client waits");
                            if port == 9 {
                                _ = stream.write_all(b"half of").await;
                                _ = stream.read_u8().await;
                                return;
                            }
                            let (mut read, mut write) = tokio::io::split(stream);
                            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                                _ = write.shutdown().await;
                            }
                        })
                    }
                    _ => connection.refuse(),
                }
            }
        });
        Self { pair, cancel: CancellationToken::new(), tasks }
    }

    async fn local(&mut self, port: u16) -> SocketAddr {
        let listener = TcpListener::bind(loopback()).await.expect("loopback can be bound");
        let address = listener.local_addr().expect("it is bound");
        let (tunnel, cancel) = (self.pair.client.clone(), self.cancel.clone());
        self.tasks.spawn(forward::serve_local(listener, tunnel, SERVER, port, cancel));
        address
    }

    async fn socks(&mut self) -> SocketAddr {
        let listener = TcpListener::bind(loopback()).await.expect("loopback can be bound");
        let address = listener.local_addr().expect("it is bound");
        let (tunnel, cancel) = (self.pair.client.clone(), self.cancel.clone());
        let resolve = |name: &str| (name == "weaver.loom").then_some(SERVER);
        self.tasks.spawn(forward::serve_socks(listener, tunnel, resolve, cancel));
        address
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it does not take this long")
}

async fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("somebody listens")
}

async fn echo(mut stream: TcpStream, text: &str) {
    within(async {
        stream.write_all(text.as_bytes()).await.expect("it stands");
        stream.shutdown().await.expect("it stands");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("it stands");
        assert_eq!(answer, text);
    })
    .await;
}

#[tokio::test]
async fn a_local_port_is_a_port_of_the_peer() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.local(7).await;
    echo(connect(address).await, "through the tunnel and back").await;
    echo(connect(address).await, &"long ".repeat(100_000)).await;
}

#[tokio::test]
async fn one_reset_does_not_end_the_forward() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.local(7).await;
    for _ in 0..20 {
        let mut client = connect(address).await;
        client.write_all(b"x").await.expect("it stands");
        client.set_zero_linger().expect("it is a socket");
        drop(client);
    }
    echo(connect(address).await, "still here").await;
}

#[tokio::test]
async fn the_peers_reset_and_refusal_reach_the_client_as_a_reset() {
    let mut forwarding = Forwarding::start();
    let broken = forwarding.local(9).await;
    let mut client = connect(broken).await;
    client.write_all(b"x").await.expect("it stands");
    let mut bytes = Vec::new();
    let error = within(client.read_to_end(&mut bytes)).await.expect_err("only half of it came");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    let refused = forwarding.local(1234).await;
    let mut client = connect(refused).await;
    let error = within(client.read_to_end(&mut bytes)).await.expect_err("nobody listens there");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_forward_ends_with_its_connections() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.local(7).await;
    let mut client = connect(address).await;
    client.write_all(b"x").await.expect("it stands");
    within(client.read_u8()).await.expect("it is echoed");
    forwarding.cancel.cancel();

    let mut bytes = Vec::new();
    _ = within(client.read_to_end(&mut bytes)).await;
    within(async { while TcpStream::connect(address).await.is_ok() {} }).await;
}

/// Greets and asks; returns the stream and the reply code.
async fn ask(address: SocketAddr, request: &[u8]) -> (TcpStream, u8) {
    let mut client = connect(address).await;
    let reply = within(async {
        client.write_all(&[5, 2, 2, 0]).await?;
        let mut method = [0; 2];
        client.read_exact(&mut method).await?;
        assert_eq!(method, [5, 0]);
        client.write_all(request).await?;
        let mut reply = [0; 22];
        client.read_exact(&mut reply).await?;
        assert_eq!((reply[0], reply[2], reply[3]), (5, 0, 4));
        io::Result::Ok(reply[1])
    })
    .await
    .expect("the server answers");
    (client, reply)
}

fn by_name(command: u8, name: &str, port: u16) -> Vec<u8> {
    let mut request = vec![5, command, 0, 3, name.len() as u8];
    request.extend_from_slice(name.as_bytes());
    request.extend_from_slice(&port.to_be_bytes());
    request
}

#[tokio::test]
async fn socks_reaches_names_and_addresses() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.socks().await;
    let mut by_address = vec![5, 1, 0, 4];
    by_address.extend_from_slice(&SERVER.octets());
    by_address.extend_from_slice(&7u16.to_be_bytes());
    let literal = SERVER.to_string();
    for request in [by_name(1, "weaver.loom", 7), by_name(1, &literal, 7), by_address] {
        let (client, reply) = ask(address, &request).await;
        assert_eq!(reply, 0);
        echo(client, "through the proxy").await;
    }
}

#[tokio::test]
async fn socks_says_why_not() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.socks().await;
    for (request, expected) in [
        (by_name(1, "weaver.loom", 81), 5),
        (by_name(1, "example.com", 80), 4),
        (by_name(1, "::1", 80), 4),
        (by_name(2, "weaver.loom", 7), 7),
        (vec![5, 1, 0, 1, 127, 0, 0, 1, 0, 80], 8),
        (vec![5, 1, 0, 9], 8),
    ] {
        let (mut client, reply) = ask(address, &request).await;
        assert_eq!(reply, expected, "{request:?}");
        let mut rest = Vec::new();
        within(client.read_to_end(&mut rest)).await.expect("a clean end");
        assert!(rest.is_empty());
    }
}

#[tokio::test]
async fn socks_survives_what_is_not_socks() {
    let mut forwarding = Forwarding::start();
    let address = forwarding.socks().await;
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[5, 1, 2], &[5, 0], &[4, 1, 0, 80, 127, 0, 0, 1, 0], &[5, 255, 0], b""]
    {
        let mut client = connect(address).await;
        _ = client.write_all(bytes).await;
        _ = client.shutdown().await;
        let mut answer = Vec::new();
        _ = within(client.read_to_end(&mut answer)).await;
        assert!(answer.is_empty() || answer == [5, 255], "{bytes:?}: {answer:?}");
    }
    let (client, reply) = ask(address, &by_name(1, "weaver.loom", 7)).await;
    assert_eq!(reply, 0);
    echo(client, "still here").await;
}
