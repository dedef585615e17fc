//! One local port carried to one port of a peer (`loom tunnel up -L`, and a weaver's own ports).

use std::net::Ipv6Addr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{CONNECT_TIMEOUT, carry, reset, serve};
use crate::Tunnel;

/// Serves one local listener: each connection is carried to `port` of the peer at `address`. Ends with `cancel`, and
/// its connections with it.
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
                Ok(remote) => carry(local, remote).await,
                Err(error) => {
                    debug!(%address, port, %error, "cannot forward a connection");
                    reset(&local);
                }
            }
        }
    })
    .await;
}
