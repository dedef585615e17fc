//! The relay: ciphertext through the server, for when direct UDP does not work.
//!
//! [`frame`] is the wire format, also used by the server. `client` maintains the connection that the application's
//! [`RelayConnector`] opens, and `queue` has the frames waiting to be written to it.

pub(crate) mod client;
pub mod frame;
pub(crate) mod queue;

use std::{future::Future, io, pin::Pin};

use bytes::Bytes;
use futures_util::{Sink, Stream};

/// The two halves of one relay connection: each item is one binary WebSocket message.
pub type RelayChannel =
    (Pin<Box<dyn Sink<Bytes, Error = io::Error> + Send>>, Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>);

/// Opens relay connections; implemented by the application, which handles TLS, proxies and credentials.
pub trait RelayConnector: Send + Sync + 'static {
    /// Makes one attempt to connect.
    fn connect(&self) -> impl Future<Output = io::Result<RelayChannel>> + Send;
}
