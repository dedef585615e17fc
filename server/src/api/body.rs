//! The bodies of requests.

use axum::{
    Json,
    extract::{FromRequest, Request, rejection::JsonRejection},
    http::StatusCode,
};
use loom_api::ErrorCode;
use serde::de::DeserializeOwned;

use crate::problem::{Answer, Problem};

/// A JSON object as the body; what cannot be read is an [`ErrorCode::InvalidRequest`] with the reason.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        // By way of an object, because a structure could be read from an array too.
        match Json::<serde_json::Map<String, serde_json::Value>>::from_request(request, state).await {
            Ok(Json(body)) => T::deserialize(serde_json::Value::Object(body))
                .map(Self)
                .map_err(|error| Problem::new(ErrorCode::InvalidRequest, error.to_string())),
            Err(JsonRejection::BytesRejection(error)) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                Err(Problem::new(ErrorCode::PayloadTooLarge, "the body is larger than this request may have"))
            }
            Err(error) => Err(Problem::new(ErrorCode::InvalidRequest, error.body_text())),
        }
    }
}
