//! The agents' control links: which are up, and what is said on them.
//!
//! The [`Hub`] holds nothing that a reconnection does not bring again. What travels on a link, and what the server makes
//! of it, is in [`crate::api::agents`].

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use loom_api::{
    WeaverId,
    agent::{AgentStatus, Grant, ServerMessage},
    weaver::AgentInfo,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::allowance::Allowances;

/// Messages to one agent that wait; one who finds it full gives up on that agent.
const OUTBOX_SIZE: usize = 256;
/// How long an agent may take to admit a peer.
const GRANT_TIMEOUT: Duration = Duration::from_secs(2);
/// What agents wait before they come back to a server that stops, plus their own jitter.
const RECONNECT_AFTER_MS: u64 = 200;

/// Why an agent does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// It comes back by itself, unless the weaver has ended.
    #[error("the weaver's agent is not connected")]
    NotConnected,
    #[error("the weaver's agent did not answer")]
    NoAnswer,
}

/// The links that are up.
#[derive(Default)]
pub struct Hub {
    /// What the agents may still ask for.
    pub allowances: Allowances,
    links: Mutex<HashMap<WeaverId, Link>>,
    serial: AtomicU64,
}

struct Link {
    serial: u64,
    outbox: mpsc::Sender<ServerMessage>,
    version: String,
    status: AgentStatus,
    /// Those who wait until a grant is in force.
    unacknowledged: HashMap<u64, oneshot::Sender<()>>,
    /// Grants that were sent and not acknowledged yet, whether or not somebody waits for it.
    unanswered: u64,
}

impl Hub {
    fn links(&self) -> MutexGuard<'_, HashMap<WeaverId, Link>> {
        self.links.lock()
    }

    fn next_serial(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a message to an agent that it may miss; whether its link takes it.
    pub fn send(&self, weaver: WeaverId, message: ServerMessage) -> bool {
        self.links().get(&weaver).is_some_and(|link| link.outbox.try_send(message).is_ok())
    }

    /// Has an agent admit a peer, and waits until it has.
    ///
    /// # Errors
    ///
    /// When its link is down, or it does not answer.
    pub async fn grant(&self, weaver: WeaverId, grant: Grant) -> Result<(), AgentError> {
        let serial = self.next_serial();
        let (applied, wait) = oneshot::channel();
        {
            let mut links = self.links();
            let link = links.get_mut(&weaver).ok_or(AgentError::NotConnected)?;
            // Those that nobody waits for any more, because the agent was too slow or the client has gone.
            link.unacknowledged.retain(|_, applied| !applied.is_closed());
            link.send_grant(serial, grant)?;
            link.unacknowledged.insert(serial, applied);
        }
        match timeout(GRANT_TIMEOUT, wait).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(AgentError::NoAnswer),
        }
    }

    /// Tells an agent to admit a peer, without waiting for it. One with too much to be told already is told all of it
    /// anew: its link ends, and the next welcome states every grant.
    pub fn tell_grant(&self, weaver: WeaverId, grant: Grant) {
        let serial = self.next_serial();
        let mut links = self.links();
        if links.get_mut(&weaver).is_some_and(|link| link.send_grant(serial, grant).is_err()) {
            links.remove(&weaver);
        }
    }

    /// Tells an agent something that it must not miss. One with too much to be told already is told all of it anew, as
    /// with [`Self::tell_grant`].
    pub fn tell(&self, weaver: WeaverId, message: ServerMessage) {
        let mut links = self.links();
        if links.get(&weaver).is_some_and(|link| link.outbox.try_send(message).is_err()) {
            links.remove(&weaver);
        }
    }

    /// Ends an agent's link. The agent comes back, and is told everything anew.
    pub fn hang_up(&self, weaver: WeaverId) {
        self.links().remove(&weaver);
    }

    pub fn is_connected(&self, weaver: WeaverId) -> bool {
        self.links().contains_key(&weaver)
    }

    /// What an agent last reported, if it is connected.
    pub fn info(&self, weaver: WeaverId) -> Option<AgentInfo> {
        self.links().get(&weaver).map(|link| AgentInfo {
            connected: true,
            version: link.version.clone(),
            ports: link.status.ports.clone(),
            load: link.status.load,
        })
    }

    /// Tells all agents that the server goes down.
    pub fn go_away(&self) {
        for link in self.links().values() {
            // An agent that cannot be told notices by itself.
            let _ = link.outbox.try_send(ServerMessage::GoAway { reconnect_after_ms: RECONNECT_AFTER_MS });
        }
    }

    /// Lets go of an agent: its weaver has ended.
    pub fn end(&self, weaver: WeaverId) {
        self.links().remove(&weaver);
        self.allowances.forget(weaver);
    }

    /// Takes note of a new link; its number, and what is to be said on it.
    pub fn connect(&self, weaver: WeaverId, version: String) -> (u64, mpsc::Receiver<ServerMessage>) {
        let (outbox, inbox) = mpsc::channel(OUTBOX_SIZE);
        let serial = self.next_serial();
        let link = Link {
            serial,
            outbox,
            version,
            status: AgentStatus::default(),
            unacknowledged: HashMap::new(),
            unanswered: 0,
        };
        // An older link of the same weaver loses its outbox by this, and ends.
        self.links().insert(weaver, link);
        (serial, inbox)
    }

    /// How many links are up.
    #[must_use]
    pub fn count(&self) -> usize {
        self.links().len()
    }

    /// Whether the link `serial` was the weaver's last one.
    pub fn disconnected(&self, weaver: WeaverId, serial: u64) -> bool {
        let mut links = self.links();
        let last = links.get(&weaver).is_some_and(|link| link.serial == serial);
        if last {
            links.remove(&weaver);
        }
        last
    }

    pub fn status(&self, weaver: WeaverId, status: AgentStatus) {
        if let Some(link) = self.links().get_mut(&weaver) {
            link.status = status;
        }
    }

    /// An agent says that a grant is in force; whether it was sent one.
    pub fn applied(&self, weaver: WeaverId, serial: u64) -> bool {
        let mut links = self.links();
        let Some(link) = links.get_mut(&weaver) else { return false };
        let was_asked = link.unanswered > 0;
        link.unanswered = link.unanswered.saturating_sub(1);
        if let Some(waiting) = link.unacknowledged.remove(&serial) {
            // Who waited may have gone.
            let _ = waiting.send(());
        }
        was_asked
    }
}

