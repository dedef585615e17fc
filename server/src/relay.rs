//! The relay: ciphertext between a weaver's agent and a device that hold a grant, when UDP cannot go straight.
//!
//! A connection is one WebSocket and stands for one WireGuard key, which its token must own. The relay checks a
//! message's frame (`loom_tunnel::relay::frame` has the layout), exchanges the key, and forwards the rest as it is. It
//! holds nothing: after a restart both sides come back, and their WireGuard sessions go on.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use jiff::Timestamp;
use loom_api::WireGuardKey;
use parking_lot::{Mutex, MutexGuard, RwLock, RwLockWriteGuard};
use tokio::sync::Notify;

/// What may wait for one receiver, in bytes; the oldest is dropped beyond that. A relay that holds more only adds
/// delay.
const QUEUE_BYTES: usize = 1 << 20;

/// Who is connected, and who may talk to whom.
#[derive(Default)]
pub struct Relay {
    connections: RwLock<HashMap<WireGuardKey, Arc<Connection>>>,
    peers: RwLock<Peers>,
    serial: AtomicU64,
}

/// Whom each key may talk to, and until when; each pair stands both ways round.
#[derive(Default)]
struct Peers(HashMap<WireGuardKey, HashMap<WireGuardKey, Timestamp>>);

/// One key's place on the relay.
pub struct Connection {
    serial: u64,
    queue: Mutex<Queue>,
    ready: Notify,
}

#[derive(Default)]
struct Queue {
    messages: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
}

impl Relay {
    /// Lets an agent and a device talk, until then.
    pub fn permit(&self, agent: WireGuardKey, device: WireGuardKey, until: Timestamp) {
        self.peers_mut().insert(agent, device, until);
    }

    /// Moves the end of all that an agent is permitted.
    pub fn extend(&self, agent: WireGuardKey, until: Timestamp) {
        let mut peers = self.peers_mut();
        for (device, _) in peers.of(agent) {
            peers.insert(agent, device, until);
        }
    }

    /// Takes that back.
    pub fn forbid(&self, agent: WireGuardKey, device: WireGuardKey) {
        self.peers_mut().remove(agent, device);
    }

    /// Forgets a key: it may talk to nobody, and its connection ends.
    pub fn remove(&self, key: WireGuardKey) {
        self.peers_mut().remove_all(key);
        let connection = self.connections.write().remove(&key);
        if let Some(connection) = connection {
            connection.close();
        }
    }

    /// Ends a key's connection. Its owner comes back, and finds what has changed.
    pub fn hang_up(&self, key: &WireGuardKey) {
        if let Some(connection) = self.connection(key) {
            connection.close();
        }
    }

    /// The holder of `before` has the key `now`, and may talk to the same peers.
    pub fn replace(&self, before: WireGuardKey, now: WireGuardKey) {
        {
            let mut peers = self.peers_mut();
            for (peer, until) in peers.of(before) {
                peers.insert(now, peer, until);
            }
        }
        self.remove(before);
    }

    fn peers_mut(&self) -> RwLockWriteGuard<'_, Peers> {
        self.peers.write()
    }

    pub fn may_talk(&self, from: &WireGuardKey, to: &WireGuardKey) -> bool {
        let peers = self.peers.read();
        peers.until(from, to).is_some_and(|until| Timestamp::now() < until)
    }

    pub fn connection(&self, key: &WireGuardKey) -> Option<Arc<Connection>> {
        self.connections.read().get(key).cloned()
    }

    /// Takes a place; an older connection of the same key ends.
    pub fn connect(&self, key: WireGuardKey) -> Arc<Connection> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection { serial, queue: Mutex::default(), ready: Notify::new() });
        let older = self.connections.write().insert(key, Arc::clone(&connection));
        if let Some(older) = older {
            older.close();
        }
        connection
    }

    pub fn disconnect(&self, key: &WireGuardKey, connection: &Connection) {
        let mut connections = self.connections.write();
        if connections.get(key).is_some_and(|now| now.serial == connection.serial) {
            connections.remove(key);
        }
    }
}

