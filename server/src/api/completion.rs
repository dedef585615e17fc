//! Requests that change something run to their end, also when their client goes away.
//!
//! The future of a handler is dropped when its client disconnects. A change has several steps (the row, the relay's
//! table, a word to the agent or the reconciler), and half of one would stay until somebody repeats it.

use std::sync::Arc;

use anyhow::Context as _;
use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use tokio_util::task::TaskTracker;

use crate::{listener::HeldPlace, metrics::Metrics, problem::Problem};

/// The requests that change something and are not answered yet.
#[derive(Clone)]
pub struct Changes {
    tasks: TaskTracker,
    metrics: Arc<Metrics>,
}

impl Changes {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { tasks: TaskTracker::new(), metrics }
    }

    /// Waits until all have come to their end. None may be begun any more.
    pub async fn completed(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Runs a request that changes something in a task of its own, which [`Changes`] owns.
pub(super) async fn complete(State(changes): State<Changes>, request: Request, next: Next) -> Response {
    if request.method().is_safe() {
        return next.run(request).await;
    }
    // Clients that leave are counted until their requests end, so nobody has more of them by leaving.
    let place = request.extensions().get::<HeldPlace>().cloned();
    let task = changes.tasks.spawn(async move {
        let _place = place;
        next.run(request).await
    });
    match task.await.context("a request's handler") {
        Ok(response) => response,
        Err(error) => {
            changes.metrics.panics.inc();
            Problem::from(error).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::Body,
        http::StatusCode,
        middleware::from_fn_with_state,
        routing::{get, post},
    };
    use tokio::sync::{Mutex, Notify, oneshot};
    use tower::ServiceExt as _;

    use super::*;

    fn request(method: &str) -> Request {
        Request::builder().method(method).uri("/").body(Body::empty()).expect("a request")
    }

    #[tokio::test]
    async fn a_change_is_completed_although_its_client_has_gone() {
        let (begun, ended) = (Arc::new(Notify::new()), Arc::new(Mutex::new(false)));
        let (go_on, gone) = oneshot::channel::<()>();
        let gone = Arc::new(Mutex::new(Some(gone)));
        let handler = {
            let (begun, ended) = (Arc::clone(&begun), Arc::clone(&ended));
            async move || {
                begun.notify_one();
                let gone = gone.lock().await.take().expect("one request");
                gone.await.expect("the test goes on");
                *ended.lock().await = true;
            }
        };
        let changes = Changes::new(Arc::default());
        let router = Router::new().route("/", post(handler)).layer(from_fn_with_state(changes.clone(), complete));
        tokio::select! {
            _ = router.oneshot(request("POST")) => panic!("it waits for the test"),
            () = begun.notified() => {}
        }
        assert!(!*ended.lock().await);
        go_on.send(()).expect("the handler was dropped with its client");
        changes.completed().await;
        assert!(*ended.lock().await);
    }

    #[tokio::test]
    async fn a_panic_is_counted_and_answered() {
        async fn panics() {
            panic!("a fault of the test");
        }
        let changes = Changes::new(Arc::default());
        let router = Router::new()
            .route("/", post(panics).merge(get(async || "read")))
            .layer(from_fn_with_state(changes.clone(), complete));
        let answer = router.clone().oneshot(request("POST")).await.expect("infallible");
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(changes.metrics.panics.get(), 1);
        let answer = router.oneshot(request("GET")).await.expect("infallible");
        assert_eq!(answer.status(), StatusCode::OK);
    }
}
