//! The daemon's connection to one Loom server: a WireGuard node, and the weavers that are reached through it.
//!
//! The key is made here and lives as long as the daemon. The node's address depends only on the key and comes with the
//! first grant, which starts the tunnel. A second request then tells the server the node's own UDP addresses.

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

/// For a weaver to become reachable; long enough for its agent to restart.
const REACH_TIMEOUT: Duration = Duration::from_secs(25);
/// Between requests for a new grant while a connection is waiting: the agent may have been restarted, or be gone.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);
/// Between requests while the server answers "not yet".
const NOT_READY_RETRY: Duration = Duration::from_millis(250);
/// Between two runs of [`ServerLink::maintain`].
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(3);
/// A weaver in use that was silent for this long needs a new grant. More than the 15 s between pings of an idle path.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(18);
/// The same for a weaver that has not been heard since its grant.
const INITIAL_SILENCE_TIMEOUT: Duration = Duration::from_secs(3);
/// The grant of a weaver in use is renewed this long before it expires: the weaver may have been extended.
const RENEW_BEFORE_EXPIRY: Duration = Duration::from_secs(60);
/// Between two such renewals of one weaver; the pause doubles from [`MAINTENANCE_INTERVAL`] to this.
const MAX_RENEW_PAUSE: Duration = Duration::from_secs(30);
/// A weaver unused for this long loses its tunnel.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// The server accepts no more; loopback addresses come last.
const MAX_CANDIDATES: usize = 16;
/// Ended tunnels that `loom tunnel status` still shows.
const MAX_ENDED: usize = 16;
/// For telling the server that a tunnel is down.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) struct ServerLink {
    private_key: StaticSecret,
    public_key: PublicKey,
    server_url: String,
    client: Mutex<ServerClient>,
    tunnel: OnceCell<Tunnel>,
    /// The node's address inside the tunnel, known from the first grant on.
    address: OnceLock<Ipv6Addr>,
    weavers: Mutex<HashMap<WeaverId, Arc<Weaver>>>,
    /// The ids of weavers by the references that commands used for them.
    names: Mutex<HashMap<String, WeaverId>>,
    addresses: LoopbackAddresses,
    /// The last status of tunnels that were up when their weavers ended, with the reason.
    ended: Mutex<VecDeque<TunnelStatus>>,
    /// The server does not accept this node's key: another user's, or another server's, device has it.
    rejected: AtomicBool,
    /// The relay has answered before.
    relay_answered: AtomicBool,
    tasks: Mutex<JoinSet<()>>,
}

/// The HTTP client, and the CA certificates (PEM) that it trusts besides the system's.
struct ServerClient {
    client: Client,
    authorities: String,
}

impl ServerClient {
    fn new(server_url: &str, token: &Secret, authorities: &str) -> Result<Self> {
        let client = Client::with_ca_certificates(server_url, Some(token.clone()), authorities)?;
        Ok(Self { client, authorities: authorities.to_owned() })
    }
}

