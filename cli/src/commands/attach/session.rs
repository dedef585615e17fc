//! The state of an attached terminal across connections, as a state machine without I/O.
//!
//! Output is counted, so that the next connection can ask for what follows ([`Session::query`]). Input is kept until the
//! terminal acknowledges it, so that the next connection can send the rest ([`Session::next_input`]): nothing is lost or
//! repeated. The protocol is in `loom_api::attach`.

use bytes::{Buf as _, Bytes, BytesMut};
use loom_api::attach::{AttachQuery, ServerControl};
use uuid::Uuid;

/// Unacknowledged input, in bytes. When it is full no more is read, so a pipe into a program that does not read blocks.
const MAX_PENDING: usize = 256 << 10;
/// In bytes.
const MAX_PIECE: usize = 16 << 10;

/// The state of one attachment across reconnections.
#[derive(Debug)]
pub(super) struct Session {
    client: Uuid,
    read_only: bool,
    /// The terminal's id, from the server's first message on.
    terminal: Option<Uuid>,
    /// The output offset of the next live byte.
    offset: u64,
    /// The next binary frame is a snapshot.
    snapshot_next: bool,
    /// Something else was drawn over the screen, so a snapshot is needed.
    stale: bool,
    /// [`ServerControl::Attached`] has arrived on this connection.
    attached: bool,
    /// Input that is not acknowledged yet.
    pending: BytesMut,
    /// How much of `pending` was sent on this connection.
    sent: usize,
    /// How many bytes of input are acknowledged: the position of the first byte of `pending`.
    arrived: u64,
}

/// What a binary frame contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// Redraws the whole screen.
    Snapshot,
    /// Continues the previous output.
    Live,
}

/// What the client has to know of a control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SessionEvent {
    Nothing,
    Attached,
    /// The weaver ends in this many seconds.
    Expiring(u64),
    /// The program's exit code.
    Exited(i32),
    /// The server has ended the attach.
    Refused(loom_api::ApiError),
}

impl Session {
    pub(super) fn new(client: Uuid, read_only: bool) -> Self {
        Self {
            client,
            read_only,
            terminal: None,
            offset: 0,
            snapshot_next: false,
            stale: false,
            attached: false,
            pending: BytesMut::new(),
            sent: 0,
            arrived: 0,
        }
    }

    /// The query for the next connection, from a window of this size.
    pub(super) fn query(&self, window: Option<(u16, u16)>) -> AttachQuery {
        let (rows, cols) = window.unwrap_or((0, 0));
        let resumes = self.terminal.is_some() && !self.stale && !self.snapshot_next;
        AttachQuery {
            rows,
            cols,
            read_only: self.read_only,
            client: Some(self.client),
            offset: resumes.then_some(self.offset),
            terminal: self.terminal.filter(|_| resumes),
        }
    }

    /// There is a new connection. No input is sent on it until the terminal has said how much it has.
    pub(super) const fn reconnected(&mut self) {
        self.attached = false;
        self.sent = 0;
    }

    /// Something was drawn over the screen, so the next connection asks for a snapshot.
    pub(super) const fn drawn_over(&mut self) {
        self.stale = true;
    }

    pub(super) fn control(&mut self, control: ServerControl) -> SessionEvent {
        match control {
            ServerControl::Attached { terminal, offset, input } => {
                self.terminal = Some(terminal);
                self.offset = offset;
                self.snapshot_next = false;
                if input < self.arrived {
                    // The terminal has forgotten this client and counts from zero: send all pending input.
                    self.arrived = input;
                }
                self.acknowledge(input);
                self.attached = true;
                self.sent = 0;
                SessionEvent::Attached
            }
            ServerControl::Snapshot { offset, .. } => {
                self.offset = offset;
                self.snapshot_next = true;
                SessionEvent::Nothing
            }
            ServerControl::Input { offset } => {
                self.acknowledge(offset);
                SessionEvent::Nothing
            }
            ServerControl::Expiring { seconds } => SessionEvent::Expiring(seconds),
            ServerControl::Exit { code } => SessionEvent::Exited(code),
            ServerControl::Error(error) => SessionEvent::Refused(error),
            ServerControl::Resize { .. } | ServerControl::Presence { .. } => SessionEvent::Nothing,
        }
    }

