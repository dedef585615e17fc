//! A weaver's life: what it can be, and how it passes from one state to the next.
//!
//! ```text
//!   Pending ──ran──▶ Running ──ended──▶ Ended by itself ──removed──▶ Ended by a user or its deadline
//!      └────────────────┴── removed ───────────────────────────────────▲
//! ```
//!
//! Transitions are pure: they change a [`Weaver`] in memory and return the [`Event`] that tells of it, or say why
//! nothing changes. [`crate::store::Store::transition`] applies one to a row, and writes both in one transaction.

use std::net::{Ipv6Addr, SocketAddr};

use jiff::{SignedDuration, Timestamp};
use loom_api::{
    OrgId, UserId, WeaverId, WireGuardKey,
    weaver::{EventKind, MAX_LIFETIME_HOURS, ResourceSpec, WeaverStatus},
};

use crate::provision::ResolvedImage;

/// A weaver as the database has it. The environment and the last output are kept apart: lists do not read them.
#[derive(Debug, Clone, PartialEq)]
pub struct Weaver {
    pub id: WeaverId,
    pub name: Option<String>,
    pub org_id: OrgId,
    pub owner_id: UserId,
    pub image: String,
    pub repo: Option<String>,
    pub branch: Option<String>,
    pub command: Option<Vec<String>>,
    /// What the image's name stood for when the pod was first made, once that is known.
    pub resolved: Option<ResolvedImage>,
    pub resources: ResourceSpec,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub life: Life,
    /// Its address inside the tunnel.
    pub address: Ipv6Addr,
    /// The agent that registered last.
    pub agent: Option<Agent>,
}

/// A weaver that is to be made.
#[derive(Debug)]
pub struct NewWeaver {
    pub weaver: Weaver,
    /// The environment, encrypted with [`crate::secrets::Secrets::seal`].
    pub sealed_env: Vec<u8>,
}

/// How far a weaver is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Life {
    /// Being made; why it is not there yet, if that is known.
    Pending { waits_for: Option<String> },
    /// The main program runs.
    Running,
    /// There must be no pod any more.
    Ended(End),
}

/// How a weaver ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub at: Timestamp,
    pub by: EndedBy,
    pub outcome: Outcome,
    pub reason: String,
}

/// What became of the main program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code, or was killed by the signal that the code is 128 above.
    Exited(i32),
    /// The weaver could not be made, or could not stay.
    Failed,
    /// Somebody ended the weaver while nothing was wrong with it.
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    User,
    Deadline,
    /// Its main program ended, or it failed.
    Itself,
}

/// What a weaver's agent said when it registered, and since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    pub version: String,
    pub wireguard_key: WireGuardKey,
    /// UDP addresses where it can perhaps be reached.
    pub candidates: Vec<SocketAddr>,
}

/// How a weaver ends by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Exited { code: i32, out_of_memory: bool },
    Failed { reason: String },
}

/// Something that happened to a weaver, for its users.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub kind: EventKind,
    pub message: String,
}

/// A transition that does not apply: the weaver is past it, or there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unchanged;

/// Why a deadline is not moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotExtended {
    Ended,
    /// It would live longer than is allowed: this is the latest end it can have.
    TooLong {
        latest: Timestamp,
    },
}

impl Event {
    pub fn new(kind: EventKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl Outcome {
    pub const fn status(self) -> WeaverStatus {
        match self {
            Self::Exited(0) | Self::Stopped => WeaverStatus::Succeeded,
            Self::Exited(_) | Self::Failed => WeaverStatus::Failed,
        }
    }
}

impl Life {
    pub const fn status(&self) -> WeaverStatus {
        match self {
            Self::Pending { .. } => WeaverStatus::Pending,
            Self::Running => WeaverStatus::Running,
            Self::Ended(end) => end.outcome.status(),
        }
    }

    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Pending { waits_for } => waits_for.as_deref(),
            Self::Running => None,
            Self::Ended(end) => Some(&end.reason),
        }
    }

    pub const fn end(&self) -> Option<&End> {
        match self {
            Self::Ended(end) => Some(end),
            _ => None,
        }
    }

    pub const fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Ended(End { outcome: Outcome::Exited(code), .. }) => Some(*code),
            _ => None,
        }
    }
}

