//! Streams between local sockets and the tunnel.
//!
//! [`serve_local`] carries one local port to one port of a peer, [`serve_socks`] any port of any peer by the client's
//! choice. Each owns its connections and ends them with itself; each has a limit, beyond which new clients wait to be
//! accepted. What happens to one connection never ends the forward.

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

/// Connections that one forward carries at once.
const MAX_CONNECTIONS: usize = 512;

/// How long a peer has to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes copied at once in each direction.
const COPY_BUFFER: usize = 64 << 10;

/// Copies both ways until both are done; each side's end is passed on by itself (half-close). Returns the bytes copied
/// from `a` to `b` and from `b` to `a`.
///
/// # Errors
///
/// The first error of either side.
pub async fn splice(
    mut a: impl AsyncRead + AsyncWrite + Unpin,
    mut b: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<(u64, u64)> {
    tokio::io::copy_bidirectional_with_sizes(&mut a, &mut b, COPY_BUFFER, COPY_BUFFER).await
}

/// Carries a local connection to its end; a failure on one side becomes a reset on the other, since a clean end would
/// pass for the whole of the data.
async fn carry(mut local: TcpStream, remote: impl AsyncRead + AsyncWrite + Unpin) {
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

/// Accepts connections and serves each in a task of its own, at most [`MAX_CONNECTIONS`] at once, until `cancel`; then
/// all of them end.
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
                // Out of descriptors, or the client is gone already: neither ends the forward. The pause keeps the
                // former from becoming a busy loop.
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
