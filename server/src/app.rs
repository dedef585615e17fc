//! Puts the server together, and takes it apart again.
//!
//! [`App::start`] opens the store, finds the backend, and starts the tasks that run beside requests: the reconciler and
//! the deadlines. [`App::serve`] answers requests until it is told to stop; then agents and clients are told to come
//! back, the tasks end, and the weavers go on running. Nothing that matters is in memory only, so being killed is no
//! different.

use std::{
    fs::{self, File, TryLockError},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use loom_api::WeaverId;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Admission,
    agents::Hub,
    api,
    config::{Backend, Config},
    device_limits::DeviceLimits,
    durable,
    events::Events,
    listener::Listener,
    metrics::Metrics,
    provision::{Provisioner, kubernetes::Kubernetes, local::Local},
    reconcile::{Parts, Reconciler, deadlines::Deadlines},
    relay::Relay,
    revocation::Revocation,
    secrets::Secrets,
    sessions::Sessions,
    sign_in,
    state::{AppState, Shared},
    store::Store,
    streams::Streams,
};

/// Weavers that wait to be looked at; who finds it full waits.
const QUEUE_SIZE: usize = 1024;
/// How long requests may take to finish after the server was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that is ready to serve.
pub struct App {
    state: AppState,
    listener: Listener,
    tasks: JoinSet<()>,
    /// Held until the end.
    data_lock: File,
}

