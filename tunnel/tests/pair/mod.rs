//! Two nodes that know each other, on loopback UDP or on a relay in memory.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::{
    collections::HashMap,
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use loom_tunnel::{
    Config, Events, Incoming, PeerConfig, PublicKey, StaticSecret, Tunnel, TunnelStream,
    relay::{RelayChannel, RelayConnector, frame},
};
use parking_lot::Mutex;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

/// The address of the node that is connected to.
pub(crate) const SERVER: Ipv6Addr = Ipv6Addr::new(0xfd4c, 0, 0, 0, 0, 0, 0, 1);
/// The address of the node that connects.
pub(crate) const CLIENT: Ipv6Addr = Ipv6Addr::new(0xfd4c, 0, 0, 0, 0, 0, 0, 2);

pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// Two nodes; both end with this.
pub(crate) struct Pair {
    pub(crate) server: Tunnel,
    pub(crate) server_incoming: Option<Incoming>,
    pub(crate) server_events: Events,
    pub(crate) client: Tunnel,
    pub(crate) client_incoming: Incoming,
    /// Keeps the relay clients running.
    pub(crate) tasks: JoinSet<()>,
}

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

impl Pair {
    /// Two nodes on loopback UDP.
    pub(crate) fn direct() -> Self {
        Self::new(vec![loopback()], None)
    }

    /// Two nodes without UDP on one relay.
    pub(crate) fn relayed(hub: &Hub) -> Self {
        Self::new(Vec::new(), Some(hub))
    }

    pub(crate) fn new(udp: Vec<SocketAddr>, hub: Option<&Hub>) -> Self {
        let start = |seed: u8, address| {
            let private_key = StaticSecret::from([seed; 32]);
            Tunnel::start(Config { private_key, address, udp: udp.clone() }).expect("loopback can be bound")
        };
        let (server, server_incoming, server_events) = start(1, SERVER);
        let (client, client_incoming, _) = start(2, CLIENT);
        let mut tasks = JoinSet::new();
        if let Some(hub) = hub {
            for tunnel in [&server, &client] {
                let (tunnel, connector) = (tunnel.clone(), hub.connector(tunnel.public_key()));
                tasks.spawn(async move { tunnel.run_relay(connector).await });
            }
        }
        server.add_peer(peer(&client, CLIENT, Vec::new()), false);
        client.add_peer(peer(&server, SERVER, server.candidates()), true);
        let server_incoming = Some(server_incoming);
        Self { server, server_incoming, server_events, client, client_incoming, tasks }
    }

    /// The server's incoming connections, for a task to serve.
    pub(crate) fn take_incoming(&mut self) -> Incoming {
        self.server_incoming.take().expect("it is taken once")
    }

    /// One connection, both ends.
    pub(crate) async fn connect(&mut self) -> (TunnelStream, TunnelStream) {
        let incoming = self.server_incoming.as_mut().expect("the test has not taken it");
        let accepted = async {
            let connection = incoming.next().await.expect("the node runs");
            connection.accept().await.expect("the client waits")
        };
        let (client, server) = tokio::join!(self.client.connect(SERVER, 80, TIMEOUT), accepted);
        (client.expect("the server accepts"), server)
    }
}

pub(crate) fn peer(tunnel: &Tunnel, address: Ipv6Addr, candidates: Vec<SocketAddr>) -> PeerConfig {
    PeerConfig { public_key: tunnel.public_key(), preshared_key: Some([9; 32]), address, candidates }
}

/// The relay's part that forwards, in memory.
#[derive(Clone, Default)]
pub(crate) struct Hub {
    clients: Arc<Mutex<HashMap<[u8; 32], Client>>>,
}

#[derive(Clone)]
struct Client {
    frames: mpsc::Sender<Bytes>,
    cut: CancellationToken,
}

pub(crate) struct HubConnector {
    hub: Hub,
    key: [u8; 32],
}

impl Hub {
    pub(crate) fn connector(&self, key: PublicKey) -> HubConnector {
        HubConnector { hub: self.clone(), key: key.to_bytes() }
    }

    /// Breaks every connection; whoever connects again is served again.
    pub(crate) fn cut(&self) {
        for (_, client) in self.clients.lock().drain() {
            client.cut.cancel();
        }
    }

    fn find(&self, key: &[u8; 32]) -> Option<Client> {
        self.clients.lock().get(key).cloned()
    }
}

impl RelayConnector for HubConnector {
    async fn connect(&self) -> io::Result<RelayChannel> {
        // Sixteen frames: about what a socket's buffers hold.
        let (frames, queue) = mpsc::channel(16);
        let cut = CancellationToken::new();
        let me = Client { frames, cut: cut.clone() };
        self.hub.clients.lock().insert(self.key, me.clone());
        let (hub, key) = (self.hub.clone(), self.key);
        let sink = futures_util::sink::unfold((), move |(), message: Bytes| {
            let (hub, me) = (hub.clone(), me.clone());
            async move { forward(&hub, &key, &me, message).await }
        });
        let stream = tokio_stream(queue).take_until(cut.cancelled_owned()).map(Ok);
        Ok((Box::pin(sink), Box::pin(stream)))
    }
}

fn tokio_stream(mut queue: mpsc::Receiver<Bytes>) -> impl futures_util::Stream<Item = Bytes> {
    futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx))
}

async fn forward(hub: &Hub, key: &[u8; 32], me: &Client, message: Bytes) -> io::Result<()> {
    if me.cut.is_cancelled() {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let frame::Frame::Packets { peer, .. } = frame::decode(&message).map_err(io::Error::other)? else {
        return Err(io::Error::other("a client sent what only a relay sends"));
    };
    let Some(client) = hub.find(&peer) else {
        let mut absent = Vec::new();
        frame::encode_peer_absent(&peer, &mut absent);
        _ = me.frames.try_send(absent.into());
        return Ok(());
    };
    let mut message = BytesMut::from(message);
    frame::set_peer(&mut message, key).map_err(io::Error::other)?;
    tokio::select! {
        _ = client.frames.send(message.freeze()) => {}
        () = me.cut.cancelled() => {}
    }
    Ok(())
}