impl ServerLink {
    pub(crate) fn new(server_url: &str, token: &Secret, authorities: &str) -> Result<Self> {
        let mut seed = [0; 32];
        SystemRandom::new()
            .fill(&mut seed)
            .map_err(|_| CliError::failure("the operating system provides no random bytes"))?;
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
            rejected: AtomicBool::new(false),
            relay_answered: AtomicBool::new(false),
            tasks: Mutex::default(),
        })
    }

    pub(super) const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    pub(super) fn client(&self) -> Client {
        self.client.lock().client.clone()
    }

    /// Uses this token and these CA certificates from now on: an older token may have been revoked.
    pub(crate) fn renew_client(&self, token: &Secret, authorities: &str) -> Result<()> {
        let mut current = self.client.lock();
        if current.authorities == authorities {
            current.client = current.client.with_token(token.clone());
        } else {
            *current = ServerClient::new(&self.server_url, token, authorities)?;
        }
        Ok(())
    }

    pub(crate) fn weavers(&self) -> Vec<Arc<Weaver>> {
        let mut all: Vec<_> = self.weavers.lock().values().cloned().collect();
        all.sort_by_key(|weaver| weaver.id);
        all
    }

    /// Whether any tunnel was brought up.
    pub(crate) fn has_up(&self) -> bool {
        self.weavers().iter().any(|weaver| weaver.is_up())
    }

    /// Whether the server rejects this node's key, so that a new [`ServerLink`] is needed.
    pub(crate) fn is_rejected(&self) -> bool {
        self.rejected.load(Ordering::Relaxed)
    }

    /// The weaver with a tunnel that has this id or that an earlier command called by this reference.
    pub(crate) fn find(&self, reference: &str) -> Option<Arc<Weaver>> {
        let reference = normalise(reference).ok()?;
        let named = || self.names.lock().get(&reference).copied();
        let id = reference.parse().ok().or_else(named)?;
        self.weavers.lock().get(&id).cloned()
    }

    /// The weaver's address inside the tunnel, for names such as `ID.loom`.
    fn resolve(&self, name: &str) -> Option<Ipv6Addr> {
        self.find(name).map(|weaver| weaver.address())
    }

    /// Opens a stream to a port of a weaver, and renews the grant until the weaver answers or time is up.
    pub(crate) async fn connect(self: &Arc<Self>, reference: &str, port: u16) -> Result<(Arc<Weaver>, TunnelStream)> {
        let began = Instant::now();
        let reference = normalise(reference)?;
        if let Some(weaver) = self.find(&reference) {
            match self.dial(&weaver, port, began).await {
                // The weaver is gone, but another may have taken its name: ask the server.
                Err(_) if self.find(&reference).is_none() => {}
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
            let attempt = tunnel.connect(weaver.address(), port, REACH_TIMEOUT.saturating_sub(began.elapsed()));
            let outcome = tokio::select! {
                outcome = attempt => outcome,
                gone = self.renew_until_gone(weaver) => return Err(gone),
            };
            match outcome {
                Ok(stream) => return Ok(stream),
                // The agent was restarted, which ended the attempt to reach the old one.
                Err(ConnectError::Refused | ConnectError::NoPeer(_)) if weaver.peer_key() != key => {}
                Err(ConnectError::NoPeer(_)) if began.elapsed() < REACH_TIMEOUT => {
                    self.renew_grant(weaver).await?;
                    sleep(NOT_READY_RETRY).await;
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

    /// Renews the grant again and again; returns the reason once the weaver is gone.
    async fn renew_until_gone(self: &Arc<Self>, weaver: &Weaver) -> CliError {
        loop {
            sleep(RENEW_INTERVAL).await;
            if let Err(gone) = self.renew_grant(weaver).await {
                return gone;
            }
        }
    }

    /// Requests a new grant once. An unreachable server is no error: the weaver may become reachable without it.
    ///
    /// # Errors
    ///
    /// When the weaver is gone; then its tunnel has been removed.
    async fn renew_grant(self: &Arc<Self>, weaver: &Weaver) -> Result<()> {
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
                // Another command may bring a valid token, so the weaver stays.
                if error.code() == Some(ErrorCode::Unauthorized) {
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// The server has answered a request for the relay. If the relay was connected before, it may have been closed
    /// because a grant was revoked: renewing all grants finds out, and ends connections that would otherwise hang.
    pub(super) fn relay_answered(self: &Arc<Self>) {
        if !self.relay_answered.swap(true, Ordering::Relaxed) {
            return;
        }
        let link = Arc::downgrade(self);
        self.tasks.lock().spawn(async move {
            let Some(link) = link.upgrade() else { return };
            for weaver in link.weavers() {
                if let Err(error) = link.renew_grant(&weaver).await
                    && link.find(&weaver.id.to_string()).is_some()
                {
                    link.forget(&weaver, &error).await;
                }
            }
        });
    }

    /// Requests the first grant for a weaver, and retries while the server answers "not yet".
    async fn admit(self: &Arc<Self>, reference: &str, began: Instant) -> Result<Arc<Weaver>> {
        loop {
            match self.request_grant(reference, self.candidates()).await {
                Ok(grant) => return self.accept(reference, grant).await,
                Err(error) => match error.code() {
                    Some(ErrorCode::WeaverNotReady | ErrorCode::AgentUnreachable)
                        if began.elapsed() < REACH_TIMEOUT =>
                    {
                        sleep(NOT_READY_RETRY).await;
                    }
                    // A restarting server must not fail a command.
                    None if began.elapsed() < REACH_TIMEOUT && self.tunnel.initialized() => {
                        sleep(NOT_READY_RETRY).await
                    }
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// UDP addresses at which this node may be reachable, at most as many as the server accepts.
    fn candidates(&self) -> Vec<SocketAddr> {
        let mut candidates = self.tunnel.get().map(Tunnel::candidates).unwrap_or_default();
        candidates.truncate(MAX_CANDIDATES);
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
        self.rejected.store(refused, Ordering::Relaxed);
        answer
    }

    async fn prove_key(&self, client: &Client) -> std::result::Result<KeyProof, ClientError> {
        let challenge: KeyChallenge = client.get("/api/wireguard/challenge").await?;
        Ok(challenge.answer(&self.private_key))
    }

    /// Adds the grant's weaver as a peer of the tunnel; starts the tunnel if this is the first grant.
    async fn accept(self: &Arc<Self>, reference: &str, grant: TunnelGrant) -> Result<Arc<Weaver>> {
        let preshared_key = STANDARD.decode(grant.preshared_key.expose()).ok().and_then(|key| key.try_into().ok());
        let unreadable = || CliError::failure(format!("the server's grant for {} cannot be parsed", grant.weaver_id));
        let first = !self.tunnel.initialized();
        let tunnel = self.tunnel.get_or_try_init(async || self.start(grant.device_address)).await?.clone();
        if self.address.get() != Some(&grant.device_address) {
            // The address depends only on the key and the server, so another server now has the old one's URL.
            self.rejected.store(true, Ordering::Relaxed);
            return Err(CliError::failure("the server has assigned this device a different address than before"));
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
        let old = weaver.renew(grant);
        if old != peer.public_key {
            // The agent was restarted: end connections to the old one instead of letting them hang.
            tunnel.remove_peer(&old);
        }
        tunnel.add_peer(peer, true);
        if first {
            self.send_candidates(weaver.id);
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
        // This node accepts no connections and no unknown peers.
        tasks.spawn(async move {
            while let Some(connection) = incoming.next().await {
                connection.refuse()
            }
        });
        tasks.spawn(async move { while events.next().await.is_some() {} });
        let (relayed, connector) = (tunnel.clone(), Relay(Arc::downgrade(self)));
        tasks.spawn(async move { relayed.run_relay(connector).await });
        let link = Arc::downgrade(self);
        tasks.spawn(async move {
            loop {
                sleep(MAINTENANCE_INTERVAL).await;
                let Some(link) = link.upgrade() else { return };
                link.maintain().await;
            }
        });
        Ok(tunnel)
    }

    /// Sends this node's UDP addresses to the server, which passes them on to the agent.
    fn send_candidates(self: &Arc<Self>, weaver: WeaverId) {
        let link = Arc::downgrade(self);
        self.tasks.lock().spawn(async move {
            let Some(link) = link.upgrade() else { return };
            if let Err(error) = link.request_grant(&weaver.to_string(), link.candidates()).await {
                tracing::info!(%weaver, "cannot send this device's addresses to the server: {error}");
            }
        });
    }

    /// Renews the grants of weavers in use that are silent or about to expire, and removes unused weavers.
    async fn maintain(self: &Arc<Self>) {
        let Some(tunnel) = self.tunnel.get() else { return };
        let peers = tunnel.peers();
        for weaver in self.weavers() {
            if !weaver.is_in_use() {
                if weaver.unused_for() > IDLE_TIMEOUT {
                    tracing::info!(weaver = %weaver.id, "the tunnel is unused and is removed");
                    self.remove(&weaver);
                    self.notify_down(weaver.id).await;
                }
                continue;
            }
            let peer = peers.iter().find(|peer| peer.address == weaver.address());
            let silent = match peer.and_then(|peer| peer.paths.iter().filter_map(|path| path.last_received).min()) {
                Some(silent) => silent > SILENCE_TIMEOUT,
                None => weaver.since_renewal() > INITIAL_SILENCE_TIMEOUT,
            };
            if !silent && !weaver.expires_within(RENEW_BEFORE_EXPIRY) {
                weaver.reset_renewal();
            } else if weaver.renewal_due(MAINTENANCE_INTERVAL, MAX_RENEW_PAUSE) {
                // Once is enough, as the next run comes soon. `renew_grant` has handled a weaver that is gone.
                let _ = self.renew_grant(&weaver).await;
            }
        }
    }

    pub(crate) async fn up(
        self: &Arc<Self>,
        reference: &str,
        forwards: &[Forward],
        socks: Option<SocketAddr>,
    ) -> Result<Arc<Weaver>> {
        let (weaver, ports) = self.connect(reference, PORTS_PORT).await?;
        let tunnel = self.tunnel.get().ok_or_else(|| CliError::failure("the tunnel has not started"))?;
        let address = self.addresses.allocate(weaver.id);
        let listeners = weaver.listeners(|remote| Listeners::new(tunnel.clone(), weaver.id, remote, address));
        listeners.follow(ports).await?;
        for forward in forwards {
            listeners.add(*forward).await?;
        }
        if let Some(socks) = socks {
            let link = Arc::downgrade(self);
            listeners.add_socks(socks, move |name| link.upgrade()?.resolve(name)).await?;
        }
        Ok(weaver)
    }

    /// Takes a weaver's tunnel down. If other commands have open streams, such as SSH sessions, only the listeners are
    /// closed, and the streams go on.
    pub(crate) async fn down(&self, weaver: &Weaver) {
        weaver.close_listeners().await;
        self.addresses.release(weaver.id);
        if !weaver.is_in_use() {
            self.remove(weaver);
            self.notify_down(weaver.id).await;
        }
    }

    /// Tells the server that this device needs its grant no longer. Without this, it would expire with the weaver.
    async fn notify_down(&self, weaver: WeaverId) {
        let path = format!("/api/weavers/{weaver}/tunnel/{}", URL_SAFE_NO_PAD.encode(self.public_key.as_bytes()));
        match timeout(NOTIFY_TIMEOUT, self.client().delete(&path)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::info!(%weaver, "cannot tell the server that the tunnel is down: {error}"),
            Err(_) => tracing::info!(%weaver, "cannot tell the server that the tunnel is down: timed out"),
        }
    }

    /// Removes a weaver that is gone. If its tunnel was up, `loom tunnel status` keeps showing it with the reason.
    async fn forget(&self, weaver: &Weaver, why: &CliError) {
        tracing::info!(weaver = %weaver.id, "the weaver is gone: {why}");
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
            if ended.len() > MAX_ENDED {
                ended.pop_front();
            }
        }
        // The peer first: that resets its connections, and the listeners' connections end with them.
        self.remove(weaver);
        weaver.close_listeners().await;
    }

    /// Tunnels whose weavers have ended; `forget` also clears the list.
    pub(crate) fn ended(&self, forget: bool) -> Vec<TunnelStatus> {
        let mut ended = self.ended.lock();
        if forget { ended.drain(..).collect() } else { ended.iter().cloned().collect() }
    }

    fn remove(&self, weaver: &Weaver) {
        self.weavers.lock().remove(&weaver.id);
        self.names.lock().retain(|_, id| *id != weaver.id);
        self.addresses.release(weaver.id);
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.remove_peer(&weaver.peer_key());
        }
    }

    /// Probes all paths again, after the network has changed or the machine has slept.
    pub(crate) fn network_changed(&self) {
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.network_changed();
        }
    }

    pub(crate) fn peer(&self, address: Ipv6Addr) -> Option<loom_tunnel::PeerStatus> {
        self.tunnel.get()?.peers().into_iter().find(|peer| peer.address == address)
    }

    /// Closes all listeners and connections, and removes this device at the server.
    pub(crate) async fn shutdown(&self) {
        for weaver in self.weavers() {
            weaver.close_listeners().await;
        }
        if let Some(tunnel) = self.tunnel.get() {
            tunnel.shutdown().await;
            let key = URL_SAFE_NO_PAD.encode(self.public_key.as_bytes());
            // If this fails, the grants expire with their weavers.
            let _ = self.client().delete(&format!("/api/devices/{key}")).await;
        }
        self.tasks.lock().abort_all();
    }
}

/// Whether the server says that the weaver will not come back.
fn is_gone(error: &ClientError) -> bool {
    matches!(error.code(), Some(ErrorCode::WeaverNotFound | ErrorCode::WeaverGone))
}
