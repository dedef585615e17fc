//! The bodies of a connection's requests and answers, which say when the connection waits for its client.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body as AnyBody, Bytes};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::places::Place;

/// How long a whole request's body may take: the largest, 1 MiB, in that time is 35 kB/s, which a poor mobile network
/// has. All that the command line sends is a thousandth of it.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A request's body, on the clock.
pub(super) struct RequestBody {
    body: Incoming,
    deadline: Instant,
    /// Made when the body is waited for.
    timer: Option<Pin<Box<Sleep>>>,
    /// Called when all of it has come.
    complete: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl RequestBody {
    pub(super) fn new(body: Incoming, complete: impl FnOnce() + Send + Sync + 'static) -> Self {
        let mut body =
            Self { body, deadline: Instant::now() + BODY_TIMEOUT, timer: None, complete: Some(Box::new(complete)) };
        body.note_end();
        body
    }

    fn note_end(&mut self) {
        if self.body.is_end_stream()
            && let Some(complete) = self.complete.take()
        {
            complete();
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            if frame.is_none()
                && let Some(complete) = this.complete.take()
            {
                complete();
            }
            this.note_end();
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let deadline = this.deadline;
        ready!(this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline))).as_mut().poll(context));
        let late = io::Error::new(io::ErrorKind::TimedOut, format!("the body did not come within {BODY_TIMEOUT:?}"));
        Poll::Ready(Some(Err(late.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body. The connection waits for its next request when it has gone.
pub(super) struct AnswerBody {
    body: AnyBody,
    place: Arc<Place>,
    /// The place of the one request, when its connection is shared by many clients.
    _request: Option<Place>,
}

impl AnswerBody {
    pub(super) const fn new(body: AnyBody, place: Arc<Place>, request: Option<Place>) -> Self {
        Self { body, place, _request: request }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.place.wait();
    }
}