impl Weaver {
    pub const fn has_ended(&self) -> bool {
        matches!(self.life, Life::Ended(_))
    }

    /// Whether it was deleted or its time was up: then it is no longer shown.
    pub const fn is_removed(&self) -> bool {
        matches!(self.life, Life::Ended(End { by: EndedBy::User | EndedBy::Deadline, .. }))
    }

    /// The latest end that it can be given.
    pub fn latest_end(&self) -> Timestamp {
        self.created_at + SignedDuration::from_secs_f64(MAX_LIFETIME_HOURS * 3600.0)
    }

    /// Its main program runs.
    pub fn ran(&mut self) -> Result<Event, Unchanged> {
        let Life::Pending { .. } = self.life else { return Err(Unchanged) };
        self.life = Life::Running;
        Ok(Event::new(EventKind::Ready, "the main program runs"))
    }

    /// It is not there yet, and now it is known why. The same reason twice is one event.
    pub fn waits(&mut self, reason: &str) -> Result<Event, Unchanged> {
        match &mut self.life {
            Life::Pending { waits_for } if waits_for.as_deref() != Some(reason) => {
                *waits_for = Some(reason.to_owned());
                Ok(Event::new(EventKind::Backend, reason))
            }
            _ => Err(Unchanged),
        }
    }

    /// It ends by itself, which it does once.
    pub fn ended(&mut self, now: Timestamp, ending: &Ending) -> Result<Event, Unchanged> {
        if self.has_ended() {
            return Err(Unchanged);
        }
        let (kind, outcome, reason) = match ending {
            Ending::Exited { code, out_of_memory: true } => {
                let limit = self.resources.memory_mb;
                let reason =
                    format!("the main program was killed because it ran out of memory: its limit is {limit} MiB");
                (EventKind::Exited, Outcome::Exited(*code), reason)
            }
            Ending::Exited { code, out_of_memory: false } => {
                (EventKind::Exited, Outcome::Exited(*code), format!("the main program exited with code {code}"))
            }
            Ending::Failed { reason } => (EventKind::Failed, Outcome::Failed, reason.clone()),
        };
        self.life = Life::Ended(End { at: now, by: EndedBy::Itself, outcome, reason: reason.clone() });
        Ok(Event::new(kind, reason))
    }

    /// A user deletes it.
    pub fn deleted(&mut self, now: Timestamp, user: &str) -> Result<Event, Unchanged> {
        self.removed(now, EndedBy::User, Event::new(EventKind::Deleted, format!("{user} deleted it")))
    }

    /// Its deadline has passed.
    pub fn expired(&mut self, now: Timestamp) -> Result<Event, Unchanged> {
        if now < self.expires_at {
            return Err(Unchanged); // it was extended meanwhile
        }
        let reason = format!("its time was up at {}", self.expires_at);
        self.removed(now, EndedBy::Deadline, Event::new(EventKind::Expired, reason))
    }

    /// One that ended by itself keeps its outcome and the time of its end, and is no longer shown.
    fn removed(&mut self, now: Timestamp, by: EndedBy, event: Event) -> Result<Event, Unchanged> {
        if self.is_removed() {
            return Err(Unchanged);
        }
        let (at, outcome) = self.life.end().map_or((now, Outcome::Stopped), |end| (end.at, end.outcome));
        self.life = Life::Ended(End { at, by, outcome, reason: event.message.clone() });
        Ok(event)
    }

    /// A user moves its deadline.
    pub fn extended(&mut self, more: SignedDuration, user: &str) -> Result<Event, NotExtended> {
        if self.has_ended() {
            return Err(NotExtended::Ended);
        }
        let (moved, latest) = (self.expires_at + more, self.latest_end());
        if moved > latest {
            return Err(NotExtended::TooLong { latest });
        }
        self.expires_at = moved;
        Ok(Event::new(EventKind::Extended, format!("{user} moved its end to {moved}")))
    }

    /// What its image is, before its first pod is made.
    pub fn image_resolved(&mut self, image: &ResolvedImage) -> Result<(), Unchanged> {
        if self.has_ended() {
            return Err(Unchanged);
        }
        self.resolved = Some(image.clone());
        Ok(())
    }

