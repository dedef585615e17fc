//! The connection to the server's relay: each of the tunnel's frames is one binary WebSocket message.
//!
//! When the machine changes its network, a TCP connection can be dead without any sign of it. So the socket is pinged,
//! and closed when nothing comes for a while; the tunnel then reconnects.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{Sink, Stream};
use loom_api::{ErrorCode, client::WebSocket};
use loom_tunnel::relay::{RelayChannel, RelayConnector, frame};
use parking_lot::Mutex;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::server_link::ServerLink;

const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A relay that sends nothing for this long, not even a pong, is considered dead.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(25);

/// Connects a [`ServerLink`] to its server's relay.
pub(super) struct Relay(pub(super) Weak<ServerLink>);

impl RelayConnector for Relay {
    async fn connect(&self) -> io::Result<RelayChannel> {
        let link = self.0.upgrade().ok_or_else(|| io::Error::other("the daemon is shutting down"))?;
        let path = format!("/api/relay?key={}", URL_SAFE_NO_PAD.encode(link.public_key().as_bytes()));
        let opening = link.client().websocket(&path, Some(frame::SUBPROTOCOL), frame::MAX_MESSAGE).await;
        match &opening {
            Ok(_) => link.relay_answered(),
            Err(error) if error.code() == Some(ErrorCode::Unauthorized) => link.relay_answered(),
            Err(_) => {}
        }
        let socket = Arc::new(Mutex::new(Socket::new(opening.map_err(io::Error::other)?)));
        Ok((Box::pin(Writer(Arc::clone(&socket))), Box::pin(Reader(socket))))
    }
}

/// The socket of both halves. The tunnel polls both in one task, so one waker serves both and the lock never blocks.
struct Socket {
    socket: WebSocket,
    ping: Interval,
    heard: Instant,
}

impl Socket {
    fn new(socket: WebSocket) -> Self {
        let mut ping = interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { socket, ping, heard: Instant::now() }
    }

    fn pinned(&mut self) -> Pin<&mut WebSocket> {
        Pin::new(&mut self.socket)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        while let Poll::Ready(message) = self.pinned().poll_next(cx) {
            self.heard = Instant::now();
            match message {
                Some(Ok(Message::Binary(frame))) => return Poll::Ready(Some(Ok(frame))),
                Some(Ok(_)) => {} // pings are answered below us
                Some(Err(error)) => return Poll::Ready(Some(Err(other(error)))),
                None => return Poll::Ready(None),
            }
        }
        while self.ping.poll_tick(cx).is_ready() {
            if self.heard.elapsed() > SILENCE_TIMEOUT {
                return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
            }
            self.poll_ping(cx).map_err(other)?;
        }
        Poll::Pending
    }

    /// Sends a ping if the socket is ready; if not, there is traffic anyway.
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        if let Poll::Ready(ready) = self.pinned().poll_ready(cx) {
            ready?;
            self.pinned().start_send(Message::Ping(Bytes::new()))?;
        }
        match self.pinned().poll_flush(cx) {
            Poll::Ready(flushed) => flushed,
            Poll::Pending => Ok(()),
        }
    }
}

fn other(error: Error) -> io::Error {
    io::Error::other(error)
}

/// The sending half.
struct Writer(Arc<Mutex<Socket>>);

impl Sink<Bytes> for Writer {
    type Error = io::Error;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().pinned().poll_ready(cx).map_err(other)
    }

    fn start_send(self: Pin<&mut Self>, frame: Bytes) -> io::Result<()> {
        self.0.lock().pinned().start_send(Message::Binary(frame)).map_err(other)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().pinned().poll_flush(cx).map_err(other)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().pinned().poll_close(cx).map_err(other)
    }
}

/// The receiving half, which also drives the pings.
struct Reader(Arc<Mutex<Socket>>);

impl Stream for Reader {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let frame = ready!(self.0.lock().poll_frame(cx));
        Poll::Ready(frame)
    }
}
