//! Incoming connections that the application has not accepted or refused yet.
//!
//! A SYN (RFC 9293 §3.5) is not answered until the application decides, so that a closed port in the weaver *refuses*
//! connections, instead of accepting and closing them. A retransmitted SYN replaces the earlier one.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::segment::Flow;

/// Beyond this, SYNs are dropped; the peer retransmits after a second.
const MAX_WAITING: usize = 256;

/// By then every client has given up.
const MAX_AGE: Duration = Duration::from_secs(60);

/// A SYN that is not answered yet.
struct Waiting {
    syn: Vec<u8>,
    since: Instant,
}

/// The incoming connections, like the backlog of listen(2).
#[derive(Default)]
pub(super) struct Backlog {
    waiting: HashMap<Flow, Waiting>,
    /// By age; may contain flows that are gone.
    by_age: VecDeque<(Instant, Flow)>,
    /// Connections that the application has not been told of.
    unannounced: VecDeque<Flow>,
}

impl Backlog {
    /// Adds a SYN.
    pub(super) fn offer(&mut self, now: Instant, flow: Flow, packet: &[u8]) {
        self.expire(now);
        if let Some(waiting) = self.waiting.get_mut(&flow) {
            // A retransmission, or a new connection from the same port: answer the latest.
            waiting.syn.clear();
            waiting.syn.extend_from_slice(packet);
            return;
        }
        if self.by_age.len() < MAX_WAITING {
            self.waiting.insert(flow, Waiting { syn: packet.to_vec(), since: now });
            self.by_age.push_back((now, flow));
            self.unannounced.push_back(flow);
        }
    }

    /// The next connection that the application has not been told of.
    pub(super) fn next(&mut self) -> Option<Flow> {
        loop {
            let flow = self.unannounced.pop_front()?;
            if self.waiting.contains_key(&flow) {
                return Some(flow);
            }
        }
    }

    /// Removes and returns the SYN; `None` if the peer has given up.
    pub(super) fn take(&mut self, flow: &Flow) -> Option<Vec<u8>> {
        let waiting = self.waiting.remove(flow)?;
        self.by_age.retain(|entry| entry != &(waiting.since, *flow));
        Some(waiting.syn)
    }

    /// Removes all matching connections.
    pub(super) fn forget(&mut self, matches: impl Fn(&Flow) -> bool) {
        self.waiting.retain(|flow, _| !matches(flow));
        self.by_age.retain(|(_, flow)| !matches(flow));
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(since, flow)) = self.by_age.front()
            && now.saturating_duration_since(since) >= MAX_AGE
        {
            self.by_age.pop_front();
            self.waiting.remove(&flow);
        }
    }
}
