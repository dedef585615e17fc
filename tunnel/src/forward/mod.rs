//! Streams between local sockets and the tunnel.
//!
//! [`serve_local`] forwards one local port to one port of a peer, [`serve_socks`] to any port of any peer, as the client
//! chooses. Each owns its connections and ends them when it ends; each has a limit, beyond which new clients wait to be
//! accepted. No failure of a connection ends the forward.

mod local;
mod socks;

use std::{future::Future, io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

pub use self::{local::serve_local, socks::serve_socks};

/// Concurrent connections of one forward.
const MAX_CONNECTIONS: usize = 512;

/// For a peer to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// In bytes, for each direction.
const COPY_BUFFER: usize = 64 << 10;

/// Copies in both directions until both have ended; forwards each end separately (half-close). Returns the bytes copied
/// from `a` to `b` and from `b` to `a`.
pub async fn splice(
    mut a: impl AsyncRead + AsyncWrite + Unpin,
    mut b: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<(u64, u64)> {
    tokio::io::copy_bidirectional_with_sizes(&mut a, &mut b, COPY_BUFFER, COPY_BUFFER).await
}

/// Forwards a local connection until it ends. A failure on one side resets the other: a clean close would look like the
/// end of the data.
async fn forward_connection(mut local: TcpStream, remote: impl AsyncRead + AsyncWrite + Unpin) {
    if let Err(error) = splice(&mut local, remote).await {
        debug!(%error, "a forwarded connection broke");
        reset(&local);
    }
}

/// Makes dropping a local socket a reset.
fn reset(local: &TcpStream) {
    if let Err(error) = local.set_zero_linger() {
        debug!(%error, "cannot reset a local connection");
    }
}

/// Accepts connections and serves each in a task, at most [`MAX_CONNECTIONS`] at once, until `cancel`; then all end.
async fn serve<F>(listener: TcpListener, cancel: CancellationToken, handle: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended && error.is_panic() {
                    warn!(%error, "a forwarded connection failed");
                }
                continue;
            }
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                _ = stream.set_nodelay(true);
                connections.spawn(handle(stream));
            }
            Err(error) => {
                // Out of file descriptors, or the client is gone already; neither ends the forward. The pause prevents a busy
                // loop.
                warn!(%error, "cannot accept a connection to forward");
                tokio::select! {
                    () = cancel.cancelled() => break,
                    () = tokio::time::sleep(Duration::from_millis(200)) => {}
                }
            }
        }
    }
    connections.shutdown().await;
}
