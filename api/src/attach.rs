//! The terminal protocol `loom.attach.v2`: a WebSocket on which binary frames are bytes and text frames are control.
//!
//! A client opens `GET /api/weavers/ID/attach` with the subprotocol [`SUBPROTOCOL`] and the query [`AttachQuery`]. The
//! server sends [`ServerControl::Attached`] first, then either [`ServerControl::Snapshot`] and exactly one binary frame
//! that redraws the screen, or, when the client came back with an offset the host still has, the bytes after it. From
//! there every binary frame continues the output where the one before ended, so a client always knows its offset: the
//! one announced plus the bytes of live frames since (a snapshot's own bytes do not count). After a snapshot in
//! mid-stream (the client was too slow) counting starts again from the offset it announces.
//!
//! The client's binary frames are input. The server acknowledges input by [`ServerControl::Input`]; a client that comes
//! back with the same `client` id learns from [`ServerControl::Attached`] how much of its input arrived and sends the
//! rest.
//!
//! The server bridges these frames unchanged between the client and the agent, which speaks the server's side.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The WebSocket subprotocol's name.
pub const SUBPROTOCOL: &str = "loom.attach.v2";

/// The largest frame either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// The query of an attach request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachQuery {
    /// The client's window, in rows; 0 when it has none.
    #[serde(default)]
    pub rows: u16,
    /// The client's window, in columns; 0 when it has none.
    #[serde(default)]
    pub cols: u16,
    /// Observes only: its input is refused and its window never counts.
    #[serde(default)]
    pub read_only: bool,
    /// The same at every reconnection of one client, so that input is neither lost nor doubled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<Uuid>,
    /// Output up to here was received on the terminal [`ServerControl::Attached::terminal`]; send what follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The terminal that `offset` counts on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Uuid>,
}

/// What a client says in text frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ClientControl {
    /// The client's window changed.
    Resize {
        /// The height in rows.
        rows: u16,
        /// The width in columns.
        cols: u16,
    },
}

/// What the server says in text frames.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerControl {
    /// The client is attached; the first frame.
    Attached {
        /// The terminal, for the reconnection's query.
        terminal: Uuid,
        /// The output offset of the next live byte.
        offset: u64,
        /// How many bytes of this client's input have arrived in all.
        input: u64,
    },
    /// The next binary frame redraws the whole screen as it was at `offset`.
    Snapshot {
        /// The output offset that the snapshot stands for.
        offset: u64,
        /// The terminal's rows.
        rows: u16,
        /// The terminal's columns.
        cols: u16,
    },
    /// The terminal's size changed: the smallest of the writers' windows.
    Resize {
        /// The height in rows.
        rows: u16,
        /// The width in columns.
        cols: u16,
    },
    /// So many bytes of this client's input have arrived in all.
    Input {
        /// Bytes of this client's input that have arrived, counted from its first connection.
        offset: u64,
    },
    /// Who is attached, at every change.
    Presence {
        /// How many clients, observers included.
        clients: u32,
    },
    /// The weaver will end soon.
    Expiring {
        /// Seconds until the weaver ends.
        seconds: u64,
    },
    /// The main program ended; the last frame.
    Exit {
        /// Its exit code, or 128 plus the signal.
        code: i32,
    },
    /// The attach failed; the last frame.
    Error {
        /// One of the API's error codes.
        code: crate::ErrorCode,
        /// What failed, as the user reads it.
        message: String,
    },
}
