//! The HTTP and WebSocket client that the CLI and the agent share.
//!
//! Both protocols go through one `reqwest` client, so that proxies (`HTTPS_PROXY`, CONNECT), the operating system's
//! trust roots and timeouts work the same for API calls, the control link, the relay and attach. A WebSocket is an
//! ordinary request that the server answers with 101 (RFC 6455 §4); `tungstenite` then handles its frames.

use std::{net::IpAddr, sync::Once, time::Duration};

use bytes::BytesMut;
use futures_util::{Stream, StreamExt as _};
use reqwest::{Method, StatusCode, Url, header};
use serde::{Serialize, de::DeserializeOwned};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{client::generate_key, derive_accept_key},
        protocol::{Role, WebSocketConfig},
    },
};

pub use crate::connection::ConnectionFailure;
use crate::{ApiError, ErrorBody, ErrorCode, Secret, connection};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For a whole request and its answer; streams have no limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest error body that is read, and the longest line of an event stream.
const MAX_LINE: usize = 1 << 20;
/// The size of a WebSocket's read buffer, in bytes. Each connection has one, busy or idle.
const READ_BUFFER: usize = 32 << 10;

pub type WebSocket = WebSocketStream<reqwest::Upgraded>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server's URL, or the CA certificates given for it, cannot be used.
    #[error("{url:?} is not a usable server URL: {reason}")]
    BadUrl { url: String, reason: &'static str },
    /// No answer: refused, unreachable, timed out, or cut off.
    #[error("cannot reach {server}: {reason}")]
    Unreachable { server: String, failure: ConnectionFailure, reason: String },
    /// The server answered with an error.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The answer is not from a Loom server: perhaps a proxy is in the way.
    #[error("unexpected answer from {server}: {reason}")]
    Protocol {
        server: String,
        reason: String,
        /// The HTTP status, if that is what was unexpected.
        status: Option<u16>,
    },
}

impl ClientError {
    /// The API's error code, if the server answered with one.
    #[must_use]
    pub const fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Api(error) => Some(error.code),
            _ => None,
        }
    }

    /// Whether the same request may succeed soon: the server, or a proxy in front of it, is overloaded, restarting or
    /// unreachable.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        let transient = |status: u16| status == 429 || status >= 500;
        match self {
            Self::BadUrl { .. } => false,
            Self::Unreachable { failure, .. } => failure.is_transient(),
            Self::Api(error) => transient(error.code.http_status()),
            Self::Protocol { status, .. } => status.is_some_and(transient),
        }
    }
}

/// A client of one server. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    token: Option<Secret>,
}

impl Client {
    /// Makes a client for the server at `url`, authenticated by `token` if there is one.
    ///
    /// # Errors
    ///
    /// [`ClientError::BadUrl`] when `url` is neither `https://` nor `http://` on loopback: a token is never sent in
    /// clear.
    ///
    /// # Panics
    ///
    /// Only if the TLS library cannot be initialised.
    pub fn new(url: &str, token: Option<Secret>) -> Result<Self, ClientError> {
        Self::with_ca_certificates(url, token, "")
    }

