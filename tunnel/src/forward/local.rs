//! Forwards one local port to one port of a peer.

use std::net::Ipv6Addr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{CONNECT_TIMEOUT, forward_connection, reset, serve};
use crate::Tunnel;

/// Forwards each connection of a local listener to `port` of the peer at `address`. `cancel` ends it and its
/// connections.
pub async fn serve_local(
    listener: TcpListener,
    tunnel: Tunnel,
    address: Ipv6Addr,
    port: u16,
    cancel: CancellationToken,
) {
    serve(listener, cancel, move |local| {
        let tunnel = tunnel.clone();
        async move {
            match tunnel.connect(address, port, CONNECT_TIMEOUT).await {
                Ok(remote) => forward_connection(local, remote).await,
                Err(error) => {
                    debug!(%address, port, %error, "cannot forward a connection");
                    reset(&local);
                }
            }
        }
    })
    .await;
}
