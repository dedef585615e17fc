//! The grants of the server: the devices that are admitted as peers of the tunnel.
//!
//! The set is level-triggered: each welcome has all of it, so nothing is lost with a connection. An expired grant is
//! removed here, whether or not the server is reachable.

use std::{
    collections::{HashMap, HashSet},
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
    held: Mutex<HashMap<WireGuardKey, Held>>,
    /// Grants from before the current welcome that its pages have not named so far.
    stale: Mutex<HashSet<WireGuardKey>>,
    changed: Notify,
}

#[derive(Clone)]
struct Held {
    grant: Grant,
    user: Arc<str>,
}

impl<P: Peers> Grants<P> {
    pub(crate) fn new(peers: P) -> Self {
        Self { peers, held: Mutex::default(), stale: Mutex::default(), changed: Notify::new() }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<WireGuardKey, Held>> {
        self.held.lock()
    }

    fn stale(&self) -> MutexGuard<'_, HashSet<WireGuardKey>> {
        self.stale.lock()
    }

    /// Replaces all grants by these, and if there are more by those that follow in [`Self::add_page`].
    pub(crate) fn replace(&self, grants: Vec<Grant>, more: bool) {
        *self.stale() = self.held().keys().copied().collect();
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
        if held.get(&key).is_some_and(|held| held.grant == grant) {
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
        // An address belongs to one device; the tunnel also replaces a previous holder.
        held.retain(|_, other| other.grant.address != grant.address || other.grant.public_key == key);
        let user = grant.user.as_str().into();
        held.insert(key, Held { grant, user });
        drop(held);
        self.changed.notify_one();
        true
    }

    pub(crate) fn revoke(&self, key: WireGuardKey) {
        if self.held().remove(&key).is_some() {
            tracing::info!(peer = %key, "a device is removed");
        }
        self.peers.remove(&PublicKey::from(key.0));
    }

    /// The user who owns a peer's device.
    pub(crate) fn user(&self, peer: &PublicKey) -> Option<Arc<str>> {
        self.held().get(&WireGuardKey(peer.to_bytes())).map(|held| Arc::clone(&held.user))
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
        let expired: Vec<_> = self
            .held()
            .values()
            .filter(|held| held.grant.expires_at <= now)
            .map(|held| held.grant.public_key)
            .collect();
        for key in expired {
            self.revoke(key);
        }
        self.held().values().map(|held| held.grant.expires_at).min()
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
    use std::net::Ipv6Addr;

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
