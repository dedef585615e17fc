//! Who may reach which weaver: the one owner of grants.
//!
//! A grant stands in three places: in the database, as an entry of the relay's table, and with the weaver's agent. Each
//! operation here changes all three, by that one entry, and one at a time: nothing that was read before a revocation
//! can bring a revoked key back after it. An agent that cannot be told now is told with its next welcome.

use std::{net::Ipv6Addr, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use loom_api::{
    KeyProof, Secret, UserId, WeaverId, WireGuardKey,
    agent::{Grant, ServerMessage},
    login::User,
    tunnel::OpenTunnel,
};
use tokio::sync::Mutex;

use crate::{
    agents::{AgentError, Hub},
    fault,
    relay::Relay,
    secrets::Secrets,
    store::{GRANT_PAGE, KeyError, LiveGrant, Store, Transition},
    weaver::{Agent, NotExtended, Weaver},
};

/// After so long without use a device is forgotten: daemons make a new key at each start.
const UNUSED: SignedDuration = SignedDuration::from_hours(30 * 24);

pub struct Admission {
    store: Store,
    agents: Arc<Hub>,
    relay: Arc<Relay>,
    secrets: Arc<Secrets>,
    /// Held while store and relay are changed.
    one_at_a_time: Mutex<()>,
}

/// What a device needs to reach a weaver.
#[derive(Debug)]
pub struct Admitted {
    pub weaver: Weaver,
    pub agent: Agent,
    pub device_address: Ipv6Addr,
    pub preshared_key: Secret,
}

/// Why a device was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl Admission {
    /// Fills the relay's table from the database.
    pub async fn start(store: Store, agents: Arc<Hub>, relay: Arc<Relay>, secrets: Arc<Secrets>) -> sqlx::Result<Self> {
        for pair in store.pairs().await? {
            relay.permit(pair.agent, pair.device, pair.expires_at);
        }
        Ok(Self { store, agents, relay, secrets, one_at_a_time: Mutex::default() })
    }

    /// Admits a user's device, and waits until the weaver's agent has admitted it. The same again renews it, then also
    /// without a proof that the user holds the key.
    pub async fn admit(
        &self,
        user: &User,
        token: i64,
        weaver: WeaverId,
        request: OpenTunnel,
    ) -> Result<Admitted, AdmissionError> {
        let OpenTunnel { public_key: device, proof, candidates } = request;
        let proven = proof.is_some_and(|proof| self.secrets.is_proven(&device, &proof, Timestamp::now()));
        let (weaver, agent, device_address) = {
            let _turn = self.one_at_a_time.lock().await;
            let (mut weaver, address) = self.store.admit(user.id, weaver, device, proven, &candidates, token).await?;
            let Some(agent) = weaver.agent.take() else {
                return Err(KeyError::NotReachable(Some(Box::new(weaver))).into());
            };
            self.relay.permit(agent.wireguard_key, device, weaver.expires_at);
            (weaver, agent, address)
        };
        let live = LiveGrant {
            weaver: weaver.id,
            device,
            address: device_address,
            candidates,
            expires_at: weaver.expires_at,
            user: user.name.clone(),
        };
        let grant = self.complete(&agent.wireguard_key, live);
        let preshared_key = grant.preshared_key.clone();
        // Not in turn: an agent that does not answer must not keep others out.
        self.agents.grant(weaver.id, grant).await?;
        // Revoked while the agent was told: then the revocation may have reached it first.
        if self.store.grant(weaver.id, device).await?.is_none() {
            self.agents.send(weaver.id, ServerMessage::Revoke { public_key: device });
            return Err(KeyError::NotEntitled.into());
        }
        Ok(Admitted { weaver, agent, device_address, preshared_key })
    }

    /// Takes a device's admission to one weaver back.
    pub async fn revoke(&self, user: UserId, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        if self.store.remove_grant(user, weaver, device).await? {
            if let Some(agent) = self.store.weaver(weaver).await?.and_then(|weaver| weaver.agent) {
                self.relay.forbid(agent.wireguard_key, device);
            }
            self.agents.send(weaver, ServerMessage::Revoke { public_key: device });
        }
        Ok(())
    }

    /// The same for a device that has lost its right. Its relay connection ends too, so that its owner asks why.
    pub async fn shut_out(&self, user: UserId, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<()> {
        self.revoke(user, weaver, device).await?;
        self.relay.hang_up(&device);
        Ok(())
    }

    /// Forgets a user's device: it can reach no weaver, and has no place on the relay any more.
    pub async fn revoke_device(&self, user: UserId, device: WireGuardKey) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        if self.store.key_owner(device).await? != Some(crate::store::KeyOwner::User(user)) {
            return Ok(());
        }
        let weavers = self.store.remove_device(user, device).await?;
        self.relay.remove(device);
        for weaver in weavers {
            self.agents.send(weaver, ServerMessage::Revoke { public_key: device });
        }
        Ok(())
    }

    /// Moves a weaver's deadline, and with it the end of all its grants.
    pub async fn extend(
        &self,
        weaver: WeaverId,
        more: SignedDuration,
        user_name: &str,
    ) -> sqlx::Result<Transition<NotExtended>> {
        let _turn = self.one_at_a_time.lock().await;
        let done = self.store.transition(weaver, |weaver| weaver.extended(more, user_name).map(Some)).await?;
        let Transition::Done(weaver, _) = &done else { return Ok(done) };
        self.store.move_grants(weaver.id, weaver.expires_at).await?;
        self.agents.send(weaver.id, ServerMessage::Deadline { expires_at: weaver.expires_at });
        let Some(agent) = &weaver.agent else { return Ok(done) };
        let mut after = None;
        loop {
            let page = self.store.grants(weaver.id, after).await?;
            after = page.last().map(|grant| grant.device);
            let is_last = page.len() < GRANT_PAGE as usize;
            for grant in page {
                self.relay.permit(agent.wireguard_key, grant.device, weaver.expires_at);
                let grant = self.complete(&agent.wireguard_key, grant);
                self.agents.tell_grant(weaver.id, grant);
            }
            if is_last {
                return Ok(done);
            }
        }
    }

    /// Cuts an ended weaver off: until its pod is gone it could still be reached.
    pub async fn end(&self, weaver: WeaverId) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        let agent = self.store.weaver(weaver).await?.and_then(|weaver| weaver.agent);
        let devices = self.store.remove_grants(weaver).await?;
        fault::point("grants-removed");
        if let Some(agent) = agent {
            self.relay.remove(agent.wireguard_key);
        }
        for public_key in devices {
            self.agents.send(weaver, ServerMessage::Revoke { public_key });
        }
        Ok(())
    }

    /// Records an agent that has proved itself. One that comes back with another key takes its grants along.
    pub async fn register(
        &self,
        weaver: WeaverId,
        version: &str,
        key: WireGuardKey,
        proof: &KeyProof,
    ) -> Result<Weaver, KeyError> {
        if !self.secrets.is_proven(&key, proof, Timestamp::now()) {
            return Err(KeyError::Unproven);
        }
        let _turn = self.one_at_a_time.lock().await;
        let (weaver, before) = self.store.register_agent(weaver, version, key).await?;
        if let Some(before) = before {
            self.relay.replace(before, key);
        }
        Ok(weaver)
    }

    /// A page of a weaver's grants for its agent, after the device `after`.
    pub async fn grants(
        &self,
        weaver: WeaverId,
        agent: &WireGuardKey,
        after: Option<WireGuardKey>,
    ) -> sqlx::Result<Vec<Grant>> {
        let page = self.store.grants(weaver, after).await?;
        Ok(page.into_iter().map(|grant| self.complete(agent, grant)).collect())
    }

    /// Tells a weaver's agent of a device that it does not know, if that has a grant.
    pub async fn introduce(&self, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        let Some(grant) = self.store.grant(weaver, device).await? else { return Ok(()) };
        if let Some(agent) = self.store.weaver(weaver).await?.and_then(|weaver| weaver.agent) {
            let grant = self.complete(&agent.wireguard_key, grant);
            self.agents.tell_grant(weaver, grant);
        }
        Ok(())
    }

    /// Forgets devices that nobody has used for a month.
    pub async fn forget_unused(&self) -> sqlx::Result<()> {
        for (user, device) in self.store.unused_devices(Timestamp::now() - UNUSED).await? {
            self.revoke_device(user, device).await?;
        }
        Ok(())
    }

    fn complete(&self, agent: &WireGuardKey, grant: LiveGrant) -> Grant {
        Grant {
            preshared_key: self.secrets.preshared_key(agent, &grant.device),
            public_key: grant.device,
            address: grant.address,
            candidates: grant.candidates,
            expires_at: grant.expires_at,
            user: grant.user,
        }
    }
}
