//! The shared terminal as a state machine without I/O: the screen model, the ring, the attached clients, and what to
//! send each of them next.
//!
//! Output is not queued per client: each has only an offset into the ring and flags for what has changed, and pulls with
//! [`TerminalState::poll`] as fast as it can send. So a slow client costs nothing and delays nobody; when the ring has
//! dropped output that it has not received, it gets a snapshot and continues from there.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use loom_api::attach::{AttachQuery, ServerControl};
use uuid::Uuid;

use super::{Size, ring::Ring, screen::Model};
use crate::protocol::MAX_FRAME;

/// How much output is kept for returning clients, in bytes.
const RING: usize = 512 << 10;
/// How many clients' input counts are kept, for returning clients.
const MAX_REMEMBERED: usize = 256;
/// The size until a client with a window attaches.
const DEFAULT_SIZE: Size = Size { rows: 24, cols: 80 };
/// The model takes 32 bytes per cell, and a snapshot must fit into a frame.
const MAX_SIZE: Size = Size { rows: 300, cols: 500 };

/// An attached client, numbered in the order of attaching.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ClientId(u64);

/// What a client is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Output {
    /// A text frame.
    Control(ServerControl),
    /// A binary frame.
    Bytes(Bytes),
}

/// What to do next for a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    Send(Output),
    /// Nothing to send until the state changes.
    Wait,
    /// Nothing to send any more.
    Done,
}

/// The terminal of the main program.
pub(super) struct TerminalState {
    id: Uuid,
    model: Model,
    ring: Ring,
    size: Size,
    clients: BTreeMap<ClientId, Client>,
    next_client: u64,
    input_counts: InputCounts,
    exit: Option<i32>,
}

struct Client {
    window: Option<Size>,
    read_only: bool,
    /// The id under which this client's input is counted across connections.
    key: Uuid,
    /// The offset of the next byte to send.
    offset: u64,
    /// Sent before everything else: the greeting, and both frames of a snapshot.
    queued: VecDeque<Output>,
    /// Changes that the client has not been told of.
    updates: Updates,
    /// The exit status was sent.
    done: bool,
}

#[derive(Default)]
struct Updates {
    input: bool,
    size: bool,
    presence: bool,
    expiring: Option<u64>,
}

impl TerminalState {
    /// A terminal without clients or output.
    pub(super) fn new(id: Uuid) -> Self {
        Self {
            id,
            model: Model::new(DEFAULT_SIZE),
            ring: Ring::new(RING),
            size: DEFAULT_SIZE,
            clients: BTreeMap::new(),
            next_client: 0,
            input_counts: InputCounts::default(),
            exit: None,
        }
    }

    /// The terminal's size.
    pub(super) const fn size(&self) -> Size {
        self.size
    }

    /// The last part of the output.
    pub(super) const fn output(&self) -> &Ring {
        &self.ring
    }

    /// The exit code, once the program has ended and all its output was fed.
    pub(super) const fn exit(&self) -> Option<i32> {
        self.exit
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.model.feed(bytes);
        self.ring.push(bytes);
    }

    /// The program has ended; [`Self::feed`] is not called after this.
    pub(super) const fn end(&mut self, code: i32) {
        self.exit = Some(code);
    }

    /// Adds a client. `fresh` is the key for one that has none. A client with the same key is removed: it is the same
    /// client's previous connection, and its input must not be counted together with the new one's.
    pub(super) fn join(&mut self, query: &AttachQuery, fresh: Uuid) -> ClientId {
        let key = query.client.unwrap_or(fresh);
        self.clients.retain(|_, client| client.key != key);
        let id = ClientId(self.next_client);
        self.next_client += 1;
        let window = (query.rows > 0 && query.cols > 0).then_some(Size { rows: query.rows, cols: query.cols });
        let mut client = Client {
            window,
            read_only: query.read_only,
            key,
            offset: 0,
            queued: VecDeque::new(),
            updates: Updates::default(),
            done: false,
        };
        self.input_counts.touch(key);
        let resumes =
            query.offset.filter(|offset| query.terminal == Some(self.id) && self.ring.get(*offset, 0).is_some());
        client.offset = resumes.unwrap_or_else(|| self.ring.end());
        client.queued.push_back(Output::Control(ServerControl::Attached {
            terminal: self.id,
            offset: client.offset,
            input: self.input_counts.of(key),
        }));
        self.clients.insert(id, client);
        self.resize_to_smallest();
        if resumes.is_none() {
            self.queue_snapshot(id, true);
        } else if let Some(client) = self.clients.get_mut(&id) {
            client.updates.size = true;
        }
        self.announce_presence();
        id
    }