impl App {
    /// Opens everything and starts the tasks beside requests.
    ///
    /// # Errors
    ///
    /// What the server cannot run without.
    pub async fn start(config: Config) -> Result<Self> {
        // Traversable, because local weavers run as another user; every file in it is private by its own mode.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&config.data_dir)
            .with_context(|| format!("making {}", config.data_dir.display()))?;
        let data_lock = lock(&config.data_dir)?;
        let (secret, database) = (config.data_dir.join("secret.key"), config.data_dir.join("loom.db"));
        if database.exists() && !secret.exists() {
            bail!(
                "{} is missing, and {} was written with it: put it back from a backup, or move the database away to \
                 begin anew",
                secret.display(),
                database.display()
            );
        }
        let secrets = Arc::new(Secrets::load(&secret)?);
        let store = Store::open(&database).await?;
        sign_in::make_first_user(&store, &config.data_dir).await?;
        let metrics = Arc::new(Metrics::default());
        let listener = Listener::bind(config.listen, config.tls.as_ref(), &config.listener, metrics.refusals.clone())
            .context("is another server running there?")?;
        let address = listener.address();
        let url = public_url(&config, address);

        let (changes, changed) = mpsc::channel(QUEUE_SIZE);
        let provisioner = start_backend(&config, address, &metrics, changes.clone()).await?;
        let (agents, relay) = (Arc::new(Hub::default()), Arc::new(Relay::default()));
        let events = Events::new(store.clone(), Arc::clone(&metrics));
        let admission = Admission::start(store.clone(), Arc::clone(&agents), Arc::clone(&relay), Arc::clone(&secrets));
        let admission = Arc::new(admission.await?);
        let (deadlines, deadline_changed) = mpsc::channel(QUEUE_SIZE);
        let reconciler = Reconciler::new(Parts {
            store: store.clone(),
            provisioner: Arc::clone(&provisioner),
            events: events.clone(),
            admission: Arc::clone(&admission),
            agents: Arc::clone(&agents),
            metrics: Arc::clone(&metrics),
            wakeups: changes,
            deadlines,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(store.clone().watch_space());
        tasks.spawn(reconciler.clone().run(changed));
        tasks.spawn(Deadlines::new(reconciler.clone(), deadline_changed, config.cleanup_interval).run());
        let sessions = Sessions::new(config.session_limits);
        let revocation = Revocation {
            store: store.clone(),
            sessions: Arc::clone(&sessions),
            admission: Arc::clone(&admission),
            reconciler: reconciler.clone(),
        };
        tasks.spawn(revocation.run());
        let metrics_listener = match config.metrics_listen {
            Some(address) => {
                let refusals = metrics.refusals.clone();
                Some(Listener::bind(address, None, &config.listener, refusals).context("for metrics")?)
            }
            None => None,
        };
        let changes = api::completion::Changes::new(Arc::clone(&metrics));
        let listen_file = config.data_dir.join("listen");
        let state = AppState::new(Shared {
            config,
            url,
            secrets,
            events,
            metrics,
            store,
            provisioner,
            reconciler,
            streams: Streams::new(Arc::clone(&agents)),
            agents,
            relay,
            sessions,
            admission,
            device_limits: DeviceLimits::default(),
            changes,
            stopping: CancellationToken::new(),
        });
        if let Some(listener) = metrics_listener {
            // Probes are answered until the end.
            tasks.spawn(listener.serve(api::metrics::router(state.clone()), CancellationToken::new()));
        }
        durable::write_atomically(&listen_file, address.to_string().as_bytes(), 0o644)?;
        tracing::info!(%address, data = %state.config.data_dir.display(), backend = state.provisioner.name(), "serving");
        Ok(Self { state, listener, tasks, data_lock })
    }

    /// Serves until `stop` is done; then ends within a few seconds.
    ///
    /// # Errors
    ///
    /// When one of the tasks beside requests ends.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<()> {
        let Self { state, listener, mut tasks, data_lock: _data_lock } = self;
        let serving = async {
            listener.serve(api::router(state.clone()), state.stopping.clone()).await;
            state.changes.completed().await;
        };
        let stopped = async {
            stop.await;
            tracing::info!("stopping; weavers go on running");
            state.agents.go_away();
            state.stopping.cancel();
            tokio::time::sleep(DRAIN_TIMEOUT).await;
        };
        let result = tokio::select! {
            () = serving => Ok(()),
            () = stopped => {
                tracing::warn!("some connections did not end in time and are cut");
                Ok(())
            }
            // None of them ends by itself. Without one the server does half its work, and nobody notices; whatever
            // started the process starts it again.
            Some(ended) = tasks.join_next() => Err(match ended {
                Ok(()) => anyhow::anyhow!("a task of the server ended"),
                Err(error) => anyhow::Error::from(error).context("a task of the server panicked"),
            }),
        };
        tasks.shutdown().await;
        state.store.close().await;
        result
    }
}

/// Keeps a second server off the data: each would start the weavers of the other again, and count only its own
/// connections. The system gives the lock back when the process ends, however it does.
fn lock(data: &Path) -> Result<File> {
    let directory = File::open(data).with_context(|| format!("opening {}", data.display()))?;
    match directory.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            bail!("another server runs on {}; stop it, or choose another --data-dir", data.display())
        }
        // Not every network file system has locks.
        Err(TryLockError::Error(error)) => tracing::warn!("{} cannot be locked: {error}", data.display()),
    }
    Ok(directory)
}

/// Where people and agents reach the server.
fn public_url(config: &Config, address: SocketAddr) -> String {
    match (&config.public_url, &config.tls) {
        (Some(url), _) => url.clone(),
        (None, Some(_)) => format!("https://{address}"),
        (None, None) => format!("http://{address}"),
    }
}

/// Starts what runs weavers; `changes` gets each weaver that has changed there.
async fn start_backend(
    config: &Config,
    address: SocketAddr,
    metrics: &Metrics,
    changes: mpsc::Sender<WeaverId>,
) -> Result<Arc<dyn Provisioner>> {
    let provisioner: Arc<dyn Provisioner> = match &config.backend {
        Backend::Local(local) => {
            let tls = config.tls.as_ref();
            // A certificate is for the public name.
            let url = if tls.is_some() { public_url(config, address) } else { format!("http://{address}") };
            Arc::new(Local::start(local, url, tls, changes).await?)
        }
        Backend::Kubernetes(kubernetes) => {
            Arc::new(Kubernetes::start(kubernetes.clone(), &metrics.kubernetes_requests, changes).await?)
        }
    };
    for warning in provisioner.warnings() {
        tracing::warn!("{} backend: {warning}", provisioner.name());
    }
    Ok(provisioner)
}
