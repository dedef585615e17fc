//! One WireGuard node for one Loom server, and the weavers that are reached through it.
//!
//! The key is made here and lives as long as the daemon. The node's address depends only on the key, and comes with the
//! first grant; the node starts then. A second request tells the server the node's own UDP addresses.

use std::{
    collections::{HashMap, VecDeque},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use loom_api::{
    ErrorCode, KeyChallenge, KeyProof, Secret, WeaverId, WireGuardKey,
    client::{Client, ClientError},
    tunnel::{OpenTunnel, PORTS_PORT, TunnelGrant},
};
use loom_tunnel::{Config, ConnectError, PeerConfig, PublicKey, StaticSecret, Tunnel, TunnelStream};
use parking_lot::Mutex;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    sync::OnceCell,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    listeners::{Listeners, LoopbackAddresses},
    protocol::{Forward, TunnelStatus},
    reference::normalise,
    relay::Relay,
    weaver::Weaver,
};
use crate::error::{CliError, Exit, Result};

/// How long a weaver may take to become reachable, its agent's restart included.
const PATIENCE: Duration = Duration::from_secs(25);
/// A weaver that does not answer is asked for at the server this often: its agent may have been restarted, or be gone.
const IMPATIENCE: Duration = Duration::from_secs(1);
/// Between two questions to a server that says "not yet".
const RETRY: Duration = Duration::from_millis(250);
/// How often the tunnels are looked at.
const WATCH: Duration = Duration::from_secs(3);
/// A weaver in use that was silent for so long is asked for anew. More than the 15 s between the pings of an idle path.
const SILENCE: Duration = Duration::from_secs(18);
/// The same for one that has just been admitted and said nothing yet.
const FIRST_SILENCE: Duration = Duration::from_secs(3);
/// Before its grant ends, a weaver in use is asked for again: its life may have been extended.
const BEFORE_END: Duration = Duration::from_secs(60);
/// The longest time between two such questions about one weaver; the first come after [`WATCH`].
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A weaver that nobody used for so long is let go.
const IDLE: Duration = Duration::from_secs(300);
/// The server takes no more candidates, and loopback ones come last.
const MOST_CANDIDATES: usize = 16;
/// Tunnels that ended by themselves and are still told of.
const MOST_ENDED: usize = 16;
/// How long the server may take to be told that a tunnel is down.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module.
pub(crate) struct Node {
    private_key: StaticSecret,
    public_key: PublicKey,
    server_url: String,
    client: Mutex<ServerClient>,
    tunnel: OnceCell<Tunnel>,
    /// The node's address inside the tunnel, once it is known.
    address: OnceLock<Ipv6Addr>,
    /// Weavers by their id.
    weavers: Mutex<HashMap<WeaverId, Arc<Weaver>>>,
    /// What weavers were called by commands.
    names: Mutex<HashMap<String, WeaverId>>,
    addresses: LoopbackAddresses,
    /// Tunnels that were up when their weavers went away, as they were, with the reason.
    ended: Mutex<VecDeque<TunnelStatus>>,
    /// The server says that the node belongs to another of its users.
    foreign: AtomicBool,
    /// The relay was connected before.
    relayed: AtomicBool,
    tasks: Mutex<JoinSet<()>>,
}

/// The client of the node's server, and the authorities that it trusts beside the system's.
struct ServerClient {
    client: Client,
    authorities: String,
}

impl ServerClient {
    fn new(server_url: &str, token: &Secret, authorities: &str) -> Result<Self> {
        let client = Client::trusting(server_url, Some(token.clone()), authorities)?;
        Ok(Self { client, authorities: authorities.to_owned() })
    }
}

