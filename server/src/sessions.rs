//! Connections that outlive the request that opened them, and the rights that they depend on.
//!
//! A terminal, a relay connection or a stream of events stays open for hours, while its token may be revoked, its user
//! suspended or a membership ended. So each of them registers here with its [`Principal`], and waits for
//! [`Session::lost`]. [`crate::revocation`] notices changes, and ends what has lost its rights. Agents' connections are
//! no different: a weaver's agent that registers anew gets a new token, and what the old one opened ends.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use loom_api::{ApiError, ErrorCode, OrgId, UserId};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::SetOnce;

/// What keeps a connection open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionKind {
    Attach,
    Relay,
    Events,
    Logs,
    /// An agent's control link, or a stream that it dialled back.
    Agent,
}

/// Whose a connection is.
#[derive(Debug, Clone, Copy)]
pub struct Principal {
    /// The user; nobody when it is an agent's.
    pub user: Option<UserId>,
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
    /// Tokens that are good, of agents and of users.
    pub tokens: HashSet<i64>,
    /// Users who are suspended or removed.
    pub suspended: HashSet<UserId>,
    pub memberships: HashSet<(UserId, OrgId)>,
}

impl Rights {
    fn lost(&self, Principal { user, token, org, .. }: &Principal) -> Option<LostRight> {
        // First, because the tokens and memberships of a removed user are gone as well.
        if user.is_some_and(|user| self.suspended.contains(&user)) {
            return Some(LostRight::Suspended);
        }
        if !self.tokens.contains(token) {
            return Some(LostRight::Token);
        }
        let (user, org) = (user.as_ref()?, org.as_ref()?);
        (!self.memberships.contains(&(*user, *org))).then_some(LostRight::Membership)
    }
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

/// Which right a connection has lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostRight {
    Token,
    Suspended,
    Membership,
}

impl From<LostRight> for ApiError {
    fn from(lost: LostRight) -> Self {
        match lost {
            LostRight::Token => Self::new(ErrorCode::Unauthorized, "your token was revoked or has expired")
                .hint("log in again: loom login"),
            LostRight::Suspended => Self::new(ErrorCode::Unauthorized, "your user was suspended or removed")
                .hint("ask whoever runs the server"),
            LostRight::Membership => {
                Self::new(ErrorCode::Forbidden, "you are no longer a member of the weaver's organisation")
                    .hint("ask whoever runs the server")
            }
        }
    }
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
    lost: Arc<SetOnce<LostRight>>,
}

/// A connection's entry, as long as it is open.
pub struct Session {
    sessions: Arc<Sessions>,
    number: u64,
    lost: Arc<SetOnce<LostRight>>,
}

impl Session {
    /// Returns once the connection has lost a right that it needs.
    pub async fn lost(&self) -> LostRight {
        *self.lost.wait().await
    }

    /// The right that it has lost, if it has.
    pub fn has_lost(&self) -> Option<LostRight> {
        self.lost.get().copied()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.sessions.state();
        if let Some(open) = state.open.remove(&self.number) {
            if let Some(user) = open.principal.user {
                release(&mut state.of_users, (user, open.kind));
            }
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
        if let Some(user) = principal.user {
            let of_user = state.of_users.get(&(user, kind)).copied().unwrap_or(0);
            if of_user >= self.limits.per_user {
                return Err(TooMany::OfUser(of_user));
            }
        }
        if let Some(org) = principal.org {
            let of_org = state.of_orgs.get(&(org, kind)).copied().unwrap_or(0);
            if of_org >= self.limits.per_org {
                return Err(TooMany::OfOrg(of_org));
            }
            state.of_orgs.insert((org, kind), of_org + 1);
        }
        if let Some(user) = principal.user {
            *state.of_users.entry((user, kind)).or_default() += 1;
        }
        let (number, lost) = (state.next, Arc::<SetOnce<_>>::default());
        state.next += 1;
        // Its rights were looked up before the last check, and may have been lost in between.
        state.missed |= principal.revision < state.checked;
        state.open.insert(number, Open { kind, principal, lost: Arc::clone(&lost) });
        drop(state);
        Ok(Session { sessions: Arc::clone(self), number, lost })
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
        for open in state.open.values() {
            if let Some(lost) = rights.lost(&open.principal)
                && open.lost.set(lost).is_ok()
            {
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
        Principal { user: Some(user), token, org, revision: 0 }
    }

    fn rights(revision: i64, tokens: &[i64], memberships: &[(UserId, OrgId)]) -> Rights {
        Rights {
            revision,
            tokens: tokens.iter().copied().collect(),
            suspended: HashSet::new(),
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
        assert_eq!(
            [revoked.has_lost(), left.has_lost(), stays.has_lost()],
            [Some(LostRight::Token), Some(LostRight::Membership), None]
        );
        assert_eq!(sessions.end_without_rights(&rights(3, &[2], &[])), 0, "each ends once");
    }

    #[test]
    fn an_agents_connection_ends_with_its_token_and_counts_for_nobody() {
        let sessions = Sessions::new(Limits { per_user: 0, per_org: 0 });
        let agent = Principal { user: None, token: 1, org: None, revision: 0 };
        let link = sessions.register(SessionKind::Agent, agent).expect("entered");
        sessions.end_without_rights(&rights(1, &[1], &[]));
        assert_eq!(link.has_lost(), None);
        sessions.end_without_rights(&rights(2, &[2], &[]));
        assert_eq!(link.has_lost(), Some(LostRight::Token));
    }

    #[test]
    fn a_suspended_user_is_told_so() {
        let sessions = Sessions::new(LIMITS);
        let user = UserId::generate();
        let session = sessions.register(SessionKind::Attach, principal(user, 1, None)).expect("entered");
        sessions.end_without_rights(&Rights { suspended: [user].into(), ..rights(1, &[1], &[]) });
        assert_eq!(session.has_lost(), Some(LostRight::Suspended));
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
        assert!(late.has_lost().is_some() && !sessions.needs_check(1));
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