    pub(super) fn leave(&mut self, id: ClientId) {
        if self.clients.remove(&id).is_some() {
            self.resize_to_smallest();
            self.announce_presence();
        }
    }

    /// Decides whether a client's input is accepted; if so, counts it as arrived.
    pub(super) fn accept_input(&mut self, id: ClientId, length: usize) -> bool {
        let Some(client) = self.clients.get_mut(&id).filter(|client| !client.read_only) else {
            return false;
        };
        self.input_counts.add(client.key, length as u64);
        client.updates.input = true;
        true
    }

    /// A client's window has a new size.
    pub(super) fn resize(&mut self, id: ClientId, rows: u16, cols: u16) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.window = (rows > 0 && cols > 0).then_some(Size { rows, cols });
            self.resize_to_smallest();
        }
    }

    /// Tells all clients that the weaver ends in so many seconds.
    pub(super) fn announce_expiry(&mut self, seconds: u64) {
        for client in self.clients.values_mut() {
            client.updates.expiring = Some(seconds);
        }
    }

    /// What to send a client next.
    pub(super) fn poll(&mut self, id: ClientId) -> Next {
        let present = u32::try_from(self.clients.len()).unwrap_or(u32::MAX);
        let Some(client) = self.clients.get_mut(&id).filter(|client| !client.done) else {
            return Next::Done;
        };
        if let Some(output) = client.queued.pop_front() {
            return Next::Send(output);
        }
        if let Some(control) = client.updates.take(self.size, present, self.input_counts.of(client.key)) {
            return Next::Send(Output::Control(control));
        }
        match self.ring.get(client.offset, MAX_FRAME) {
            None => {
                self.queue_snapshot(id, false);
                self.poll(id)
            }
            Some(bytes) if bytes.is_empty() => match self.exit {
                None => Next::Wait,
                Some(code) => {
                    client.done = true;
                    Next::Send(Output::Control(ServerControl::Exit { code }))
                }
            },
            Some(bytes) => {
                client.offset += bytes.len() as u64;
                Next::Send(Output::Bytes(bytes))
            }
        }
    }

    /// Queues a snapshot for a client. The scrollback is for new clients; others have it in their own terminal.
    fn queue_snapshot(&mut self, id: ClientId, scrollback: bool) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Size { rows, cols } = self.size;
        let offset = self.ring.end();
        let snapshot = self.model.snapshot(client.window.map_or(rows, |window| window.rows), scrollback);
        client.queued.push_back(Output::Control(ServerControl::Snapshot { offset, rows, cols }));
        client.queued.push_back(Output::Bytes(snapshot));
        client.offset = offset;
        client.updates.size = false;
    }

    /// Resizes the terminal to the smallest window of the clients that may write.
    fn resize_to_smallest(&mut self) {
        let windows = self.clients.values().filter(|client| !client.read_only).filter_map(|client| client.window);
        let Some(smallest) = windows.reduce(Size::min) else { return };
        let size = smallest.min(MAX_SIZE);
        if size == self.size || self.exit.is_some() {
            return;
        }
        self.size = size;
        self.model.resize(size);
        for client in self.clients.values_mut() {
            client.updates.size = true;
        }
    }

    fn announce_presence(&mut self) {
        for client in self.clients.values_mut() {
            client.updates.presence = true;
        }
    }
}

impl Updates {
    /// The next change to tell, with the current values.
    fn take(&mut self, size: Size, clients: u32, input: u64) -> Option<ServerControl> {
        if std::mem::take(&mut self.input) {
            return Some(ServerControl::Input { offset: input });
        }
        if std::mem::take(&mut self.size) {
            return Some(ServerControl::Resize { rows: size.rows, cols: size.cols });
        }
        if std::mem::take(&mut self.presence) {
            return Some(ServerControl::Presence { clients });
        }
        self.expiring.take().map(|seconds| ServerControl::Expiring { seconds })
    }
}

