//! Streams between two nodes: over UDP on loopback, and over a relay alone.

mod pair;

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use loom_tunnel::{ConnectError, TunnelEvent, TunnelStream};
use pair::{CLIENT, Hub, Pair, SERVER, TIMEOUT, loopback, peer};
use ring::digest::{Context, Digest, SHA256};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
};

/// Bytes that do not repeat soon.
fn noise(length: usize, mut state: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ state >> 33).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

async fn digest_to_end(mut stream: impl AsyncRead + Unpin) -> io::Result<(usize, Digest)> {
    let (mut context, mut buffer, mut total) = (Context::new(&SHA256), vec![0; 64 << 10], 0);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok((total, context.finish()));
        }
        context.update(&buffer[..count]);
        total += count;
    }
}

/// Sends `data` and ends this direction, while reading the other to its end.
async fn exchange(stream: TunnelStream, data: Vec<u8>) -> (usize, Digest) {
    let (read, mut write) = tokio::io::split(stream);
    let sending = async {
        write.write_all(&data).await?;
        write.shutdown().await
    };
    let (received, sent) = tokio::join!(digest_to_end(read), sending);
    sent.expect("the connection stands");
    received.expect("the connection stands")
}

async fn exchange_both_ways(pair: &mut Pair, size: usize) {
    let (client, server) = pair.connect().await;
    let (up, down) = (noise(size, 1), noise(size, 2));
    let expected_up = ring::digest::digest(&SHA256, &up);
    let expected_down = ring::digest::digest(&SHA256, &down);
    let (at_server, at_client) = tokio::join!(tokio::spawn(exchange(server, down)), tokio::spawn(exchange(client, up)));
    let (at_server, at_client) = (at_server.expect("no panic"), at_client.expect("no panic"));
    assert_eq!((at_server.0, at_server.1.as_ref()), (size, expected_up.as_ref()));
    assert_eq!((at_client.0, at_client.1.as_ref()), (size, expected_down.as_ref()));
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), future).await.expect("it does not take this long")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_go_both_ways_at_once() {
    let mut pair = Pair::direct();
    within(exchange_both_ways(&mut pair, 64 << 20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_mebibytes_go_both_ways_over_a_relay_alone() {
    let hub = Hub::default();
    let mut pair = Pair::relayed(&hub);
    within(exchange_both_ways(&mut pair, 16 << 20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_outlives_its_relay_connection() {
    let hub = Hub::default();
    let mut pair = Pair::relayed(&hub);
    let (mut client, server) = pair.connect().await;
    let data = noise(24 << 20, 3);
    let expected = ring::digest::digest(&SHA256, &data);
    let receiving = tokio::spawn(digest_to_end(server));
    within(async {
        for part in data.chunks(8 << 20) {
            client.write_all(part).await.expect("the connection stands");
            hub.cut();
        }
        client.shutdown().await.expect("the connection stands");
        let (total, digest) = receiving.await.expect("no panic").expect("the connection stands");
        assert_eq!((total, digest.as_ref()), (data.len(), expected.as_ref()));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_both_paths_neither_outage_nor_network_change_disturbs_a_transfer() {
    let hub = Hub::default();
    let mut pair = Pair::new(vec![loopback()], Some(&hub));
    let (mut client, server) = pair.connect().await;
    let data = noise(48 << 20, 4);
    let expected = ring::digest::digest(&SHA256, &data);
    let receiving = tokio::spawn(digest_to_end(server));
    within(async {
        for (round, part) in data.chunks(4 << 20).enumerate() {
            client.write_all(part).await.expect("the connection stands");
            match round % 3 {
                0 => hub.cut(),
                1 => pair.client.network_changed(),
                _ => pair.server.network_changed(),
            }
        }
        client.shutdown().await.expect("the connection stands");
        let (total, digest) = receiving.await.expect("no panic").expect("the connection stands");
        assert_eq!((total, digest.as_ref()), (data.len(), expected.as_ref()));
    })
    .await;
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let mut pair = Pair::direct();
    let (mut client, mut server) = pair.connect().await;
    client.write_all(b"question").await.expect("it stands");
    client.shutdown().await.expect("it stands");
    let mut question = String::new();
    within(server.read_to_string(&mut question)).await.expect("it stands");
    server.write_all(b"answer").await.expect("it stands");
    server.shutdown().await.expect("it stands");
    let mut answer = String::new();
    within(client.read_to_string(&mut answer)).await.expect("it stands");

    assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    let error = client.write_all(b"more").await.expect_err("this direction has ended");
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_nobody_accepts_is_refused() {
    let mut pair = Pair::direct();
    let mut incoming = pair.take_incoming();
    let refuse = async { incoming.next().await.expect("the node runs").refuse() };
    let (refused, ()) = tokio::join!(pair.client.connect(SERVER, 81, TIMEOUT), refuse);
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");

    let drop_it = async { drop(incoming.next().await) };
    let (refused, ()) = tokio::join!(pair.client.connect(SERVER, 82, TIMEOUT), drop_it);
    assert!(matches!(refused, Err(ConnectError::Refused)), "{refused:?}");
}

#[tokio::test]
async fn who_is_no_peer_or_does_not_answer_cannot_be_connected_to() {
    let pair = Pair::direct();
    let stranger = Ipv6Addr::LOCALHOST;
    assert!(matches!(pair.client.connect(stranger, 80, TIMEOUT).await, Err(ConnectError::NoPeer(_))));
    // Nobody asks the server's node for connections: no answer, not a refusal.
    let patience = Duration::from_millis(700);
    assert!(matches!(pair.client.connect(SERVER, 80, patience).await, Err(ConnectError::TimedOut)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_connections_at_once_keep_apart() {
    let mut pair = Pair::direct();
    let mut incoming = pair.take_incoming();
    let serve = async {
        let mut echoes = JoinSet::new();
        for _ in 0..200 {
            let connection = incoming.next().await.expect("the node runs");
            echoes.spawn(async move {
                let stream = connection.accept().await.expect("the client waits");
                let (mut read, mut write) = tokio::io::split(stream);
                tokio::io::copy(&mut read, &mut write).await.expect("it stands");
                write.shutdown().await.expect("it stands");
            });
        }
        echoes.join_all().await;
    };
    let mut clients = JoinSet::new();
    for number in 0..200u64 {
        let tunnel = pair.client.clone();
        clients.spawn(async move {
            let stream = tunnel.connect(SERVER, 80, TIMEOUT).await.expect("the server accepts");
            let data = noise(50_000, number);
            let expected = ring::digest::digest(&SHA256, &data);
            let (total, digest) = exchange(stream, data).await;
            assert_eq!((total, digest.as_ref()), (50_000, expected.as_ref()), "connection {number}");
        });
    }
    within(async { tokio::join!(serve, clients.join_all()) }).await;
}

#[tokio::test]
async fn removing_a_peer_resets_its_connections_on_both_sides() {
    let mut pair = Pair::direct();
    let (mut client, mut server) = pair.connect().await;
    let begun = Instant::now();
    pair.server.remove_peer(&pair.client.public_key());
    let here = within(server.read_u8()).await.expect_err("the peer was removed");
    let there = within(client.read_u8()).await.expect_err("the peer reset the connection");

    assert_eq!((here.kind(), there.kind()), (io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionReset));
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert!(pair.server.peers().is_empty());
}

#[tokio::test]
async fn the_end_of_a_node_resets_its_connections() {
    let mut pair = Pair::direct();
    let (mut client, mut server) = pair.connect().await;
    pair.client.shutdown().await;

    let error = within(client.read_u8()).await.expect_err("the node has ended");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(pair.client.connect(SERVER, 80, TIMEOUT).await, Err(ConnectError::Closed)));
    assert!(within(pair.client_incoming.next()).await.is_none());
    let error = within(server.read_u8()).await.expect_err("the peer reset the connection");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_stranger_is_reported_and_admitted_later() {
    let mut pair = Pair::direct();
    pair.server.remove_peer(&pair.client.public_key());
    let key = pair.client.public_key();
    let mut incoming = pair.take_incoming();
    let serve = async {
        loop {
            tokio::select! {
                event = pair.server_events.next() => {
                    let Some(TunnelEvent::UnknownPeer(stranger)) = event else { panic!("the node has ended") };
                    assert_eq!(stranger, key);
                    pair.server.add_peer(peer(&pair.client, CLIENT, Vec::new()), false);
                }
                connection = incoming.next() => {
                    return connection.expect("the node runs").accept().await;
                }
            }
        }
    };
    let (connected, accepted) = within(async { tokio::join!(pair.client.connect(SERVER, 80, TIMEOUT), serve) }).await;
    connected.expect("the stranger was admitted");
    accepted.expect("the stranger was admitted");
}

#[tokio::test]
async fn datagrams_of_noise_change_nothing() {
    let mut pair = Pair::direct();
    let (mut client, mut server) = pair.connect().await;
    let target: SocketAddr = pair.server.candidates()[0];
    let socket = std::net::UdpSocket::bind(loopback()).expect("loopback can be bound");
    for number in 0..500u64 {
        let mut datagram = noise((number % 200) as usize, number);
        if let Some(first) = datagram.first_mut() {
            *first = (number % 6) as u8;
        }
        socket.send_to(&datagram, target).expect("loopback takes it");
    }
    client.write_all(b"still here").await.expect("it stands");
    let mut bytes = [0; 10];
    within(server.read_exact(&mut bytes)).await.expect("it stands");
    assert_eq!(&bytes, b"still here");
}
