//! The grants of the server: the devices that are admitted as peers of the tunnel.
//!
//! The set is level-triggered: each welcome has all of it, so nothing is lost with a connection. An expired grant is
//! removed here, whether or not the server is reachable.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::Ipv6Addr,
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use loom_api::{WireGuardKey, agent::Grant};
use loom_tunnel::{PeerConfig, PublicKey, Tunnel};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use zeroize::Zeroizing;

/// The clock is checked at least this often, because it may be changed.
const MAX_SLEEP: Duration = Duration::from_secs(60);

/// Adds and removes peers; implemented by [`Tunnel`].
pub(crate) trait Peers: Send + Sync + 'static {
    /// Adds or updates a peer.
    fn admit(&self, peer: PeerConfig);
    /// Removes a peer, and resets its connections.
    fn remove(&self, key: &PublicKey);
}

impl Peers for Tunnel {
    fn admit(&self, peer: PeerConfig) {
        // Devices initiate the handshake.
        self.add_peer(peer, false);
    }

    fn remove(&self, key: &PublicKey) {
        self.remove_peer(key);
    }
}

/// The grants in force.
pub(crate) struct Grants<P = Tunnel> {
    peers: P,
    held: Mutex<Held>,
    /// Grants from before the current welcome that its pages have not named so far.
    stale: Mutex<HashSet<WireGuardKey>>,
    changed: Notify,
}

/// The grants held, with indexes: a weaver may have 10,000 of them, and admitting one must not scan the others.
#[derive(Default)]
struct Held {
    by_key: HashMap<WireGuardKey, HeldGrant>,
    by_address: HashMap<Ipv6Addr, WireGuardKey>,
    by_end: BTreeSet<(Timestamp, WireGuardKey)>,
}

struct HeldGrant {
    grant: Grant,
    user: Arc<str>,
}

impl Held {
    /// Whether this very grant is held, unchanged.
    fn contains(&self, grant: &Grant) -> bool {
        self.by_key.get(&grant.public_key).is_some_and(|held| held.grant == *grant)
    }

    /// Replaces an earlier grant of the same key, and that of another device with the same address.
    fn insert(&mut self, grant: Grant) {
        self.remove(&grant.public_key);
        if let Some(holder) = self.by_address.insert(grant.address, grant.public_key) {
            self.remove(&holder);
            self.by_address.insert(grant.address, grant.public_key);
        }
        self.by_end.insert((grant.expires_at, grant.public_key));
        let user = grant.user.as_str().into();
        self.by_key.insert(grant.public_key, HeldGrant { grant, user });
    }

    fn remove(&mut self, key: &WireGuardKey) -> bool {
        let Some(HeldGrant { grant, .. }) = self.by_key.remove(key) else { return false };
        self.by_address.remove(&grant.address);
        self.by_end.remove(&(grant.expires_at, *key))
    }

    /// The grant that expires first.
    fn first_end(&self) -> Option<(Timestamp, WireGuardKey)> {
        self.by_end.first().copied()
    }
}

impl<P: Peers> Grants<P> {
    pub(crate) fn new(peers: P) -> Self {
        Self { peers, held: Mutex::default(), stale: Mutex::default(), changed: Notify::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }

    fn stale(&self) -> MutexGuard<'_, HashSet<WireGuardKey>> {
        self.stale.lock()
    }

    /// Replaces all grants by these, and if there are more by those that follow in [`Self::add_page`].
    pub(crate) fn replace(&self, grants: Vec<Grant>, more: bool) {
        *self.stale() = self.held().by_key.keys().copied().collect();
        self.add_page(grants, more);
    }

    /// Adds a page of grants. After the last, removes the grants that no page named.
    pub(crate) fn add_page(&self, grants: Vec<Grant>, more: bool) {
        for grant in grants {
            self.add(grant);
        }
        if !more {
            let stale = std::mem::take(&mut *self.stale());
            for key in stale {
                self.revoke(key);
            }
        }
    }

    /// Adds or updates a peer; returns whether it is admitted.
    pub(crate) fn add(&self, grant: Grant) -> bool {
        let key = grant.public_key;
        self.stale().remove(&key);
        if grant.expires_at <= Timestamp::now() {
            self.revoke(key);
            return false;
        }
        let mut held = self.held();
        if held.contains(&grant) {
            return true;
        }
        let Some(preshared_key) = preshared_key(&grant) else {
            tracing::warn!(peer = %key, "ignoring a grant without a valid pre-shared key");
            return false;
        };
        tracing::info!(peer = %key, user = grant.user, address = %grant.address, "a device is admitted");
        self.peers.admit(PeerConfig {
            public_key: PublicKey::from(key.0),
            preshared_key: Some(preshared_key),
            address: grant.address,
            candidates: grant.candidates.clone(),
        });
        // The tunnel also replaces a previous holder of the address.
        held.insert(grant);
        drop(held);
        self.changed.notify_one();
        true
    }

    pub(crate) fn revoke(&self, key: WireGuardKey) {
        if self.held().remove(&key) {
            tracing::info!(peer = %key, "a device is removed");
        }
        self.peers.remove(&PublicKey::from(key.0));
    }

