//! The terminal protocol `loom.attach.v2`: a WebSocket on which binary frames are bytes and text frames are control.
//!
//! A client opens `GET /api/weavers/ID/attach` with the subprotocol [`SUBPROTOCOL`] and the query [`AttachQuery`]. The
//! server sends [`ServerControl::Attached`] first, then either [`ServerControl::Snapshot`] and exactly one binary frame
//! that redraws the screen, or, when the client came back with an offset the host still has, the bytes after it. From
//! there every binary frame continues the output where the one before ended, so a client always knows its offset: the
//! one announced plus the bytes of live frames since (a snapshot's own bytes do not count). A client that was too slow
//! gets a snapshot in mid-stream, and counts on from the offset that this announces.
//!
//! The client's binary frames are input, acknowledged by [`ServerControl::Input`]. A client that reconnects with the
//! same `client` id learns from [`ServerControl::Attached`] how much of its input arrived and sends the rest.
//!
//! The server bridges these frames unchanged between the client and the agent, which speaks the server's side.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub const SUBPROTOCOL: &str = "loom.attach.v2";

/// The largest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// The query of an attach request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachQuery {
    /// The height of the client's window; 0 when it has none.
    #[serde(default)]
    pub rows: u16,
    /// The width of the client's window; 0 when it has none.
    #[serde(default)]
    pub cols: u16,
    /// Observes only: input is refused, and the window does not affect the terminal's size.
    #[serde(default)]
    pub read_only: bool,
    /// Chosen by the client and kept over reconnections, so that input is neither lost nor repeated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Uuid>,
    /// The output offset to continue from: everything before it has been received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The terminal that `offset` belongs to, from [`ServerControl::Attached::terminal`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Uuid>,
}

/// A client's text frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientControl {
    /// The client's window has a new size.
    Resize { rows: u16, cols: u16 },
}

/// The server's text frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerControl {
    /// The first frame.
    Attached {
        /// To be given back in [`AttachQuery::terminal`] when reconnecting. A restarted weaver has a new terminal.
        terminal: Uuid,
        /// The output offset of the next live byte.
        offset: u64,
        /// Bytes of this client's input that have arrived, counted from its first connection.
        input: u64,
    },
    /// The next binary frame redraws the whole screen as it was at `offset`.
    Snapshot { offset: u64, rows: u16, cols: u16 },
    /// The terminal's new size: the smallest window of all clients that may write.
    Resize { rows: u16, cols: u16 },
    /// Acknowledges input.
    Input {
        /// Bytes of this client's input that have arrived, counted from its first connection.
        offset: u64,
    },
    /// How many clients are attached, observers included; sent at every change.
    Presence { clients: u32 },
    /// The weaver ends in so many seconds.
    Expiring { seconds: u64 },
    /// The main program ended; the last frame.
    Exit {
        /// The exit code, or 128 plus the number of the signal that ended it.
        code: i32,
    },
    /// The attach failed, or the user may no longer attach; the last frame.
    Error(crate::ApiError),
}
