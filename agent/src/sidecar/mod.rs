//! The sidecar: everything of the weaver that has to do with the network, beside the user's container.
//!
//! It makes its keys in memory, registers with the credential that the provisioner left, and is then two things at
//! once. To the server it is the agent at the end of the control link; to the devices that the server grants
//! it is a peer in the tunnel, where it answers as the weaver: SSH on its port, the port report on its, and every
//! other port is one of the user's own programs. What happens in the user's container it asks the host to do.
//!
//! - [`config`]: the settings; [`identity`]: keys, registration, back-off.
//! - [`control`]: the link to the server; [`streams`]: what is dialled back for it.
//! - [`grants`]: which devices may come in; [`inbound`]: the connections that they open; [`ssh`]: the SSH server.
//! - [`main_program`]: the start, the clone ([`clone`]), the state and the end.
//!
//! It can be killed and started at any time: the main program and its terminal live in the host, and the server states
//! everything again in its welcome. It is one thread, except for a clone.

mod clone;
mod config;
mod control;
mod grants;
mod identity;
mod inbound;
mod main_program;
mod relay;
mod ssh;
mod streams;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use loom_api::{
    Secret, WireGuardKey,
    agent::{AgentMessage, MainState, Registered, StartSpec},
    client::Client,
};
use loom_tunnel::{Events, Tunnel, TunnelEvent};
use parking_lot::Mutex;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use self::{config::Config, control::Control, grants::Grants, identity::Identity};
use crate::protocol::{HostClient, HostState};

/// What is logged when `RUST_LOG` says nothing.
const LOG_FILTER: &str = "info,boringtun=off,russh=warn";
/// How long the sidecar may take for its last words.
const LAST_WORDS: Duration = Duration::from_millis(2700);

/// What all parts of the sidecar share.
struct Sidecar {
    config: Config,
    identity: Identity,
    /// Speaks with the newest token.
    client: Mutex<Client>,
    ssh: Mutex<Arc<russh::server::Config>>,
    host: HostClient,
    tunnel: Tunnel,
    grants: Grants,
    /// Towards the control link.
    outbox: mpsc::Sender<AgentMessage>,
    /// What the server wants to run, once it has said so.
    start: watch::Sender<Option<StartSpec>>,
    /// The host's state, as it was told last.
    state: watch::Sender<HostState>,
    /// Why the weaver cannot become what was asked.
    failed: watch::Sender<Option<String>>,
    deadline: watch::Sender<Option<Timestamp>>,
    /// The server was told how the main program ended.
    reported: CancellationToken,
    /// The server was told of the failure.
    failure_reported: CancellationToken,
    /// The sidecar was told to end.
    stopping: CancellationToken,
}

/// Runs the sidecar until it is told to stop.
///
/// # Errors
///
/// What it cannot go on without: its settings, its sockets.
pub(crate) fn run() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).compact().init();
    let config = Config::from_env(std::env::vars_os())?;
    tracing::info!("settings: {config}");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let result = runtime.block_on(live(config));
    // A clone that is under way would be waited for.
    runtime.shutdown_background();
    result
}

/// From the registration to the last words.
async fn live(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let identity = Identity::generate()?;
    let registered = tokio::select! {
        registered = identity.register(&config) => registered,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let settings = loom_tunnel::Config {
        private_key: identity.wireguard.clone(),
        address: registered.address,
        udp: config.udp.clone(),
    };
    let (tunnel, incoming, events) = Tunnel::start(settings).context("cannot start the tunnel")?;
    let (outbox, messages) = mpsc::channel(control::OUTBOX);
    let sidecar = Arc::new(Sidecar {
        client: Mutex::new(identity::client(&config, &registered)),
        ssh: Mutex::new(ssh::config(&identity.ssh, &registered.ssh_certificate)),
        host: HostClient::new(&config.run_dir).expecting(config.host_pid),
        grants: Grants::new(tunnel.clone()),
        tunnel,
        outbox,
        start: watch::Sender::new(None),
        state: watch::Sender::new(HostState::default()),
        failed: watch::Sender::new(None),
        deadline: watch::Sender::new(None),
        reported: CancellationToken::new(),
        failure_reported: CancellationToken::new(),
        stopping: CancellationToken::new(),
        config,
        identity,
    });

    // Everything that runs is one of these, and ends here at the latest.
    let mut tasks = JoinSet::new();
    let mut control = JoinSet::new();
    control.spawn(Control::new(Arc::clone(&sidecar), messages).run());
    tasks.spawn(relay::run(Arc::clone(&sidecar)));
    tasks.spawn(inbound::serve(Arc::clone(&sidecar), registered.address, incoming));
    tasks.spawn(report_unknown_peers(Arc::clone(&sidecar), events));
    tasks.spawn({
        let sidecar = Arc::clone(&sidecar);
        async move { sidecar.grants.expire().await }
    });
    tasks.spawn(main_program::start(Arc::clone(&sidecar)));
    tasks.spawn(main_program::watch(Arc::clone(&sidecar)));
    tasks.spawn(main_program::announce_deadline(Arc::clone(&sidecar)));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // Some are done early; none may fail.
            Some(ended) = tasks.join_next() => ended.context("a part of the sidecar failed")?,
            Some(ended) = control.join_next() => {
                ended.context("the control link failed")?;
                bail!("the control link has ended");
            }
        }
    }

    sidecar.stopping.cancel();
    let said = async { while control.join_next().await.is_some() {} };
    if timeout(LAST_WORDS, said).await.is_err() && sidecar.has_last_words() {
        tracing::warn!("the server could not be told how the weaver ended");
    }
    tasks.shutdown().await;
    sidecar.tunnel.shutdown().await;
    Ok(())
}

impl Sidecar {
    /// A client with the newest token.
    fn client(&self) -> Client {
        self.client.lock().clone()
    }

    /// What the SSH server shows of itself.
    fn ssh(&self) -> Arc<russh::server::Config> {
        Arc::clone(&self.ssh.lock())
    }

    /// Takes over what a new registration brought. The address is the weaver's, and stays.
    fn registered(&self, registered: &Registered) {
        let token: Secret = registered.token.clone();
        *self.client.lock() = self.config.server.with_token(token);
        let ssh = ssh::config(&self.identity.ssh, &registered.ssh_certificate);
        *self.ssh.lock() = ssh;
    }

    /// Whether something must be said before the sidecar ends.
    fn has_last_words(&self) -> bool {
        let exited = matches!(self.state.borrow().main, MainState::Exited { .. });
        (exited && !self.reported.is_cancelled())
            || (self.failed.borrow().is_some() && !self.failure_reported.is_cancelled())
    }
}

/// Asks the server about devices that knock without a grant: perhaps one is on its way.
async fn report_unknown_peers(sidecar: Arc<Sidecar>, mut events: Events) {
    while let Some(TunnelEvent::UnknownPeer(key)) = events.next().await {
        // With the queue full there is no link, and the next welcome brings all grants.
        let _ = sidecar.outbox.try_send(AgentMessage::UnknownPeer { public_key: WireGuardKey(key.to_bytes()) });
    }
}