    /// Counts a binary frame of this length; returns what it contains.
    pub(super) fn output(&mut self, length: usize) -> Frame {
        if std::mem::take(&mut self.snapshot_next) {
            self.stale = false;
            return Frame::Snapshot;
        }
        self.offset += length as u64;
        Frame::Live
    }

    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < MAX_PENDING
    }

    /// Queues input until the server acknowledges it.
    pub(super) fn push_input(&mut self, input: &[u8]) {
        if !self.read_only {
            self.pending.extend_from_slice(input);
        }
    }

    /// The next piece of input to send on this connection.
    pub(super) fn next_input(&mut self) -> Option<Bytes> {
        let unsent = &self.pending[self.sent..];
        if unsent.is_empty() || !self.attached {
            return None;
        }
        let piece = Bytes::copy_from_slice(&unsent[..unsent.len().min(MAX_PIECE)]);
        self.sent += piece.len();
        Some(piece)
    }

    fn acknowledge(&mut self, arrived: u64) {
        // Do not trust a count beyond what was typed.
        let count = arrived.saturating_sub(self.arrived).min(self.pending.len() as u64) as usize;
        self.pending.advance(count);
        self.sent = self.sent.saturating_sub(count);
        self.arrived = self.arrived.max(arrived);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMINAL: Uuid = Uuid::from_u128(7);

    fn attached(offset: u64, input: u64) -> ServerControl {
        ServerControl::Attached { terminal: TERMINAL, offset, input }
    }

    fn session() -> Session {
        Session::new(Uuid::from_u128(1), false)
    }

    /// All that would be sent now.
    fn sent(session: &mut Session) -> Vec<u8> {
        std::iter::from_fn(|| session.next_input()).flatten().collect()
    }

    #[test]
    fn a_new_client_asks_for_a_snapshot_and_a_returning_one_for_what_follows() {
        let mut session = session();
        let query = session.query(Some((24, 80)));
        assert_eq!((query.rows, query.cols, query.offset, query.terminal), (24, 80, None, None));
        assert_eq!(session.control(attached(100, 0)), SessionEvent::Attached);
        session.control(ServerControl::Snapshot { offset: 100, rows: 24, cols: 80 });
        assert_eq!(session.output(5000), Frame::Snapshot);
        assert_eq!(session.output(20), Frame::Live);
        let again = session.query(None);
        assert_eq!((again.rows, again.offset, again.terminal), (0, Some(120), Some(TERMINAL)));
        assert_eq!(again.client, query.client);
    }

    #[test]
    fn a_connection_that_breaks_before_the_snapshot_asks_for_it_again() {
        let mut session = session();
        session.control(attached(100, 0));
        session.control(ServerControl::Snapshot { offset: 100, rows: 24, cols: 80 });
        assert_eq!(session.query(None).offset, None);
    }

    #[test]
    fn a_snapshot_in_midstream_moves_the_offset() {
        let mut session = session();
        session.control(attached(0, 0));
        session.output(10);
        session.control(ServerControl::Snapshot { offset: 5000, rows: 24, cols: 80 });
        session.output(300);
        session.output(1);
        assert_eq!(session.query(None).offset, Some(5001));
    }

    #[test]
    fn a_screen_that_was_drawn_over_is_redrawn() {
        let mut session = session();
        session.control(attached(10, 0));
        session.drawn_over();
        assert_eq!(session.query(None).offset, None);
        session.control(ServerControl::Snapshot { offset: 10, rows: 24, cols: 80 });
        session.output(1);
        assert_eq!(session.query(None).offset, Some(10));
    }

    #[test]
    fn input_that_did_not_arrive_is_sent_again_and_no_other() {
        let mut session = session();
        session.control(attached(0, 0));
        session.push_input(b"hello world");
        assert_eq!(sent(&mut session), b"hello world");
        session.control(ServerControl::Input { offset: 5 });
        assert_eq!(sent(&mut session), b"");
        session.reconnected();
        assert_eq!(sent(&mut session), b"", "what arrived is not known yet");
        session.control(attached(0, 6));
        assert_eq!(sent(&mut session), b"world");
        session.control(ServerControl::Input { offset: 11 });
        session.push_input(b"!");
        assert_eq!(sent(&mut session), b"!");
    }

    #[test]
    fn a_terminal_that_forgot_the_client_counts_from_zero() {
        let mut session = session();
        session.control(attached(0, 0));
        session.push_input(b"abc");
        sent(&mut session);
        session.control(ServerControl::Input { offset: 3 });
        session.push_input(b"de");
        session.reconnected();
        session.control(attached(0, 0));
        assert_eq!(sent(&mut session), b"de");
        session.control(ServerControl::Input { offset: 1 });
        session.reconnected();
        session.control(attached(0, 1));
        assert_eq!(sent(&mut session), b"e");
    }

    #[test]
    fn a_count_beyond_what_was_typed_takes_nothing_away_later() {
        let mut session = session();
        session.control(attached(0, 50));
        session.push_input(b"x");
        assert_eq!(sent(&mut session), b"x");
        session.control(ServerControl::Input { offset: 51 });
        session.reconnected();
        session.control(attached(0, 51));
        assert_eq!(sent(&mut session), b"");
    }

    #[test]
    fn waiting_input_is_bounded_and_pieces_are_small() {
        let mut session = session();
        session.control(attached(0, 0));
        while session.has_room() {
            session.push_input(&[0; 1000]);
        }
        assert!(session.pending.len() < MAX_PENDING + 1000);
        assert_eq!(session.next_input().expect("some").len(), MAX_PIECE);
    }

    #[test]
    fn an_observer_sends_nothing() {
        let mut session = Session::new(Uuid::from_u128(1), true);
        session.push_input(b"x");
        assert_eq!(session.next_input(), None);
        assert!(session.query(None).read_only);
    }
}
