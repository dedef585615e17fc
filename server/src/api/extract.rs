//! Parts of a request, read so that what is wrong with them is an error like every other one of the API.

use axum::{
    extract::{FromRequestParts, WebSocketUpgrade, path},
    http::request::Parts,
};
use loom_api::ErrorCode;
use serde::de::DeserializeOwned;

use crate::problem::{Answer, Problem};

/// The parts of the path that have names.
pub struct Path<T>(pub T);

/// A WebSocket that the client asks for.
pub struct Upgrade(pub WebSocketUpgrade);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let path = path::Path::from_request_parts(parts, state).await;
        path.map(|path::Path(path)| Self(path)).map_err(|error| invalid(error.body_text()))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await;
        upgrade.map(Self).map_err(|error| invalid(format!("this needs a WebSocket: {}", error.body_text())))
    }
}

fn invalid(message: String) -> Problem {
    Problem::new(ErrorCode::InvalidRequest, message)
}
