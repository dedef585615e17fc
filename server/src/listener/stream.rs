//! A connection's bytes, and the clock on a client that does not take what it asked for.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use super::{places::Place, refusal::Refusal};

/// How long a client may take nothing of an answer: longer than a network's outage that TCP survives unnoticed by
/// people, and as long as a request's body may take.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection's bytes, in clear or over TLS. It holds the connection's place as long as anybody holds it.
pub(super) struct Stream<S> {
    inner: S,
    /// What is written may take any time: a stream, or a WebSocket.
    patient: Arc<AtomicBool>,
    stall: Option<Pin<Box<Sleep>>>,
    _place: Arc<Place>,
}

impl<S> Stream<S> {
    pub(super) const fn new(inner: S, patient: Arc<AtomicBool>, place: Arc<Place>) -> Self {
        Self { inner, patient, stall: None, _place: place }
    }

    fn watch<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() || self.patient.load(Ordering::Relaxed) {
            self.stall = None;
            return result;
        }
        ready!(self.stall.get_or_insert_with(|| Box::pin(sleep(STALL_TIMEOUT))).as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, Refusal::Stalled)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.watch(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.watch(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(context);
        self.watch(context, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(context);
        self.watch(context, result)
    }
}
