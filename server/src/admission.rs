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
    store::{GRANT_PAGE, KeyError, KeyOwner, LiveGrant, Store, Transition},
    weaver::{Agent, NotExtended, Weaver},
};

/// After so long without use a device is forgotten: daemons make a new key at each start.
const UNUSED_DEVICE_RETENTION: SignedDuration = SignedDuration::from_hours(30 * 24);

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
        // Ended or revoked while the agent was told: then it may have been told of that first.
        if self.store.grant(weaver.id, device).await?.is_none() {
            self.agents.tell(weaver.id, ServerMessage::Revoke { public_key: device });
            return Err(match self.store.weaver(weaver.id).await? {
                Some(weaver) if !weaver.has_ended() => KeyError::NotEntitled,
                ended => KeyError::NotReachable(ended.map(Box::new)),
            }
            .into());
        }
        Ok(Admitted { weaver, agent, device_address, preshared_key })
    }

    /// Takes a device's admission to one weaver back.
    pub async fn revoke(&self, user: UserId, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        // Read before: once the grant is gone, nothing may fail any more, because nobody would find it to try again.
        let agent = self.store.agent_key(weaver).await?;
        if self.store.remove_grant(user, weaver, device).await? {
            if let Some(agent) = agent {
                self.relay.forbid(agent, device);
            }
            self.agents.tell(weaver, ServerMessage::Revoke { public_key: device });
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
        if self.store.key_owner(device).await? != Some(KeyOwner::User(user)) {
            return Ok(());
        }
        let weavers = self.store.remove_device(user, device).await?;
        self.relay.remove(device);
        for weaver in weavers {
            self.agents.tell(weaver, ServerMessage::Revoke { public_key: device });
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
        self.agents.tell(weaver.id, ServerMessage::Deadline { expires_at: weaver.expires_at });
        if let Some(agent) = &weaver.agent {
            self.relay.extend(agent.wireguard_key, weaver.expires_at);
            if let Err(error) = self.tell_grants(weaver.id, &agent.wireguard_key).await {
                tracing::warn!(weaver = %weaver.id, "its agent is told of its grants anew: {error}");
                self.agents.hang_up(weaver.id);
            }
        }
        Ok(done)
    }

    /// Tells a weaver's agent of all grants that it has.
    async fn tell_grants(&self, weaver: WeaverId, agent: &WireGuardKey) -> sqlx::Result<()> {
        let mut after = None;
        loop {
            let page = self.grants(weaver, agent, after).await?;
            after = page.last().map(|grant| grant.public_key);
            let is_last = page.len() < GRANT_PAGE as usize;
            for grant in page {
                self.agents.tell_grant(weaver, grant);
            }
            if is_last {
                return Ok(());
            }
        }
    }

    /// Cuts an ended weaver off: until its pod is gone it could still be reached.
    pub async fn end(&self, weaver: WeaverId) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        let agent = self.store.agent_key(weaver).await?;
        let devices = self.store.remove_grants(weaver).await?;
        fault::point("grants-removed");
        if let Some(agent) = agent {
            self.relay.remove(agent);
        }
        for public_key in devices {
            self.agents.tell(weaver, ServerMessage::Revoke { public_key });
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
        if let Some(agent) = self.store.agent_key(weaver).await? {
            self.agents.tell_grant(weaver, self.complete(&agent, grant));
        }
        Ok(())
    }

    /// Forgets devices that nobody has used for a month.
    pub async fn forget_unused(&self) -> sqlx::Result<()> {
        let _turn = self.one_at_a_time.lock().await;
        for device in self.store.remove_unused_devices(Timestamp::now() - UNUSED_DEVICE_RETENTION).await? {
            self.relay.remove(device);
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

#[cfg(test)]
mod tests {
    use loom_api::login::TokenKind;
    use loom_tunnel::{PublicKey, StaticSecret};
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        store::tests::{added, temporary},
        weaver::Ending,
    };

    const AGENT: WireGuardKey = WireGuardKey([7; 32]);

    /// A weaver whose agent is connected, and a user with a device.
    struct Scene {
        _directory: tempfile::TempDir,
        admission: Admission,
        inbox: mpsc::Receiver<ServerMessage>,
        weaver: WeaverId,
        user: User,
        token: i64,
        private: StaticSecret,
        device: WireGuardKey,
    }

    impl Scene {
        async fn set() -> Self {
            let (directory, store) = temporary().await;
            let id = store.add_user("ada").await.expect("added");
            let token = store.add_user_token(id, "ci", TokenKind::Api, None).await.expect("made");
            let token = store.token(token.expose()).await.expect("read").expect("found").id;
            let org = store.rights().await.expect("read").memberships.iter().next().expect("a personal one").1;
            let weaver = added(&store, (id, org), None).await.id;
            store.register_agent(weaver, "1.0", AGENT).await.expect("registered");
            let secrets = Arc::new(Secrets::load(&directory.path().join("secret.key")).expect("made"));
            let (agents, relay) = (Arc::new(Hub::default()), Arc::new(Relay::default()));
            let (_, inbox) = agents.connect(weaver, "1.0".to_owned());
            let admission = Admission::start(store, agents, relay, secrets).await.expect("started");
            let private = StaticSecret::from([3; 32]);
            let device = WireGuardKey(PublicKey::from(&private).to_bytes());
            let user = User { id, name: "ada".to_owned() };
            Self { _directory: directory, admission, inbox, weaver, user, token, private, device }
        }

        /// Admits the device; `meanwhile` happens before the agent acknowledges it.
        async fn admit(&mut self, meanwhile: impl AsyncFnOnce(&Admission)) -> Result<Admitted, AdmissionError> {
            let proof = self.admission.secrets.challenge(Timestamp::now()).answer(&self.private);
            let request = OpenTunnel { public_key: self.device, proof: Some(proof), candidates: Vec::new() };
            let (admission, inbox) = (&self.admission, &mut self.inbox);
            let acknowledging = async {
                let Some(ServerMessage::Grant { serial, .. }) = inbox.recv().await else { panic!("a grant") };
                meanwhile(admission).await;
                assert!(admission.agents.applied(self.weaver, serial));
            };
            tokio::join!(admission.admit(&self.user, self.token, self.weaver, request), acknowledging).0
        }
    }

    #[tokio::test]
    async fn a_weaver_that_ends_while_its_agent_is_told_is_gone_and_the_token_is_not_blamed() {
        let mut scene = Scene::set().await;
        let weaver = scene.weaver;
        let admitted = scene
            .admit(async |admission| {
                let ending = Ending::Exited { code: 0, out_of_memory: false };
                let end = |weaver: &mut Weaver| weaver.ended(Timestamp::now(), &ending).map(Some);
                admission.store.transition(weaver, end).await.expect("written");
                admission.end(weaver).await.expect("cut off");
            })
            .await;
        let Err(AdmissionError::Key(KeyError::NotReachable(Some(ended)))) = admitted else { panic!("{admitted:?}") };
        assert!(ended.has_ended());
        assert!(!scene.admission.relay.may_talk(&AGENT, &scene.device));
    }

    #[tokio::test]
    async fn a_device_is_shut_out_of_a_weaver_whose_row_cannot_be_read() {
        let mut scene = Scene::set().await;
        scene.admit(async |_| {}).await.expect("admitted");
        assert!(scene.admission.relay.may_talk(&AGENT, &scene.device));
        scene.admission.store.garble(scene.weaver).await;
        scene.admission.shut_out(scene.user.id, scene.weaver, scene.device).await.expect("shut out");
        assert!(!scene.admission.relay.may_talk(&AGENT, &scene.device));
        let told = scene.inbox.try_recv();
        assert!(matches!(told, Ok(ServerMessage::Revoke { public_key }) if public_key == scene.device), "{told:?}");
    }

    #[tokio::test]
    async fn an_extension_moves_the_end_of_every_grant() {
        let mut scene = Scene::set().await;
        let before = scene.admit(async |_| {}).await.expect("admitted").weaver.expires_at;
        let more = SignedDuration::from_hours(1);
        scene.admission.extend(scene.weaver, more, "ada").await.expect("extended");
        assert!(
            matches!(scene.inbox.try_recv(), Ok(ServerMessage::Deadline { expires_at }) if expires_at == before + more)
        );
        let told = scene.inbox.try_recv();
        assert!(
            matches!(&told, Ok(ServerMessage::Grant { grant, .. }) if grant.expires_at == before + more),
            "{told:?}"
        );
        let grant = scene.admission.store.grant(scene.weaver, scene.device).await.expect("read").expect("in force");
        assert_eq!(grant.expires_at, before + more);
    }
}