impl Link {
    fn send_grant(&mut self, serial: u64, grant: Grant) -> Result<(), AgentError> {
        self.outbox.try_send(ServerMessage::Grant { serial, grant }).map_err(|_| AgentError::NotConnected)?;
        self.unanswered += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        serde_json::from_value(serde_json::json!({
            "public_key": loom_api::WireGuardKey([1; 32]), "address": "fd00::1", "preshared_key": "", "candidates": [],
            "expires_at": "2030-01-01T00:00:00Z", "user": "ada",
        }))
        .expect("a grant")
    }

    #[tokio::test]
    async fn an_agent_with_too_much_to_be_told_misses_no_revocation() {
        let (hub, weaver) = (Hub::default(), WeaverId::generate());
        let (_, mut inbox) = hub.connect(weaver, String::new());
        while hub.send(weaver, ServerMessage::GoAway { reconnect_after_ms: 0 }) {}
        hub.tell(weaver, ServerMessage::Revoke { public_key: loom_api::WireGuardKey([1; 32]) });
        assert!(!hub.is_connected(weaver));
        for _ in 0..OUTBOX_SIZE {
            inbox.recv().await.expect("what was said before");
        }
        assert!(inbox.recv().await.is_none(), "the link ends, and the next one begins with all grants");
    }

    #[tokio::test]
    async fn an_agent_that_acknowledges_nothing_makes_the_server_keep_nothing() {
        let (hub, weaver) = (Hub::default(), WeaverId::generate());
        let (_, mut inbox) = hub.connect(weaver, String::new());
        for _ in 0..10 {
            // The client does not wait for the answer.
            assert!(timeout(Duration::from_millis(1), hub.grant(weaver, grant())).await.is_err());
        }
        while inbox.try_recv().is_ok() {}
        let ((), result) = tokio::join!(
            async {
                let Some(ServerMessage::Grant { serial, .. }) = inbox.recv().await else { panic!("a grant") };
                hub.applied(weaver, serial);
            },
            hub.grant(weaver, grant()),
        );
        assert_eq!(result, Ok(()));
        assert!(hub.links()[&weaver].unacknowledged.is_empty());
    }
}
