//! What the server's WebSockets have in common: how they are kept alive, and how they say why they end.

use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message};
use futures_util::{Sink, SinkExt as _};
use loom_api::{ApiError, ErrorCode};
use tokio::time::timeout;

/// Between two pings: under the minute after which proxies cut a quiet connection.
pub const PING: Duration = Duration::from_secs(15);
/// A peer that was not heard of for so long is gone: two pings were not answered.
pub const SILENCE: Duration = Duration::from_secs(40);
/// How long a peer may take for the closing frame. It is a courtesy: the connection ends in any case.
const CLOSING: Duration = Duration::from_secs(1);

/// Why the server closes a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Close {
    /// All was said.
    Done,
    /// The peer may come back at once.
    Restart,
    /// The peer has lost its right to the connection.
    Refused(ApiError),
}

impl Close {
    /// The code (RFC 6455 §7.4, and IANA's registry of WebSocket close codes) and the reason.
    fn frame(&self) -> CloseFrame {
        let (code, reason) = match self {
            Self::Done => (1000, ""),
            Self::Restart => (1012, ""),
            Self::Refused(error) if error.code == ErrorCode::Unauthorized => (3000, &*error.message),
            Self::Refused(error) => (3003, &*error.message),
        };
        // RFC 6455 §5.5: control frames carry at most 125 bytes, two of which are the code.
        CloseFrame { code, reason: reason[..reason.floor_char_boundary(123)].into() }
    }

    /// Tells the peer, after a last message if there is one.
    pub async fn tell<S: Sink<Message> + Unpin>(&self, sink: &mut S, last: Option<Message>) {
        let telling = async {
            if let Some(last) = last {
                sink.feed(last).await?;
            }
            sink.send(Message::Close(Some(self.frame()))).await
        };
        // The peer may have gone, or take nothing.
        let _ = timeout(CLOSING, telling).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_fits_into_its_frame() {
        let frame = Close::Refused(ApiError::new(ErrorCode::Forbidden, "é".repeat(100))).frame();
        assert_eq!((frame.code, frame.reason.len()), (3003, 122));
    }
}
