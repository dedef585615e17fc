//! Connections that outlive the request that opened them, and the rights that they depend on.
//!
//! A terminal, a relay connection or a stream of events stays open for hours, while its token may be revoked, its user
//! suspended or a membership ended. So each of them registers here with its [`Principal`], and waits for
//! [`Session::ended`]. [`crate::revocation`] notices changes, and ends what has lost its rights.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use loom_api::{OrgId, UserId};
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// What keeps a connection open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionKind {
    Attach,
    Relay,
    Events,
    Logs,
}

/// Whose a connection is.
#[derive(Debug, Clone, Copy)]
pub struct Principal {
    pub user: UserId,
    /// The token that it was opened with.
    pub token: i64,
    /// The organisation that the user must be a member of.
    pub org: Option<OrgId>,
    /// The identity revision at which all this was true.
    pub revision: i64,
}

/// Who has which rights, at one moment.
#[derive(Debug, Default)]
pub struct Rights {
    pub revision: i64,
    /// Tokens that are good, of users who are not suspended.
    pub tokens: HashSet<i64>,
    pub memberships: HashSet<(UserId, OrgId)>,
}

/// How many connections of one kind there may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub per_user: usize,
    pub per_org: usize,
}

/// Why a connection was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    #[error("you have {0} connections of this kind, as many as a user may")]
    OfUser(usize),
    #[error("your organisation has {0} connections of this kind, as many as it may")]
    OfOrg(usize),
}

/// The connections that are open.
pub struct Sessions {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    open: HashMap<u64, Open>,
    of_users: HashMap<(UserId, SessionKind), usize>,
    of_orgs: HashMap<(OrgId, SessionKind), usize>,
    /// The revision of the last check.
    checked: i64,
    /// One was registered that an earlier check has missed.
    missed: bool,
}

struct Open {
    kind: SessionKind,
    principal: Principal,
    ended: CancellationToken,
}

/// A connection's entry, as long as it is open.
pub struct Session {
    sessions: Arc<Sessions>,
    number: u64,
    ended: CancellationToken,
}

impl Session {
    /// Returns once the connection has lost its rights.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.sessions.state();
        if let Some(open) = state.open.remove(&self.number) {
            release(&mut state.of_users, (open.principal.user, open.kind));
            if let Some(org) = open.principal.org {
                release(&mut state.of_orgs, (org, open.kind));
            }
        }
    }
}

impl Sessions {
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Enters a connection that is about to open.
    pub fn register(self: &Arc<Self>, kind: SessionKind, principal: Principal) -> Result<Session, TooMany> {
        let mut state = self.state();
        let of_user = state.of_users.get(&(principal.user, kind)).copied().unwrap_or(0);
        if of_user >= self.limits.per_user {
            return Err(TooMany::OfUser(of_user));
        }
        if let Some(org) = principal.org {
            let of_org = state.of_orgs.get(&(org, kind)).copied().unwrap_or(0);
            if of_org >= self.limits.per_org {
                return Err(TooMany::OfOrg(of_org));
            }
            state.of_orgs.insert((org, kind), of_org + 1);
        }
        state.of_users.insert((principal.user, kind), of_user + 1);
        let (number, ended) = (state.next, CancellationToken::new());
        state.next += 1;
        // Its rights were looked up before the last check, and may have been lost in between.
        state.missed |= principal.revision < state.checked;
        state.open.insert(number, Open { kind, principal, ended: ended.clone() });
        drop(state);
        Ok(Session { sessions: Arc::clone(self), number, ended })
    }

    /// Whether there is anything to check at an identity revision.
    pub fn needs_check(&self, revision: i64) -> bool {
        let state = self.state();
        state.missed || state.checked != revision
    }

    /// Ends every connection that has lost its rights; how many those are.
    pub fn end_without_rights(&self, rights: &Rights) -> usize {
        let mut state = self.state();
        state.checked = rights.revision;
        state.missed = false;
        let mut count = 0;
        for open in state.open.values().filter(|open| !open.ended.is_cancelled()) {
            let Principal { user, token, org, .. } = open.principal;
            if !rights.tokens.contains(&token) || org.is_some_and(|org| !rights.memberships.contains(&(user, org))) {
                open.ended.cancel();
                count += 1;
            }
        }
        count
    }
}

fn release<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let std::collections::hash_map::Entry::Occupied(mut entry) = counts.entry(key) {
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { per_user: 2, per_org: 3 };

    fn principal(user: UserId, token: i64, org: Option<OrgId>) -> Principal {
        Principal { user, token, org, revision: 0 }
    }

    fn rights(revision: i64, tokens: &[i64], memberships: &[(UserId, OrgId)]) -> Rights {
        Rights {
            revision,
            tokens: tokens.iter().copied().collect(),
            memberships: memberships.iter().copied().collect(),
        }
    }

    #[test]
    fn what_loses_its_token_or_membership_ends_and_the_rest_stays() {
        let sessions = Sessions::new(LIMITS);
        let (user, org) = (UserId::generate(), OrgId::generate());
        let revoked = sessions.register(SessionKind::Relay, principal(user, 1, None)).expect("entered");
        let left = sessions.register(SessionKind::Attach, principal(user, 2, Some(org))).expect("entered");
        let stays = sessions.register(SessionKind::Relay, principal(user, 2, None)).expect("entered");
        assert_eq!(sessions.end_without_rights(&rights(1, &[1, 2], &[(user, org)])), 0);
        assert_eq!(sessions.end_without_rights(&rights(2, &[2], &[])), 2);
        assert!(revoked.ended.is_cancelled() && left.ended.is_cancelled() && !stays.ended.is_cancelled());
        assert_eq!(sessions.end_without_rights(&rights(3, &[2], &[])), 0, "each ends once");
    }

    #[test]
    fn one_that_registers_after_the_check_of_its_revocation_is_checked_too() {
        let sessions = Sessions::new(LIMITS);
        let user = UserId::generate();
        // Authenticated at revision 0; revoked and checked at 1; registered only now.
        sessions.end_without_rights(&rights(1, &[], &[]));
        assert!(!sessions.needs_check(1));
        let late = sessions.register(SessionKind::Events, principal(user, 1, None)).expect("entered");
        assert!(sessions.needs_check(1));
        sessions.end_without_rights(&rights(1, &[], &[]));
        assert!(late.ended.is_cancelled() && !sessions.needs_check(1));
    }

    #[test]
    fn users_and_organisations_have_limits_for_each_kind_that_count_what_is_open() {
        let sessions = Sessions::new(LIMITS);
        let (ada, bob, org) = (UserId::generate(), UserId::generate(), OrgId::generate());
        let attach = |user| sessions.register(SessionKind::Attach, principal(user, 1, Some(org)));
        let first = attach(ada).expect("entered");
        let _second = attach(ada).expect("entered");
        assert_eq!(attach(ada).err(), Some(TooMany::OfUser(2)));
        let _third = attach(bob).expect("entered");
        assert_eq!(attach(bob).err(), Some(TooMany::OfOrg(3)));
        assert!(sessions.register(SessionKind::Logs, principal(ada, 1, Some(org))).is_ok(), "another kind");
        drop(first);
        assert!(attach(bob).is_ok());
    }
}
