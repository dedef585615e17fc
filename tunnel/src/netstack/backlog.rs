//! Connections that peers want and the application has not yet decided about.
//!
//! A SYN (RFC 9293 §3.5) is kept unanswered until the application accepts or refuses, so that a port that nobody
//! listens on in the weaver is *refused*, which a client understands, and not accepted and then closed. The peer's
//! retransmissions of it only replace what is kept.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::segment::Flow;

/// How many may wait; further ones are dropped, and the peer tries again after a second.
const MAX_WAITING: usize = 256;

/// How long one may wait: by then every client has given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A SYN that waits for its answer.
struct Waiting {
    syn: Vec<u8>,
    since: Instant,
}

/// The connections that wait.
#[derive(Default)]
pub(super) struct Backlog {
    waiting: HashMap<Flow, Waiting>,
    /// The same in order of age; may name flows that are gone.
    by_age: VecDeque<(Instant, Flow)>,
    /// Connections that the application has not seen yet.
    news: VecDeque<Flow>,
}

impl Backlog {
    /// Keeps a SYN.
    pub(super) fn offer(&mut self, now: Instant, flow: Flow, packet: &[u8]) {
        self.expire(now);
        if let Some(waiting) = self.waiting.get_mut(&flow) {
            // The same again, or the peer has begun anew from the same port: the latest is the one to answer.
            waiting.syn.clear();
            waiting.syn.extend_from_slice(packet);
            return;
        }
        if self.by_age.len() < MAX_WAITING {
            self.waiting.insert(flow, Waiting { syn: packet.to_vec(), since: now });
            self.by_age.push_back((now, flow));
            self.news.push_back(flow);
        }
    }

    /// The next connection to tell the application of.
    pub(super) fn next(&mut self) -> Option<Flow> {
        loop {
            let flow = self.news.pop_front()?;
            if self.waiting.contains_key(&flow) {
                return Some(flow);
            }
        }
    }

    /// Takes the SYN out; `None` when the peer has given up.
    pub(super) fn take(&mut self, flow: &Flow) -> Option<Vec<u8>> {
        let waiting = self.waiting.remove(flow)?;
        self.by_age.retain(|entry| entry != &(waiting.since, *flow));
        Some(waiting.syn)
    }

    /// Forgets all that came from an address.
    pub(super) fn forget(&mut self, matches: impl Fn(&Flow) -> bool) {
        self.waiting.retain(|flow, _| !matches(flow));
        self.by_age.retain(|(_, flow)| !matches(flow));
    }

    fn expire(&mut self, now: Instant) {
        while let Some(&(since, flow)) = self.by_age.front()
            && now.saturating_duration_since(since) >= PATIENCE
        {
            self.by_age.pop_front();
            self.waiting.remove(&flow);
        }
    }
}
