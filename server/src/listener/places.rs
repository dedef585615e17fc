//! A bounded number of places, for all and for each network. In a full table who has waited longest gives way.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

use super::refusal::Refusal;

/// A table of places. Cheap to clone.
#[derive(Clone)]
pub(super) struct Places(Arc<Shared>);

struct Shared {
    table: Mutex<Table>,
    max: usize,
    max_per_network: usize,
}

#[derive(Default)]
struct Table {
    /// Numbers places and turns to wait.
    next: u64,
    taken: HashMap<u64, Taken>,
    /// Places by when they began to wait.
    waiting: BTreeMap<u64, u64>,
    networks: HashMap<IpAddr, Network>,
}

struct Taken {
    network: Option<IpAddr>,
    /// When it began to wait, if it does.
    turn: Option<u64>,
    given_away: CancellationToken,
}

#[derive(Default)]
struct Network {
    taken: usize,
    /// Turns of its places that wait.
    waiting: BTreeSet<u64>,
}

/// A place in the table until it is dropped. It waits at first.
pub(super) struct Place {
    places: Places,
    id: u64,
    given_away: CancellationToken,
}

impl Places {
    /// A table with `max` places, of which one network takes at most `max_per_network`.
    pub(super) fn new(max: usize, max_per_network: usize) -> Self {
        Self(Arc::new(Shared { table: Mutex::default(), max, max_per_network }))
    }

    /// Takes a place, that of another if it must. Without a network it counts only among all.
    ///
    /// # Errors
    ///
    /// When nobody waits whose place it could be.
    pub(super) fn take(&self, network: Option<IpAddr>) -> Result<Place, Refusal> {
        let mut table = self.table();
        if let Some(network) = network {
            table.make_room_in(network, self.0.max_per_network)?;
        }
        if table.taken.len() >= self.0.max {
            let oldest = table.waiting.first_key_value().map(|(_, id)| *id).ok_or(Refusal::Total)?;
            table.give_away(oldest);
        }
        let (id, given_away) = (table.number(), CancellationToken::new());
        table.taken.insert(id, Taken { network: None, turn: None, given_away: given_away.clone() });
        table.join(id, network);
        table.wait(id);
        drop(table);
        Ok(Place { places: self.clone(), id, given_away })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that changes the table panics halfway.
        self.0.table.lock()
    }
}

impl Place {
    /// Waits for the client from now on: the place may be given away.
    pub(super) fn wait(&self) {
        self.places.table().wait(self.id);
    }

    /// Keeps the place: its client is being served.
    pub(super) fn keep(&self) {
        self.places.table().keep(self.id);
    }

    /// Counts for a network from now on.
    ///
    /// # Errors
    ///
    /// When all places of the network are taken by those that are served.
    pub(super) fn join(&self, network: IpAddr) -> Result<(), Refusal> {
        let mut table = self.places.table();
        table.make_room_in(network, self.places.0.max_per_network)?;
        table.join(self.id, Some(network));
        Ok(())
    }

    /// Counts for no network any more, only among all.
    pub(super) fn leave_network(&self) {
        self.places.table().join(self.id, None);
    }

    /// Is cancelled when the place is given to another.
    pub(super) fn given_away(&self) -> CancellationToken {
        self.given_away.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.table().remove(self.id);
    }
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn make_room_in(&mut self, network: IpAddr, max: usize) -> Result<(), Refusal> {
        if let Some(full) = self.networks.get(&network).filter(|network| network.taken >= max) {
            let oldest = full.waiting.first().and_then(|turn| self.waiting.get(turn)).copied();
            self.give_away(oldest.ok_or(Refusal::Address)?);
        }
        Ok(())
    }

    fn give_away(&mut self, id: u64) {
        if let Some(taken) = self.remove(id) {
            taken.given_away.cancel();
        }
    }

    fn remove(&mut self, id: u64) -> Option<Taken> {
        self.keep(id);
        self.join(id, None);
        self.taken.remove(&id)
    }

    fn wait(&mut self, id: u64) {
        let turn = self.number();
        let Some(taken) = self.taken.get_mut(&id).filter(|taken| taken.turn.is_none()) else { return };
        taken.turn = Some(turn);
        self.waiting.insert(turn, id);
        if let Some(network) = taken.network.and_then(|network| self.networks.get_mut(&network)) {
            network.waiting.insert(turn);
        }
    }

    fn keep(&mut self, id: u64) {
        let Some(taken) = self.taken.get_mut(&id) else { return };
        let Some(turn) = taken.turn.take() else { return };
        self.waiting.remove(&turn);
        if let Some(network) = taken.network.and_then(|network| self.networks.get_mut(&network)) {
            network.waiting.remove(&turn);
        }
    }

    fn join(&mut self, id: u64, network: Option<IpAddr>) {
        let Some(taken) = self.taken.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut taken.network, network)
            && let Some(left) = self.networks.get_mut(&old)
        {
            left.taken -= 1;
            if let Some(turn) = taken.turn {
                left.waiting.remove(&turn);
            }
            if left.taken == 0 {
                self.networks.remove(&old);
            }
        }
        if let Some(network) = network {
            let joined = self.networks.entry(network).or_default();
            joined.taken += 1;
            joined.waiting.extend(taken.turn);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn address(last: u8) -> Option<IpAddr> {
        Some(Ipv4Addr::new(192, 0, 2, last).into())
    }

    fn is_given_away(place: &Place) -> bool {
        place.given_away.is_cancelled()
    }

    #[test]
    fn the_longest_waiting_of_the_same_network_gives_way() {
        let places = Places::new(100, 3);
        let other = places.take(address(1)).expect("room");
        let own: Vec<_> = (0..3).map(|_| places.take(address(2)).expect("room")).collect();
        own[0].keep();
        own[0].wait();
        let newcomer = places.take(address(2)).expect("a place that is given away");
        assert!(is_given_away(&own[1]), "it has waited longest");
        assert!(![&other, &own[0], &own[2], &newcomer].into_iter().any(is_given_away));
    }

    #[test]
    fn who_is_served_keeps_the_place() {
        let places = Places::new(100, 2);
        let served: Vec<_> = (0..2).map(|_| places.take(address(1)).expect("room")).collect();
        served.iter().for_each(Place::keep);
        assert_eq!(places.take(address(1)).err(), Some(Refusal::Address));
        assert!(places.take(address(2)).is_ok());
        served[0].leave_network();
        assert!(places.take(address(1)).is_ok());
    }

    #[test]
    fn the_longest_waiting_of_all_gives_way_when_all_places_are_taken() {
        let places = Places::new(2, 2);
        let (first, second) = (places.take(address(1)).expect("room"), places.take(address(2)).expect("room"));
        let third = places.take(address(3)).expect("a place that is given away");
        assert!(is_given_away(&first) && !is_given_away(&second));
        // What gave way counts for nothing, neither now nor when it goes.
        drop(first);
        second.keep();
        third.keep();
        assert_eq!(places.take(address(4)).err(), Some(Refusal::Total));
    }

    #[test]
    fn nothing_is_left_of_those_who_have_gone() {
        let places = Places::new(2, 1);
        let place = places.take(None).expect("room");
        assert_eq!(place.join(address(1).expect("an address")), Ok(()));
        drop((place, places.take(address(2))));
        let table = places.table();
        assert!(table.taken.is_empty() && table.waiting.is_empty() && table.networks.is_empty());
    }
}