    /// An agent in its pod has proved itself.
    pub fn registered(&mut self, version: &str, wireguard_key: WireGuardKey) -> Result<(), Unchanged> {
        if self.has_ended() {
            return Err(Unchanged);
        }
        self.agent = Some(Agent { version: version.to_owned(), wireguard_key, candidates: Vec::new() });
        Ok(())
    }

    /// Its agent can perhaps be reached at other addresses than before.
    pub fn reachable_at(&mut self, candidates: &[SocketAddr]) -> Result<(), Unchanged> {
        match &mut self.agent {
            Some(agent) if agent.candidates != candidates => {
                agent.candidates = candidates.to_vec();
                Ok(())
            }
            _ => Err(Unchanged),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn pending() -> Weaver {
        let created_at = Timestamp::now();
        Weaver {
            id: WeaverId::generate(),
            name: None,
            org_id: OrgId::generate(),
            owner_id: UserId::generate(),
            image: "image".to_owned(),
            repo: None,
            branch: None,
            command: None,
            resolved: None,
            resources: ResourceSpec { cpu_millicores: 500, memory_mb: 512 },
            created_at,
            expires_at: created_at + SignedDuration::from_hours(4),
            life: Life::Pending { waits_for: None },
            address: Ipv6Addr::LOCALHOST,
            agent: None,
        }
    }

    #[test]
    fn a_weaver_runs_once_and_a_reason_to_wait_is_told_once() {
        let mut weaver = pending();
        assert_eq!(weaver.waits("no node fits").expect("new").kind, EventKind::Backend);
        assert_eq!(weaver.waits("no node fits"), Err(Unchanged));
        assert_eq!(weaver.life.reason(), Some("no node fits"));
        assert_eq!(weaver.ran().expect("first").kind, EventKind::Ready);
        assert_eq!((weaver.life.status(), weaver.life.reason()), (WeaverStatus::Running, None));
        assert_eq!(weaver.ran(), Err(Unchanged));
        assert_eq!(weaver.waits("late"), Err(Unchanged));
    }

    #[test]
    fn it_ends_once_and_what_ended_it_first_is_what_counts() {
        let mut weaver = pending();
        let now = Timestamp::now();
        let event = weaver.ended(now, &Ending::Exited { code: 137, out_of_memory: true }).expect("first");
        assert!(event.message.contains("512 MiB"), "{event:?}");
        assert_eq!((weaver.life.status(), weaver.life.exit_code()), (WeaverStatus::Failed, Some(137)));
        assert_eq!(weaver.ended(now, &Ending::Failed { reason: "its pod is gone".to_owned() }), Err(Unchanged));
        assert_eq!(weaver.ran(), Err(Unchanged), "nothing runs after its end");
        assert_eq!(weaver.extended(SignedDuration::from_hours(1), "ada"), Err(NotExtended::Ended));
    }

    #[test]
    fn deleting_one_that_ended_by_itself_hides_it_and_keeps_its_outcome() {
        let mut weaver = pending();
        let now = Timestamp::now();
        weaver.ended(now, &Ending::Exited { code: 3, out_of_memory: false }).expect("first");
        assert!(!weaver.is_removed());
        assert_eq!(weaver.deleted(now + SignedDuration::from_secs(9), "ada").expect("shown").kind, EventKind::Deleted);
        assert!(weaver.is_removed());
        assert_eq!((weaver.life.exit_code(), weaver.life.reason()), (Some(3), Some("ada deleted it")));
        assert_eq!(weaver.life.end().map(|end| end.at), Some(now));
        assert_eq!(weaver.deleted(now, "eve"), Err(Unchanged));
    }

    #[test]
    fn a_deadline_that_was_moved_does_not_end_it_and_none_moves_past_the_most() {
        let mut weaver = pending();
        let first = weaver.expires_at;
        weaver.extended(SignedDuration::from_hours(44), "ada").expect("within 48 hours");
        assert_eq!(weaver.expired(first), Err(Unchanged));
        let latest = weaver.latest_end();
        assert_eq!(weaver.extended(SignedDuration::from_secs(1), "ada"), Err(NotExtended::TooLong { latest }));
        assert_eq!(weaver.expired(latest).expect("due").kind, EventKind::Expired);
        assert_eq!(weaver.life.status(), WeaverStatus::Succeeded);
    }
}
