//! The connection to the server's relay, for the tunnel to run over.

use std::{io, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, future::ready};
use loom_tunnel::relay::{RelayChannel, RelayConnector, frame};
use tokio_tungstenite::tungstenite::Message;

use super::Sidecar;

const SUBPROTOCOL: &str = "loom.relay.v1";

/// Keeps the relay connected until the tunnel ends.
pub(crate) async fn run(sidecar: Arc<Sidecar>) {
    let tunnel = sidecar.tunnel.clone();
    tunnel.run_relay(Connector(sidecar)).await;
}

struct Connector(Arc<Sidecar>);

impl RelayConnector for Connector {
    async fn connect(&self) -> io::Result<RelayChannel> {
        let key = URL_SAFE_NO_PAD.encode(self.0.identity.public_key().as_bytes());
        let path = format!("/api/relay?key={key}");
        let socket = self.0.client().websocket(&path, Some(SUBPROTOCOL), frame::MAX_MESSAGE).await;
        let (sink, stream) = socket.map_err(io::Error::other)?.split();
        let sink = sink.sink_map_err(io::Error::other).with(|frame: Bytes| ready(Ok(Message::Binary(frame))));
        let stream = stream.filter_map(|message| {
            ready(match message {
                Ok(Message::Binary(frame)) => Some(Ok(frame)),
                Ok(_) => None,
                Err(error) => Some(Err(io::Error::other(error))),
            })
        });
        Ok((Box::pin(sink), Box::pin(stream)))
    }
}
