//! The front door: accepts connections and serves HTTP on them, so that strangers cannot take the server down.
//!
//! Whoever can reach the port can open connections and say nothing, half of a request, or more than anybody wants to
//! hear. So a connection is on the clock in everything it does before it has proven itself, and everything that it
//! costs is counted:
//!
//! - The TLS handshake, a request's head and its body each have a deadline ([`connection`], [`body`]), and so has the
//!   client's taking of an answer ([`stream`]).
//! - Each connection has a place in a table ([`places`]), of which there are so many in all and so many for each
//!   address; connections that have not sent a request yet, unfinished TLS handshakes for one, have a smaller table of
//!   their own. In a full table the connection that has been waiting longest for its client gives way, so a newcomer is
//!   served however many silent connections there are. One that is being served keeps its place, and a newcomer is
//!   turned away when an address has only those.
//! - Behind a proxy everybody comes from the proxy's address. Its word on who the client is counts when its address is
//!   a trusted one ([`address`], [`proxy_protocol`]).
//!
//! What is refused or cut is counted by reason ([`refusal`]).
//!
//! WebSockets have shown a token. They and streamed answers are theirs to keep open; only the number of all
//! connections includes them.

mod address;
mod body;
mod connection;
mod places;
mod proxy_protocol;
mod refusal;
mod settings;
mod stream;
pub mod tls;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use axum::Router;
use tokio::{
    net::{TcpListener, TcpSocket},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use address::ClientAddress;
use connection::Front;
pub use connection::HeldPlace;
pub use refusal::Refusals;
pub use settings::{Config, ProxySays, Settings};

/// After a failure to accept, such as too many open files: long enough for connections to end, short enough that
/// nobody gives up.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Connections that the kernel holds until they are accepted, as far as `net.core.somaxconn` (4096 by default) lets it.
/// With the usual 128, a burst of a few hundred has the kernel drop honest ones, whose client tries again after 1 s.
const BACKLOG: u32 = 4096;

/// A port at which HTTP is served.
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    front: Front,
}

impl Listener {
    /// Listens at `address`, over TLS if there is a certificate. Whom it refuses is counted in `refusals`.
    ///
    /// # Errors
    ///
    /// When the address is taken, or the certificate cannot be used.
    pub fn bind(address: SocketAddr, tls: Option<&tls::Config>, config: &Config, refusals: Refusals) -> Result<Self> {
        let listener = listen(address).with_context(|| format!("listening at {address}"))?;
        let tls = match tls {
            Some(tls) => Some(TlsAcceptor::from(Arc::new(tls::server_config(tls)?))),
            None => None,
        };
        let address = listener.local_addr()?;
        Ok(Self { listener, address, front: Front::new(tls, config, refusals) })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then until every request that has begun is answered. WebSockets are not waited for. When
    /// the future is dropped, all that is still served is cut.
    pub async fn serve(self, router: Router, stop: CancellationToken) {
        let front = Arc::new(self.front);
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    // Small frames must not wait for each other; a socket without this works too.
                    let _ = stream.set_nodelay(true);
                    if let Some(exchange) = front.admit(peer.ip().to_canonical(), router.clone()) {
                        connections.spawn(exchange.serve(stream, stop.clone()));
                    }
                }
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
        drop(self.listener);
        while connections.join_next().await.is_some() {}
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A server that starts again comes back at its port at once.
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() {
        // `[::]` also serves IPv4, whatever net.ipv6.bindv6only says.
        rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