impl Peers {
    fn insert(&mut self, one: WireGuardKey, other: WireGuardKey, until: Timestamp) {
        self.0.entry(one).or_default().insert(other, until);
        self.0.entry(other).or_default().insert(one, until);
    }

    fn remove(&mut self, one: WireGuardKey, other: WireGuardKey) {
        for (from, to) in [(one, other), (other, one)] {
            if let Some(peers) = self.0.get_mut(&from) {
                peers.remove(&to);
                if peers.is_empty() {
                    self.0.remove(&from);
                }
            }
        }
    }

    fn remove_all(&mut self, key: WireGuardKey) {
        for (peer, _) in self.of(key) {
            self.remove(key, peer);
        }
    }

    fn of(&self, key: WireGuardKey) -> Vec<(WireGuardKey, Timestamp)> {
        self.0.get(&key).into_iter().flatten().map(|(peer, until)| (*peer, *until)).collect()
    }

    fn until(&self, from: &WireGuardKey, to: &WireGuardKey) -> Option<Timestamp> {
        self.0.get(from)?.get(to).copied()
    }
}

impl Connection {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    /// Queues a message; the oldest give way.
    pub fn push(&self, message: Bytes) {
        let mut queue = self.queue();
        queue.bytes += message.len();
        queue.messages.push_back(message);
        while queue.bytes > QUEUE_BYTES
            && let Some(oldest) = queue.messages.pop_front()
        {
            queue.bytes -= oldest.len();
        }
        drop(queue);
        self.ready.notify_one();
    }

    fn close(&self) {
        self.queue().closed = true;
        self.ready.notify_one();
    }

    /// All that waits; nothing once the connection was replaced by a newer one.
    pub async fn take(&self) -> Option<VecDeque<Bytes>> {
        loop {
            {
                let mut queue = self.queue();
                if queue.closed {
                    return None;
                }
                if !queue.messages.is_empty() {
                    queue.bytes = 0;
                    return Some(std::mem::take(&mut queue.messages));
                }
            }
            self.ready.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_queue_drops_its_oldest_and_holds_a_bounded_number_of_bytes() {
        let relay = Relay::default();
        let connection = relay.connect(WireGuardKey([1; 32]));
        for number in 0..40_u8 {
            connection.push(Bytes::from(vec![number; 60_000]));
        }
        let taken = connection.take().await.expect("messages");
        assert!(taken.iter().map(Bytes::len).sum::<usize>() <= QUEUE_BYTES);
        assert_eq!(taken.back().map(|last| last[0]), Some(39), "the newest is kept");
    }

    #[tokio::test]
    async fn a_newer_connection_of_a_key_ends_the_older() {
        let (relay, key) = (Relay::default(), WireGuardKey([1; 32]));
        let older = relay.connect(key);
        let newer = relay.connect(key);
        assert!(older.take().await.is_none());
        relay.disconnect(&key, &older);
        assert!(relay.connection(&key).is_some_and(|now| now.serial == newer.serial));
    }

    #[tokio::test]
    async fn only_those_with_a_grant_talk_and_one_that_is_removed_is_cut() {
        let relay = Relay::default();
        let [agent, device, other] = [1, 2, 3].map(|byte| WireGuardKey([byte; 32]));
        assert!(!relay.may_talk(&agent, &device));
        let soon = Timestamp::now() + jiff::SignedDuration::from_secs(60);
        relay.permit(agent, device, soon);
        relay.permit(agent, other, soon);
        assert!(relay.may_talk(&agent, &device) && relay.may_talk(&device, &agent) && !relay.may_talk(&device, &other));
        relay.permit(agent, other, Timestamp::now() - jiff::SignedDuration::from_secs(1));
        assert!(!relay.may_talk(&agent, &other), "a grant that has ended counts for nothing");

        let again = WireGuardKey([4; 32]);
        relay.replace(agent, again);
        assert!(relay.may_talk(&again, &device) && !relay.may_talk(&agent, &device));
        let connection = relay.connect(device);
        relay.remove(device);
        assert!(connection.take().await.is_none() && !relay.may_talk(&again, &device));
        relay.forbid(again, other);
        assert!(relay.peers_mut().0.is_empty(), "nothing is left");
    }
}
