//! The relay: ciphertext through the server, when UDP cannot go straight.
//!
//! [`frame`] is what stands on the wire, the server's half of it too. `client` keeps the connection that an
//! application's [`RelayConnector`] opens, and `queue` is what waits to be written to it.

pub(crate) mod client;
pub mod frame;
pub(crate) mod queue;

use std::{future::Future, io, pin::Pin};

use bytes::Bytes;
use futures_util::{Sink, Stream};

/// The two halves of one relay connection: each item is one binary WebSocket message.
pub type RelayChannel =
    (Pin<Box<dyn Sink<Bytes, Error = io::Error> + Send>>, Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>);

/// Opens relay connections; the application brings TLS, proxies and credentials.
pub trait RelayConnector: Send + Sync + 'static {
    /// Makes one attempt to connect.
    fn connect(&self) -> impl Future<Output = io::Result<RelayChannel>> + Send;
}
