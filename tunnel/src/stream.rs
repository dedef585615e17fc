//! A TCP connection inside the tunnel as a byte stream.
//!
//! The task that uses the stream reads and writes the connection's buffers in place, under the node's lock, and wakes the
//! driver only if there is something to send.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    driver::Shared,
    netstack::{ConnectionId, OpenError},
};

/// A TCP connection inside the tunnel.
///
/// `shutdown` ends this direction after all that was written, and leaves the other open. A stream that is dropped after
/// that, with nothing left to read, still delivers what was written; dropped earlier, it resets the connection.
///
/// # Errors
///
/// `ConnectionReset` when the peer reset the connection, was removed, or the node was shut down; `TimedOut` when the
/// peer has been silent for hours; `BrokenPipe` when writing after `shutdown`.
pub struct TunnelStream {
    shared: Arc<Shared>,
    id: ConnectionId,
}

impl TunnelStream {
    /// Wraps a connection that is being opened or accepted.
    pub(crate) fn new(shared: Arc<Shared>, id: ConnectionId) -> Self {
        Self { shared, id }
    }

    /// Waits until the connection is open.
    pub(crate) async fn opened(&self) -> Result<(), OpenError> {
        std::future::poll_fn(|cx| self.shared.lock().netstack.poll_open(self.id, cx)).await
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (result, due) = self.shared.lock().netstack.poll_read(Instant::now(), self.id, cx, buffer);
        if due {
            self.shared.wake();
        }
        result
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let result = self.shared.lock().netstack.poll_write(self.id, cx, data);
        if result.is_ready() {
            self.shared.wake();
        }
        result
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing to do: written data is sent without being flushed.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = self.shared.lock().netstack.finish(self.id);
        self.shared.wake();
        Poll::Ready(result)
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        self.shared.lock().netstack.release(Instant::now(), self.id);
        self.shared.wake();
    }
}

impl fmt::Debug for TunnelStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TunnelStream").field(&self.id).finish()
    }
}