    /// The user who owns a peer's device.
    pub(crate) fn user(&self, peer: &PublicKey) -> Option<Arc<str>> {
        self.held().by_key.get(&WireGuardKey(peer.to_bytes())).map(|held| Arc::clone(&held.user))
    }

    /// Removes peers when their grants expire; never returns.
    pub(crate) async fn expire(&self) {
        loop {
            let next = self.remove_expired(Timestamp::now());
            let pause = next.map_or(MAX_SLEEP, |next| until(next).min(MAX_SLEEP));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Removes expired grants; returns when the next one expires.
    fn remove_expired(&self, now: Timestamp) -> Option<Timestamp> {
        loop {
            let first = self.held().first_end();
            match first {
                Some((end, key)) if end <= now => self.revoke(key),
                first => return first.map(|(end, _)| end),
            }
        }
    }
}

/// The time until then; zero if it is past.
pub(crate) fn until(then: Timestamp) -> Duration {
    Duration::try_from(then.duration_since(Timestamp::now())).unwrap_or_default()
}

fn preshared_key(grant: &Grant) -> Option<[u8; 32]> {
    let bytes = Zeroizing::new(STANDARD.decode(grant.preshared_key.expose()).ok()?);
    bytes.as_slice().try_into().ok()
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use loom_api::Secret;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<HashMap<[u8; 32], Ipv6Addr>>);

    impl Peers for Recorder {
        fn admit(&self, peer: PeerConfig) {
            self.0.lock().insert(peer.public_key.to_bytes(), peer.address);
        }
        fn remove(&self, key: &PublicKey) {
            self.0.lock().remove(key.as_bytes());
        }
    }

    fn grant(number: u8, seconds: i64) -> Grant {
        Grant {
            public_key: WireGuardKey([number; 32]),
            address: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()),
            preshared_key: Secret::from(STANDARD.encode([7; 32])),
            candidates: Vec::new(),
            expires_at: Timestamp::now() + SignedDuration::from_secs(seconds),
            user: format!("user{number}"),
        }
    }

    fn admitted(grants: &Grants<Recorder>) -> Vec<u8> {
        let mut keys: Vec<_> = grants.peers.0.lock().keys().map(|key| key[0]).collect();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn a_welcome_replaces_everything() {
        let grants = Grants::new(Recorder::default());
        grants.replace(vec![grant(1, 60), grant(2, 60)], false);
        assert_eq!(admitted(&grants), [1, 2]);
        grants.replace(vec![grant(2, 60), grant(3, 60)], false);
        assert_eq!(admitted(&grants), [2, 3]);
        assert_eq!(grants.user(&PublicKey::from([3; 32])).as_deref(), Some("user3"));
        assert_eq!(grants.user(&PublicKey::from([1; 32])), None);
    }

    #[test]
    fn an_address_belongs_to_the_device_that_was_granted_it_last() {
        let grants = Grants::new(Recorder::default());
        assert!(grants.add(grant(1, 60)));
        let moved = Grant { public_key: WireGuardKey([2; 32]), ..grant(1, 60) };
        assert!(grants.add(moved.clone()));
        assert_eq!(grants.user(&PublicKey::from([1; 32])), None);
        assert!(grants.user(&PublicKey::from([2; 32])).is_some());
        // Nothing is left of a grant that was changed or removed.
        assert!(grants.add(Grant { expires_at: moved.expires_at + SignedDuration::from_secs(60), ..moved }));
        let held = grants.held();
        assert_eq!((held.by_key.len(), held.by_address.len(), held.by_end.len()), (1, 1, 1));
        drop(held);
        grants.revoke(WireGuardKey([2; 32]));
        let held = grants.held();
        assert!(held.by_key.is_empty() && held.by_address.is_empty() && held.by_end.is_empty());
    }

    #[test]
    fn grants_come_and_go_one_by_one() {
        let grants = Grants::new(Recorder::default());
        assert!(grants.add(grant(1, 60)));
        assert!(grants.add(grant(2, 60)));
        grants.revoke(WireGuardKey([1; 32]));
        assert_eq!(admitted(&grants), [2]);
    }

    #[test]
    fn an_expired_grant_is_not_admitted() {
        let grants = Grants::new(Recorder::default());
        assert!(!grants.add(grant(1, -1)));
        assert!(admitted(&grants).is_empty());
        let bad = Grant { preshared_key: Secret::from("short".to_owned()), ..grant(2, 60) };
        assert!(!grants.add(bad));
        assert!(admitted(&grants).is_empty());
    }

    #[test]
    fn a_peer_is_removed_when_its_grant_expires() {
        let grants = Grants::new(Recorder::default());
        grants.replace(vec![grant(1, 10), grant(2, 100)], false);
        let later = Timestamp::now() + SignedDuration::from_secs(20);
        let next = grants.remove_expired(later).unwrap();
        assert!(next > later);
        assert_eq!(admitted(&grants), [2]);
    }
}
