//! The sidecar: does all of the weaver's networking, beside the user's container.
//!
//! It makes its keys in memory and registers with the credential from the provisioner. Then it has two roles: for the
//! server it is the agent on the control link; for the devices that the server grants access it is a WireGuard peer that
//! serves the weaver's address: SSH, the port report, and on all other ports the user's programs. Whatever has to happen
//! in the user's container it asks the host to do.
//!
//! - [`config`]: the settings; [`identity`]: keys, registration, backoff.
//! - [`control`]: the link to the server; [`streams`]: the streams that the server asks for.
//! - [`grants`]: the admitted devices; [`inbound`]: their connections; [`ssh`]: the SSH server.
//! - [`main_program`]: its clone ([`clone`]), start, state and end.
//!
//! It can be killed and restarted at any time: the main program and its terminal live in the host, and the server sends
//! the whole desired state again. It runs on one thread, except for a clone.

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

/// The log filter if `RUST_LOG` is not set.
const LOG_FILTER: &str = "info,boringtun=off,russh=warn";
/// For sending the final reports to the server.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(2700);

/// The state that all parts of the sidecar share.
struct Sidecar {
    config: Config,
    identity: Identity,
    /// Has the newest token.
    client: Mutex<Client>,
    ssh: Mutex<Arc<russh::server::Config>>,
    host: HostClient,
    tunnel: Tunnel,
    grants: Grants,
    /// Messages for the control link.
    outbox: mpsc::Sender<AgentMessage>,
    /// What to run, from the server's welcome.
    start: watch::Sender<Option<StartSpec>>,
    /// The host's last reported state.
    state: watch::Sender<HostState>,
    /// Why the weaver could not be set up.
    failed: watch::Sender<Option<String>>,
    deadline: watch::Sender<Option<Timestamp>>,
    /// The server has been told how the main program ended.
    reported: CancellationToken,
    /// The server has been told of the failure.
    failure_reported: CancellationToken,
    /// The sidecar was told to stop.
    stopping: CancellationToken,
}

/// Runs the sidecar until it is told to stop. Fails when its settings are invalid or its sockets cannot be opened.
pub(crate) fn run() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).compact().init();
    let config = Config::from_env(std::env::vars_os())?;
    tracing::info!("settings: {config}");
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let result = runtime.block_on(run_until_stopped(config));
    // Do not wait for a clone in progress.
    runtime.shutdown_background();
    result
}

/// Everything from the registration to the final reports.
async fn run_until_stopped(config: Config) -> anyhow::Result<()> {
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
    let (outbox, messages) = mpsc::channel(control::OUTBOX_SIZE);
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

    // All tasks are in this set, and end with it at the latest.
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
            // Tasks may end early, but not fail.
            Some(ended) = tasks.join_next() => ended.context("a part of the sidecar failed")?,
            Some(ended) = control.join_next() => {
                ended.context("the control link failed")?;
                bail!("the control link has ended");
            }
        }
    }

    sidecar.stopping.cancel();
    let said = async { while control.join_next().await.is_some() {} };
    if timeout(SHUTDOWN_TIMEOUT, said).await.is_err() && sidecar.has_unsent_reports() {
        tracing::warn!("could not tell the server how the weaver ended");
    }
    tasks.shutdown().await;
    sidecar.tunnel.shutdown().await;
    Ok(())
}

impl Sidecar {
    fn client(&self) -> Client {
        self.client.lock().clone()
    }

    /// The SSH server's configuration, with the newest host certificate.
    fn ssh(&self) -> Arc<russh::server::Config> {
        Arc::clone(&self.ssh.lock())
    }

    /// Uses the token and certificate of a new registration. The weaver's address does not change.
    fn registered(&self, registered: &Registered) {
        let token: Secret = registered.token.clone();
        *self.client.lock() = self.config.server.with_token(token);
        let ssh = ssh::config(&self.identity.ssh, &registered.ssh_certificate);
        *self.ssh.lock() = ssh;
    }

    /// Whether the server still has to be told how the weaver ended or failed.
    fn has_unsent_reports(&self) -> bool {
        let exited = matches!(self.state.borrow().main, MainState::Exited { .. });
        (exited && !self.reported.is_cancelled())
            || (self.failed.borrow().is_some() && !self.failure_reported.is_cancelled())
    }
}

/// Reports handshakes of devices without a grant to the server, which may be about to send one.
async fn report_unknown_peers(sidecar: Arc<Sidecar>, mut events: Events) {
    while let Some(TunnelEvent::UnknownPeer(key)) = events.next().await {
        // If the queue is full there is no link, and the next welcome will have all grants.
        let _ = sidecar.outbox.try_send(AgentMessage::UnknownPeer { public_key: WireGuardKey(key.to_bytes()) });
    }
}