    /// As [`Client::new`], and also trusts the CA certificates in `authorities` (PEM).
    ///
    /// # Errors
    ///
    /// As for [`Client::new`], and when `authorities` cannot be parsed.
    ///
    /// # Panics
    ///
    /// As for [`Client::new`].
    pub fn with_ca_certificates(url: &str, token: Option<Secret>, authorities: &str) -> Result<Self, ClientError> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| {
            // Fails only if a provider is installed already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        });
        let bad = |reason| ClientError::BadUrl { url: url.to_owned(), reason };
        let base: Url = url.parse().map_err(|_| bad("it cannot be parsed"))?;
        match base.scheme() {
            "https" => {}
            "http" if is_loopback(&base) => {}
            "http" => return Err(bad("plain http is for loopback only; use https")),
            _ => return Err(bad("it must begin with https:// (or http:// on loopback)")),
        }
        const UNREADABLE: &str = "the CA certificates given for it cannot be read";
        let authorities = reqwest::Certificate::from_pem_bundle(authorities.as_bytes()).map_err(|_| bad(UNREADABLE))?;
        let without_authorities = authorities.is_empty();
        let http = reqwest::Client::builder()
            .tls_certs_merge(authorities)
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("loom/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|_| match without_authorities {
                true => bad("this system has no CA certificates; install ca-certificates"),
                false => bad(UNREADABLE),
            })?;
        Ok(Self { http, base, token })
    }

    #[must_use]
    pub const fn base(&self) -> &Url {
        &self.base
    }

    /// The same client with another token.
    #[must_use]
    pub fn with_token(&self, token: Secret) -> Self {
        Self { token: Some(token), ..self.clone() }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, path)?).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.json(self.request(Method::POST, path)?.json(body)).await
    }

    /// `POST` that the server performs once, however often it is retried with the same `idempotency_key`.
    pub async fn post_once<T: DeserializeOwned>(
        &self,
        path: &str,
        idempotency_key: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.json(self.request(Method::POST, path)?.header("idempotency-key", idempotency_key).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(self.request(Method::DELETE, path)?.timeout(REQUEST_TIMEOUT)).await.map(drop)
    }

    /// `GET` with a streamed answer and no timeout. The stream yields an error when the connection is cut.
    pub async fn bytes(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<bytes::Bytes, ClientError>> + Send + use<>, ClientError> {
        let response = self.send(self.request(Method::GET, path)?).await?;
        let server = self.base.clone();
        Ok(response.bytes_stream().map(move |chunk| chunk.map_err(|error| unreachable_error(&server, &error))))
    }

    /// `GET` of server-sent events (WHATWG HTML §9.2): the `data` of each, parsed as JSON. The stream yields an error
    /// when the connection is cut, or the server sends an event `error`.
    pub async fn events<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<T, ClientError>> + Send + use<T>, ClientError> {
        let body = Box::pin(self.bytes(path).await?);
        let server = self.base.to_string();
        let state = (body, BytesMut::new(), server);
        Ok(futures_util::stream::try_unfold(state, |(mut body, mut buffer, server)| async move {
            let mut is_error = false;
            loop {
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line = buffer.split_to(end + 1);
                    if let Some(kind) = line.strip_prefix(b"event:") {
                        is_error = kind.trim_ascii() == b"error";
                    }
                    let Some(data) = line.strip_prefix(b"data:") else { continue };
                    let unreadable = |error: serde_json::Error| ClientError::Protocol {
                        server: server.clone(),
                        reason: format!("an event that cannot be parsed: {error}"),
                        status: None,
                    };
                    if is_error {
                        let body: ErrorBody = serde_json::from_slice(data).map_err(unreadable)?;
                        return Err(body.error.into());
                    }
                    let item = serde_json::from_slice(data).map_err(unreadable)?;
                    return Ok(Some((item, (body, buffer, server))));
                }
                if buffer.len() > MAX_LINE {
                    let reason = "an event that is too long".to_owned();
                    return Err(ClientError::Protocol { server, reason, status: None });
                }
                match body.next().await {
                    Some(chunk) => buffer.extend_from_slice(&chunk?),
                    None => return Ok(None),
                }
            }
        }))
    }

    /// Opens a WebSocket at `path`, which may carry a query. A message above `max_frame` bytes ends the connection.
    pub async fn websocket(
        &self,
        path: &str,
        subprotocol: Option<&str>,
        max_frame: usize,
    ) -> Result<WebSocket, ClientError> {
        let key = generate_key();
        let mut request = self
            .request(Method::GET, path)?
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, &key);
        if let Some(subprotocol) = subprotocol {
            request = request.header(header::SEC_WEBSOCKET_PROTOCOL, subprotocol);
        }
        let opening = async {
            let response = self.send(request).await?;
            let accept = response.headers().get(header::SEC_WEBSOCKET_ACCEPT).and_then(|value| value.to_str().ok());
            if response.status() != StatusCode::SWITCHING_PROTOCOLS
                || accept != Some(&derive_accept_key(key.as_bytes()))
            {
                return Err(self.protocol_error("the WebSocket upgrade failed; is a proxy in the way?"));
            }
            response.upgrade().await.map_err(|error| unreachable_error(&self.base, &error))
        };
        let stream = match tokio::time::timeout(REQUEST_TIMEOUT, opening).await {
            Ok(stream) => stream?,
            Err(_) => {
                return Err(ClientError::Unreachable {
                    server: self.base.to_string(),
                    failure: ConnectionFailure::TimedOut,
                    reason: "timed out while opening a WebSocket".to_owned(),
                });
            }
        };
        let config = WebSocketConfig::default()
            .max_message_size(Some(max_frame))
            .max_frame_size(Some(max_frame))
            .read_buffer_size(READ_BUFFER);
        Ok(WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await)
    }

    fn request(&self, method: Method, path: &str) -> Result<reqwest::RequestBuilder, ClientError> {
        let url = self.base.join(path).map_err(|_| ClientError::BadUrl {
            url: format!("{}{path}", self.base),
            reason: "the path cannot be joined to it",
        })?;
        let mut request = self.http.request(method, url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        Ok(request)
    }

    async fn json<T: DeserializeOwned>(&self, request: reqwest::RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request.timeout(REQUEST_TIMEOUT)).await?;
        let body = response.bytes().await.map_err(|error| unreachable_error(&self.base, &error))?;
        serde_json::from_slice(&body).map_err(|error| {
            self.protocol_error(&format!("the answer cannot be parsed ({error}); are the versions too far apart?"))
        })
    }

    /// Sends a request, and turns an error status into [`ClientError::Api`] or [`ClientError::Protocol`].
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, ClientError> {
        let response = request.send().await.map_err(|error| unreachable_error(&self.base, &error))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(body) => Err(body.error.into()),
            Err(_) => Err(ClientError::Protocol {
                server: self.base.to_string(),
                reason: format!("HTTP {status}, not from a Loom server"),
                status: Some(status.as_u16()),
            }),
        }
    }

    fn protocol_error(&self, reason: &str) -> ClientError {
        ClientError::Protocol { server: self.base.to_string(), reason: reason.to_owned(), status: None }
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback()),
        None => false,
    }
}