impl Node {
    /// A node that has not started yet.
    pub(crate) fn new(server_url: &str, token: &Secret, authorities: &str) -> Result<Self> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| CliError::failure("the system gives no random bytes"))?;
        let private_key = StaticSecret::from(seed);
        Ok(Self {
            public_key: PublicKey::from(&private_key),
            private_key,
            server_url: server_url.to_owned(),
            client: Mutex::new(ServerClient::new(server_url, token, authorities)?),
            tunnel: OnceCell::new(),
            address: OnceLock::new(),
            weavers: Mutex::default(),
            names: Mutex::default(),
            addresses: LoopbackAddresses::default(),
            ended: Mutex::default(),
            foreign: AtomicBool::new(false),
            relayed: AtomicBool::new(false),
            tasks: Mutex::default(),
        })
    }

    /// Its public key.
    pub(super) const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// A client with the newest token.
    pub(super) fn client(&self) -> Client {
        self.client.lock().client.clone()
    }

    /// Goes on with the newest token, because an older one may have been revoked, and with the authorities that the
    /// user trusts now.
    pub(crate) fn renew_client(&self, token: &Secret, authorities: &str) -> Result<()> {
        let mut current = self.client.lock();
        if current.authorities == authorities {
            current.client = current.client.with_token(token.clone());
        } else {
            *current = ServerClient::new(&self.server_url, token, authorities)?;
        }
        Ok(())
    }

    /// All weavers that have a tunnel.
    pub(crate) fn weavers(&self) -> Vec<Arc<Weaver>> {
        let mut all: Vec<_> = self.weavers.lock().values().cloned().collect();
        all.sort_by_key(|weaver| weaver.id);
        all
    }

    /// Whether any tunnel was brought up.
    pub(crate) fn has_up(&self) -> bool {
        self.weavers().iter().any(|weaver| weaver.is_up())
    }

    /// Whether the server refuses the node because it was another user's before.
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    /// A weaver that has a tunnel, by its id, what it was called before, or the beginning of its id.
    pub(crate) fn known(&self, reference: &str) -> Option<Arc<Weaver>> {
        let reference = normalise(reference).ok()?;
        let named = || self.names.lock().get(&reference).copied();
        let id = reference.parse().ok().or_else(named)?;
        self.weavers.lock().get(&id).cloned()
    }

    /// The weaver's address inside the tunnel, for names such as `ID.loom`.
    fn resolve(&self, name: &str) -> Option<Ipv6Addr> {
        self.known(name).map(|weaver| weaver.address())
    }

    /// Opens a stream to a port of a weaver. A weaver that does not answer is asked for anew, for a while.
    pub(crate) async fn connect(self: &Arc<Self>, reference: &str, port: u16) -> Result<(Arc<Weaver>, TunnelStream)> {
        let began = Instant::now();
        let reference = normalise(reference)?;
        if let Some(weaver) = self.known(&reference) {
            match self.dial(&weaver, port, began).await {
                // It is gone; its name may be another's by now, and the server can say so.
                Err(_) if self.known(&reference).is_none() => {}
                result => return result.map(|stream| (weaver, stream)),
            }
        }
        let weaver = self.admit(&reference, began).await?;
        let stream = self.dial(&weaver, port, began).await?;
        Ok((weaver, stream))
    }

    async fn dial(self: &Arc<Self>, weaver: &Weaver, port: u16, began: Instant) -> Result<TunnelStream> {
        let tunnel = self.tunnel.get().ok_or_else(|| CliError::failure("the tunnel has not started"))?;
        let _used = weaver.begin_use();
        loop {
            let key = weaver.peer_key();
            let attempt = tunnel.connect(weaver.address(), port, PATIENCE.saturating_sub(began.elapsed()));
            let outcome = tokio::select! {
                outcome = attempt => outcome,
                gone = self.keep_asking(weaver) => return Err(gone),
            };
            match outcome {
                Ok(stream) => return Ok(stream),
                // The agent was restarted, and what was under way to the old one has ended.
                Err(ConnectError::Refused | ConnectError::NoPeer(_)) if weaver.peer_key() != key => {}
                Err(ConnectError::NoPeer(_)) if began.elapsed() < PATIENCE => {
                    self.ask(weaver).await?;
                    sleep(RETRY).await;
                }
                Err(ConnectError::Refused) => {
                    return Err(CliError::failure(format!("nothing listens on port {port} of {}", weaver.id)));
                }
                Err(error @ (ConnectError::Closed | ConnectError::TooMany)) => {
                    return Err(CliError::failure(format!("{}: {error}", weaver.id)));
                }
                Err(error) => {
                    let why = weaver.problem().unwrap_or_else(|| error.to_string());
                    return Err(CliError::new(Exit::TIMED_OUT, format!("{} does not answer: {why}", weaver.id))
                        .hint(format!("loom events {} shows whether its agent is there", weaver.id)));
                }
            }
        }
    }

    /// Asks the server about a weaver that does not answer, until it is gone; why it is.
    async fn keep_asking(self: &Arc<Self>, weaver: &Weaver) -> CliError {
        loop {
            sleep(IMPATIENCE).await;
            if let Err(gone) = self.ask(weaver).await {
                return gone;
            }
        }
    }

    /// Asks the server once how things are with a weaver. That the server cannot say is no error: the way to the weaver
    /// may come back without it.
    ///
    /// # Errors
    ///
    /// When the weaver is gone; all that was of it here has ended then.
    async fn ask(self: &Arc<Self>, weaver: &Weaver) -> Result<()> {
        let id = weaver.id.to_string();
        match self.request_grant(&id, self.candidates()).await {
            Ok(grant) => drop(self.accept(&id, grant).await?),
            Err(error) if is_gone(&error) => {
                let error = CliError::from(error);
                self.forget(weaver, &error).await;
                return Err(error);
            }
            Err(error) => {
                weaver.set_problem(Some(error.to_string()));
                // Other commands may have better tokens, so the weaver stays.
                if error.code() == Some(ErrorCode::Unauthorized) {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// The server has answered to a request for the relay. When that was connected before, the server may have ended it
    /// because our admission to a weaver was revoked: what flows to that weaver would otherwise hang.
    pub(super) fn relay_answered(self: &Arc<Self>) {
        if !self.relayed.swap(true, Ordering::Relaxed) {
            return;
        }
        let node = Arc::downgrade(self);
        self.tasks.lock().spawn(async move {
            let Some(node) = node.upgrade() else { return };
            for weaver in node.weavers() {
                if let Err(error) = node.ask(&weaver).await
                    && node.known(&weaver.id.to_string()).is_some()
                {
                    node.forget(&weaver, &error).await;
                }
            }
        });
    }

    /// Asks the server to admit us to a weaver, waits while it says "not yet", and tells the node.
    async fn admit(self: &Arc<Self>, reference: &str, began: Instant) -> Result<Arc<Weaver>> {
        loop {
            match self.request_grant(reference, self.candidates()).await {
                Ok(grant) => return self.accept(reference, grant).await,
                Err(error) => match error.code() {
                    Some(ErrorCode::WeaverNotReady | ErrorCode::AgentUnreachable) if began.elapsed() < PATIENCE => {
                        sleep(RETRY).await;
                    }
                    // A server that restarts must not fail a command.
                    None if began.elapsed() < PATIENCE && self.tunnel.initialized() => sleep(RETRY).await,
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// Where we can perhaps be reached, as far as the server wants to know.
    fn candidates(&self) -> Vec<SocketAddr> {
        let mut candidates = self.tunnel.get().map(Tunnel::candidates).unwrap_or_default();
        candidates.truncate(MOST_CANDIDATES);
        candidates
    }

    async fn request_grant(
        &self,
        reference: &str,
        candidates: Vec<SocketAddr>,
    ) -> std::result::Result<TunnelGrant, ClientError> {
        let (client, path) = (self.client(), format!("/api/weavers/{reference}/tunnel"));
        let public_key = WireGuardKey(*self.public_key.as_bytes());
        let mut request = OpenTunnel { public_key, proof: None, candidates };
        // The server knows the node's key from the first grant on, until the node was not used for long.
        let known = self.tunnel.initialized();
        if !known {
            request.proof = Some(self.prove_key(&client).await?);
        }
        let mut answer = client.post(&path, &request).await;
        if known && answer.as_ref().err().and_then(ClientError::code) == Some(ErrorCode::KeyNotProven) {
            request.proof = Some(self.prove_key(&client).await?);
            answer = client.post(&path, &request).await;
        }
        let refused = answer.as_ref().err().and_then(ClientError::code) == Some(ErrorCode::Forbidden);
        self.foreign.store(refused, Ordering::Relaxed);
        answer
    }

    async fn prove_key(&self, client: &Client) -> std::result::Result<KeyProof, ClientError> {
        let challenge: KeyChallenge = client.get("/api/wireguard/challenge").await?;
        Ok(challenge.answer(&self.private_key))
    }

    /// Puts a grant in force.
    async fn accept(self: &Arc<Self>, reference: &str, grant: TunnelGrant) -> Result<Arc<Weaver>> {
        let preshared_key = STANDARD.decode(grant.preshared_key.expose()).ok().and_then(|key| key.try_into().ok());
        let unreadable = || CliError::failure(format!("the server's grant for {} cannot be read", grant.weaver_id));
        let first = !self.tunnel.initialized();
        let tunnel = self.tunnel.get_or_try_init(async || self.start(grant.device_address)).await?.clone();
        if self.address.get() != Some(&grant.device_address) {
            // The address depends only on the key and the server: this is another server at the old one's address.
            self.foreign.store(true, Ordering::Relaxed);
            return Err(CliError::failure("the server has given this device another address than before"));
        }
        let peer = PeerConfig {
            public_key: PublicKey::from(grant.peer_key.0),
            preshared_key: Some(preshared_key.ok_or_else(unreadable)?),
            address: grant.peer_address,
            candidates: grant.candidates.clone(),
        };
        let weaver = {
            let mut weavers = self.weavers.lock();
            let weaver = weavers.entry(grant.weaver_id).or_insert_with(|| Arc::new(Weaver::new(&grant)));
            Arc::clone(weaver)
        };
        let mut names = self.names.lock();
        names.insert(reference.to_owned(), grant.weaver_id);
        drop(names);
        if let Some(old) = weaver.renew(grant)
            && old != peer.public_key
        {
            // The agent was restarted; what flowed to the old one ends now instead of hanging.
            tunnel.remove_peer(&old);
        }
        tunnel.add_peer(peer, true);
        if first {
            self.tell_candidates(weaver.id);
        }
        Ok(weaver)
    }

    fn start(self: &Arc<Self>, address: Ipv6Addr) -> Result<Tunnel> {
        let udp = match std::env::var("LOOM_UDP").as_deref() {
            Ok("off") => Vec::new(),
            _ => vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))],
        };
        let address = *self.address.get_or_init(|| address);
        let config = Config { private_key: self.private_key.clone(), address, udp };
        let (tunnel, mut incoming, mut events) =
            Tunnel::start(config).map_err(|error| CliError::failure(format!("starting the tunnel: {error}")))?;
        let mut tasks = self.tasks.lock();
        // Nobody is to connect to us, and nobody unknown is let in.
        tasks.spawn(async move {
            while let Some(connection) = incoming.next().await {
                connection.refuse()
            }
        });
        tasks.spawn(async move { while events.next().await.is_some() {} });
        let (relayed, connector) = (tunnel.clone(), Relay(Arc::downgrade(self)));
        tasks.spawn(async move { relayed.run_relay(connector).await });
        let node = Arc::downgrade(self);
        tasks.spawn(async move {
            loop {
                sleep(WATCH).await;
                let Some(node) = node.upgrade() else { return };
                node.heal().await;
            }
        });
        Ok(tunnel)
    }

    /// Tells the server, and through it the agent, where we can perhaps be reached.
    fn tell_candidates(self: &Arc<Self>, weaver: WeaverId) {
        let node = Arc::downgrade(self);
        self.tasks.lock().spawn(async move {
            let Some(node) = node.upgrade() else { return };
            if let Err(error) = node.request_grant(&weaver.to_string(), node.candidates()).await {
                tracing::info!(%weaver, "the server was not told our addresses: {error}");
            }
        });
    }

    /// Looks after the tunnels: one in use whose weaver is silent or about to end is asked for anew, one that nobody
    /// uses is let go.
    async fn heal(self: &Arc<Self>) {
        let Some(tunnel) = self.tunnel.get() else { return };
        let peers = tunnel.peers();
        for weaver in self.weavers() {
            if !weaver.is_in_use() {
                if weaver.unused_for() > IDLE {
                    tracing::info!(weaver = %weaver.id, "nobody uses it any more");
                    self.drop_weaver(&weaver);
                    self.tell_down(weaver.id).await;
                }
                continue;
            }
            let peer = peers.iter().find(|peer| peer.address == weaver.address());
            let silent = match peer.and_then(|peer| peer.paths.iter().filter_map(|path| path.last_received).min()) {
                Some(silent) => silent > SILENCE,
                None => weaver.unasked_for() > FIRST_SILENCE,
            };
            if !silent && !weaver.ends_within(BEFORE_END) {
                weaver.trust();
            } else if weaver.may_ask(WATCH, LONGEST_PAUSE) {
                // One question, not many: the next look comes soon enough. That it is gone was told where it matters.
                let _ = self.ask(&weaver).await;
            }
        }
    }

    /// Brings a weaver's tunnel up with listeners here.
    pub(crate) async fn up(
        self: &Arc<Self>,
        reference: &str,
        forwards: &[Forward],
        socks: Option<SocketAddr>,
    ) -> Result<Arc<Weaver>> {
        let (weaver, ports) = self.connect(reference, PORTS_PORT).await?;
        let tunnel = self.tunnel.get().ok_or_else(|| CliError::failure("the tunnel has not started"))?;
        let address = self.addresses.take(weaver.id);
        let listeners = weaver.listeners(|remote| Listeners::new(tunnel.clone(), weaver.id, remote, address));
        listeners.follow(ports).await?;
        for forward in forwards {
            listeners.add(*forward).await?;
        }
        if let Some(socks) = socks {
            let node = Arc::downgrade(self);
            listeners.add_socks(socks, move |name| node.upgrade()?.resolve(name)).await?;
        }
        Ok(weaver)
    }

    /// Takes a weaver's tunnel down: listeners, flows and the admission. Streams of other commands, SSH sessions for
    /// one, go on.
    pub(crate) async fn down(&self, weaver: &Weaver) {
        weaver.close_listeners().await;
        self.addresses.give_back(weaver.id);
        if !weaver.is_in_use() {
            self.drop_weaver(weaver);
            self.tell_down(weaver.id).await;
        }
    }

    /// Tells the server that this device needs no admission to a weaver any more. It would end by itself with the
    /// weaver.
    async fn tell_down(&self, weaver: WeaverId) {
        let path = format!("/api/weavers/{weaver}/tunnel/{}", URL_SAFE_NO_PAD.encode(self.public_key.as_bytes()));
        match timeout(FAREWELL, self.client().delete(&path)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(%weaver, "the server was not told that the tunnel is down: {error}"),
            Err(_) => tracing::info!(%weaver, "the server was not told that the tunnel is down: timed out"),
        }
    }

    /// A weaver is gone: everything of it here goes too. If its tunnel was brought up, its status says why, for a
    /// while.
    async fn forget(&self, weaver: &Weaver, why: &CliError) {
        tracing::info!(weaver = %weaver.id, "it is gone: {why}");
        weaver.set_problem(Some(why.to_string()));
        if weaver.is_up() {
            let mut ended = self.ended.lock();
            ended.retain(|status| status.weaver_id != weaver.id.to_string());
            ended.push_back(TunnelStatus {
                up: false,
                address: None,
                forwards: Vec::new(),
                socks: None,
                ..weaver.status(self)
            });
            if ended.len() > MOST_ENDED {
                ended.pop_front();
            }
        }
        // First the peer: what flows is reset, and the listeners' connections end with it.
        self.drop_weaver(weaver);
        weaver.close_listeners().await;
    }

    /// Tunnels whose weavers went away, since they were last asked for with `forget`.
    pub(crate) fn ended(&self, forget: bool) -> Vec<TunnelStatus> {
        let mut ended = self.ended.lock();
        if forget { ended.drain(..).collect() } else { ended.iter().cloned().collect() }
    }

    fn drop_weaver(&self, weaver: &Weaver) {
        self.weavers.lock().remove(&weaver.id);
        self.names.lock().retain(|_, id| *id != weaver.id);
        self.addresses.give_back(weaver.id);
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.remove_peer(&weaver.peer_key());
        }
    }

    /// All paths are tried again: the network changed, or the machine slept.
    pub(crate) fn network_changed(&self) {
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.network_changed();
        }
    }

    /// What the node knows of a weaver's peer.
    pub(crate) fn peer(&self, address: Ipv6Addr) -> Option<loom_tunnel::PeerStatus> {
        self.tunnel.get()?.peers().into_iter().find(|peer| peer.address == address)
    }

    /// Ends the node: listeners, flows, and the device at the server.
    pub(crate) async fn end(&self) {
        for weaver in self.weavers() {
            weaver.close_listeners().await;
        }
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.shutdown().await;
            let key = URL_SAFE_NO_PAD.encode(self.public_key.as_bytes());
            // The grants end by themselves at the latest with their weavers.
            let _ = self.client().delete(&format!("/api/devices/{key}")).await;
        }
        self.tasks.lock().abort_all();
    }
}

/// Whether the server says that the weaver will not come back.
fn is_gone(error: &ClientError) -> bool {
    matches!(error.code(), Some(ErrorCode::WeaverNotFound | ErrorCode::WeaverGone))
}