/// How much input has arrived from each client. The client that was away longest is dropped first.
#[derive(Default)]
struct InputCounts(VecDeque<(Uuid, u64)>);

impl InputCounts {
    fn of(&self, key: Uuid) -> u64 {
        self.0.iter().rev().find(|(known, _)| *known == key).map_or(0, |(_, count)| *count)
    }

    fn touch(&mut self, key: Uuid) {
        let count = self.of(key);
        self.0.retain(|(known, _)| *known != key);
        if self.0.len() == MAX_REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((key, count));
    }

    fn add(&mut self, key: Uuid, bytes: u64) {
        if let Some((_, count)) = self.0.iter_mut().rev().find(|(known, _)| *known == key) {
            *count += bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMINAL: Uuid = Uuid::from_u128(1);

    fn state() -> TerminalState {
        TerminalState::new(TERMINAL)
    }

    fn query(rows: u16, cols: u16) -> AttachQuery {
        AttachQuery { rows, cols, read_only: false, client: None, offset: None, terminal: None }
    }

    fn join(state: &mut TerminalState, query: &AttachQuery) -> ClientId {
        let fresh = Uuid::from_u128(u128::from(state.next_client) + 1000);
        state.join(query, fresh)
    }

    fn drain(state: &mut TerminalState, id: ClientId) -> Vec<Output> {
        std::iter::from_fn(|| match state.poll(id) {
            Next::Send(output) => Some(output),
            Next::Wait | Next::Done => None,
        })
        .collect()
    }

    fn controls(outputs: &[Output]) -> Vec<ServerControl> {
        outputs
            .iter()
            .filter_map(|output| match output {
                Output::Control(control) => Some(control.clone()),
                Output::Bytes(_) => None,
            })
            .collect()
    }

    fn bytes(outputs: &[Output]) -> Vec<u8> {
        let parts = outputs.iter().filter_map(|output| match output {
            Output::Bytes(bytes) => Some(bytes.clone()),
            Output::Control(_) => None,
        });
        parts.flatten().collect()
    }

    #[test]
    fn a_new_client_gets_greeting_snapshot_and_then_live_bytes() {
        let mut state = state();
        state.feed(b"before");
        let id = join(&mut state, &query(24, 80));
        let greeting = drain(&mut state, id);
        assert_eq!(
            controls(&greeting),
            [
                ServerControl::Attached { terminal: TERMINAL, offset: 6, input: 0 },
                ServerControl::Snapshot { offset: 6, rows: 24, cols: 80 },
                ServerControl::Presence { clients: 1 },
            ]
        );
        assert!(matches!(&greeting[2], Output::Bytes(snapshot) if !snapshot.is_empty()));
        state.feed(b"after");
        assert_eq!(drain(&mut state, id), [Output::Bytes(Bytes::from_static(b"after"))]);
        assert_eq!(state.poll(id), Next::Wait);
    }

    #[test]
    fn a_returning_client_gets_exactly_what_it_missed() {
        let mut state = state();
        state.feed(b"0123456789");
        let back = AttachQuery { offset: Some(4), terminal: Some(TERMINAL), ..query(24, 80) };
        let id = join(&mut state, &back);
        let outputs = drain(&mut state, id);
        assert_eq!(controls(&outputs)[0], ServerControl::Attached { terminal: TERMINAL, offset: 4, input: 0 });
        assert_eq!(bytes(&outputs), b"456789");
    }

    #[test]
    fn too_old_and_foreign_offsets_get_a_snapshot() {
        let mut state = state();
        state.feed(&vec![b'x'; RING + 10]);
        for (offset, terminal) in [(9, TERMINAL), (RING as u64 + 11, TERMINAL), (RING as u64, Uuid::from_u128(2))] {
            let back = AttachQuery { offset: Some(offset), terminal: Some(terminal), ..query(24, 80) };
            let id = join(&mut state, &back);
            let controls = controls(&drain(&mut state, id));
            assert!(matches!(controls[1], ServerControl::Snapshot { offset, .. } if offset == RING as u64 + 10));
        }
    }

    #[test]
    fn input_is_counted_across_reconnections_and_never_twice() {
        let mut state = state();
        let key = Some(Uuid::from_u128(9));
        let first = join(&mut state, &AttachQuery { client: key, ..query(24, 80) });
        assert!(state.accept_input(first, 5));
        assert!(state.accept_input(first, 2));
        assert!(controls(&drain(&mut state, first)).contains(&ServerControl::Input { offset: 7 }));
        let second = join(&mut state, &AttachQuery { client: key, ..query(24, 80) });
        assert!(!state.accept_input(first, 3), "the earlier connection is over");
        assert_eq!(state.poll(first), Next::Done);
        let greeting = controls(&drain(&mut state, second));
        assert!(matches!(greeting[0], ServerControl::Attached { input: 7, .. }));
        state.leave(second);
        for other in 0..MAX_REMEMBERED as u128 {
            let id = state.join(&query(0, 0), Uuid::from_u128(10_000 + other));
            state.leave(id);
        }
        assert_eq!(state.input_counts.of(Uuid::from_u128(9)), 0);
        assert_eq!(state.input_counts.0.len(), MAX_REMEMBERED);
    }

    #[test]
    fn the_smallest_writer_decides_the_size_and_observers_never_do() {
        let mut state = state();
        let large = join(&mut state, &query(50, 200));
        assert_eq!(state.size(), Size { rows: 50, cols: 200 });
        let observer = join(&mut state, &AttachQuery { read_only: true, ..query(5, 5) });
        assert_eq!(state.size(), Size { rows: 50, cols: 200 });
        assert!(!state.accept_input(observer, 1));
        let _ = drain(&mut state, large);
        let small = join(&mut state, &query(60, 100));
        assert_eq!(state.size(), Size { rows: 50, cols: 100 });
        assert_eq!(
            controls(&drain(&mut state, large)),
            [ServerControl::Resize { rows: 50, cols: 100 }, ServerControl::Presence { clients: 3 }]
        );
        state.leave(small);
        assert_eq!(state.size(), Size { rows: 50, cols: 200 });
        state.resize(large, 10_000, 10_000);
        assert_eq!(state.size(), MAX_SIZE);
        state.leave(large);
        assert_eq!(state.size(), MAX_SIZE, "nobody left to say otherwise");
    }

    #[test]
    fn a_slow_client_is_skipped_to_a_snapshot_and_costs_the_others_nothing() {
        let mut state = state();
        let (slow, quick) = (join(&mut state, &query(24, 80)), join(&mut state, &query(24, 80)));
        let _ = (drain(&mut state, slow), drain(&mut state, quick));
        let mut seen = 0;
        for _ in 0..RING / 1000 + 10 {
            state.feed(&[b'y'; 1000]);
            seen += bytes(&drain(&mut state, quick)).len();
        }
        assert_eq!(seen as u64, state.output().end());
        let outputs = drain(&mut state, slow);
        assert_eq!(controls(&outputs), [ServerControl::Snapshot { offset: state.output().end(), rows: 24, cols: 80 }]);
        assert_eq!(outputs.len(), 2);
    }

    #[test]
    fn joining_writes_nothing_into_the_others_output() {
        let mut state = state();
        let one = join(&mut state, &query(24, 80));
        let _ = drain(&mut state, one);
        let _two = join(&mut state, &query(24, 80));
        assert_eq!(drain(&mut state, one), [Output::Control(ServerControl::Presence { clients: 2 })]);
    }

    #[test]
    fn all_clients_get_the_exit_status_even_those_who_attach_later() {
        let mut state = state();
        let early = join(&mut state, &query(24, 80));
        let _ = drain(&mut state, early);
        state.announce_expiry(60);
        state.feed(b"bye");
        state.end(3);
        let outputs = drain(&mut state, early);
        assert_eq!(controls(&outputs), [ServerControl::Expiring { seconds: 60 }, ServerControl::Exit { code: 3 }]);
        assert_eq!(bytes(&outputs), b"bye");
        assert_eq!(state.poll(early), Next::Done);
        let late = join(&mut state, &query(24, 80));
        let outputs = drain(&mut state, late);
        assert_eq!(controls(&outputs).last(), Some(&ServerControl::Exit { code: 3 }));
        assert!(String::from_utf8_lossy(&bytes(&outputs)).contains("bye"));
    }
}