fn unreachable_error(server: &Url, error: &reqwest::Error) -> ClientError {
    let (failure, reason) = connection::describe(server, error);
    ClientError::Unreachable { server: server.to_string(), failure, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overload_and_outages_are_transient_and_refusals_are_not() {
        let server = || "https://loom.example/".to_owned();
        let unreachable = |failure| ClientError::Unreachable { server: server(), failure, reason: String::new() };
        let answered = |status| ClientError::Protocol { server: server(), reason: String::new(), status };
        let refused = |code| ClientError::from(ApiError::new(code, "no"));
        for error in [
            unreachable(ConnectionFailure::Refused),
            unreachable(ConnectionFailure::Other),
            answered(Some(502)),
            answered(Some(429)),
            refused(ErrorCode::Internal),
        ] {
            assert!(error.is_transient(), "{error:?}");
        }
        for error in [
            unreachable(ConnectionFailure::UnknownIssuer),
            answered(Some(404)),
            answered(None),
            refused(ErrorCode::Unauthorized),
        ] {
            assert!(!error.is_transient(), "{error:?}");
        }
    }

    #[test]
    fn a_token_never_travels_in_clear() {
        for good in ["https://loom.example", "http://127.0.0.1:7700", "http://localhost:7700", "http://[::1]:1"] {
            assert!(Client::new(good, None).is_ok(), "{good}");
        }
        for bad in ["http://loom.example", "ftp://127.0.0.1", "loom.example", "", "http://127.0.0.1.evil.example"] {
            assert!(matches!(Client::new(bad, None), Err(ClientError::BadUrl { .. })), "{bad}");
        }
    }
}
