//! The local backend: each weaver is an isolated process tree on this machine. For development, on loopback.
//!
//! A weaver has a directory ([`directory`]), and a supervisor process ([`supervisor`]) that outlives the server:
//!
//! ```text
//! weavers/<uuid>/
//!   spec.json     what the supervisor is to run           lock         held by the supervisor while it lives; its pid
//!   status.json   how far it is, and how it ended         pod.log      what supervisor, sidecar and host say
//!   sidecar/token the sidecar's one-time credential       run/         host.sock, shared by sidecar and host
//!   workspace/    home/                                   bin/         the agent
//!   root/         where the weaver's root is mounted, in its own mount namespace only
//! ```
//!
//! The supervisor starts the sidecar in the machine's namespaces, and the host in namespaces of the weaver's own
//! ([`namespaces`]) over a root file system of read-only system directories ([`rootfs`]). A server that comes back
//! finds a supervisor by its lock, and watches it through a pidfd.
//!
//! When the server is root, each weaver runs as a user of its own, who cannot pass into another weaver's directory.

mod config;
mod directory;
mod namespaces;
mod rootfs;
pub mod supervisor;
#[cfg(test)]
mod tests;
mod trust;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{ErrorKind, Read as _},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use async_trait::async_trait;
use loom_api::{Secret, WeaverId};
use parking_lot::Mutex;
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use tokio::{io::unix::AsyncFd, process::Command, sync::mpsc, time::timeout};

use self::directory::{Directories, New};
use super::{PodInfo, PodObservation, PodPhase, PodSpec, ProvisionError, Provisioner, ResolvedImage};
use crate::{fault, listener::tls};
pub use config::{Config, DEFAULT_IMAGE, Network, Settings};
pub use trust::say_doubt;

/// How long a supervisor may take to end what it runs before it is killed.
const GRACE_PERIOD: Duration = Duration::from_secs(12);

/// What a supervisor runs: `spec.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LocalSpec {
    weaver: WeaverId,
    server_url: String,
    /// The authorities that the sidecar trusts for it, in PEM.
    #[serde(default)]
    server_authorities: Option<String>,
    /// The user and group that the processes run as, and no other weaver's, when the server is root.
    uid: Option<u32>,
    isolated_network: bool,
    udp: bool,
    /// Directories that the sidecar may clone from.
    #[serde(default)]
    repositories: Vec<PathBuf>,
}

/// How far a supervisor is: `status.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
enum LocalStatus {
    /// The host runs.
    Running,
    /// The host has ended.
    Exited { code: i32 },
    /// It could not be started.
    Failed { reason: String },
}

/// The local backend.
pub struct Local {
    directories: Arc<Directories>,
    server_url: String,
    server_authorities: Option<String>,
    image: String,
    isolated_network: bool,
    udp: bool,
    repositories: Vec<PathBuf>,
    warnings: Vec<String>,
    changes: mpsc::Sender<WeaverId>,
    /// What was last seen of each weaver that has a directory.
    phases: Mutex<HashMap<WeaverId, PodPhase>>,
    watched: Arc<Mutex<HashMap<WeaverId, tokio::task::JoinHandle<()>>>>,
}

impl Local {
    /// Prepares the backend: finds out what this machine can isolate, and watches the weavers that already run.
    /// `tls` are the files by which the server serves HTTPS at `server_url`; `changes` gets each weaver whose supervisor
    /// ends.
    ///
    /// # Errors
    ///
    /// When its directory cannot be made, or a certificate not be read.
    pub async fn start(
        config: &Config,
        server_url: String,
        tls: Option<&tls::Config>,
        changes: mpsc::Sender<WeaverId>,
    ) -> Result<Self> {
        let first_uid = rustix::process::geteuid().is_root().then_some(config.uid);
        let directories = Directories::open(config.directory.clone(), config.agent.clone(), first_uid)?;
        let mut warnings = namespaces::probe().await?;
        warnings.push("limits of CPU and memory are not enforced".to_owned());
        let isolated_network = config.network == Network::Isolated;
        if isolated_network {
            warnings.push("the weaver's processes have no network to the outside (local-network = \"host\" gives them the machine's)".to_owned());
        } else {
            warnings.push("the weaver's processes share this machine's network".to_owned());
        }
        let chain = tls.map(|files| files.certificate.as_path());
        let server_authorities = trust::authorities(config.agent_ca.as_deref(), chain)?;
        if let (Some(chain), Some(authorities)) = (chain, &server_authorities) {
            warnings.extend(trust::doubt(&server_url, chain, authorities).await?);
        }
        let local = Self {
            directories: Arc::new(directories),
            server_url,
            server_authorities,
            image: config.image.clone(),
            isolated_network,
            udp: config.agent_udp,
            repositories: config.repositories.clone(),
            warnings,
            changes,
            phases: Mutex::default(),
            watched: Arc::default(),
        };
        for weaver in local.directories.list()? {
            // The reconciler looks at each of them, too.
            if let Err(error) = local.watch(weaver) {
                tracing::warn!(%weaver, "not watched yet: {error:#}");
            }
        }
        Ok(local)
    }

    /// What a weaver's supervisor is to run, as this user.
    fn spec(&self, weaver: WeaverId, uid: Option<u32>) -> LocalSpec {
        LocalSpec {
            weaver,
            server_url: self.server_url.clone(),
            server_authorities: self.server_authorities.clone(),
            uid,
            isolated_network: self.isolated_network,
            udp: self.udp,
            repositories: self.repositories.clone(),
        }
    }

    /// Starts the supervisor. It is in a session of its own and is not waited for: the server may end before it.
    async fn spawn(&self, New { directory, lock }: New) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("pod.log"))?;
        // Ourselves, also when another version stands at our path by now.
        let mut child = Command::new("/proc/self/exe")
            .arg0("loom-server")
            .args(["local-pod", &directory.to_string_lossy()])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(lock)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting a supervisor")?;
        fault::point("supervisor-started");
        // The child goes on in a grandchild that has left our session, once the lock file names that.
        let status = child.wait().await?;
        if !status.success() {
            bail!("the supervisor did not start ({status}); {} says why", directory.join("pod.log").display());
        }
        Ok(())
    }

    /// Watches a supervisor that lives, unless it is watched already.
    fn watch(&self, weaver: WeaverId) -> Result<()> {
        let mut watched = self.watched.lock();
        if watched.get(&weaver).is_some_and(|task| !task.is_finished()) {
            return Ok(());
        }
        let Some(supervisor) = Supervisor::find(&self.directories.path(weaver))? else { return Ok(()) };
        let changes = self.changes.clone();
        let task = tokio::spawn(async move {
            if supervisor.ended().await.is_ok() {
                // The reconciler is gone when the server ends.
                let _ = changes.send(weaver).await;
            }
        });
        watched.insert(weaver, task);
        Ok(())
    }

    /// Looks at a weaver's supervisor and at what it wrote.
    fn look(&self, weaver: WeaverId) -> Result<Option<PodObservation>> {
        let directory = self.directories.path(weaver);
        if !directory.exists() {
            return Ok(None);
        }
        let alive = Supervisor::find(&directory)?.is_some();
        let status = read_status(&directory)?;
        let (phase, reason, exit_code) = match status {
            Some(LocalStatus::Exited { code }) if code == 0 => (PodPhase::Succeeded, None, Some(code)),
            Some(LocalStatus::Exited { code }) => (PodPhase::Failed, None, Some(code)),
            Some(LocalStatus::Failed { reason }) => (PodPhase::Failed, Some(reason), None),
            Some(LocalStatus::Running) if alive => (PodPhase::Running, None, None),
            Some(LocalStatus::Running) => {
                (PodPhase::Failed, Some("its processes were killed from outside of Loom".to_owned()), None)
            }
            None if alive => (PodPhase::Pending, None, None),
            // A crash came between making the directory and starting the supervisor: as if it were not there.
            None => return Ok(None),
        };
        Ok(Some(PodObservation { weaver, phase, reason, exit_code, is_leaving: false }))
    }

    async fn end_supervisor(&self, directory: &Path) -> Result<()> {
        let Some(supervisor) = Supervisor::find(directory)? else { return Ok(()) };
        supervisor.signal(Signal::TERM);
        if timeout(GRACE_PERIOD, supervisor.ended()).await.is_err() {
            supervisor.signal(Signal::KILL);
            timeout(GRACE_PERIOD, supervisor.ended()).await.context("a killed supervisor did not end")??;
        }
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        for (_, task) in self.watched.lock().drain() {
            task.abort();
        }
    }
}

#[async_trait]
impl Provisioner for Local {
    fn name(&self) -> &'static str {
        "local"
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn accepts(&self, image: &str) -> Result<(), String> {
        if image == self.image {
            return Ok(());
        }
        Err(format!("the local backend has no image {image}: weavers see this machine's own system"))
    }

    fn accepts_file(&self, path: &Path) -> Result<(), String> {
        // The same words for what is not there, so that nobody looks around on the machine in this way.
        path.canonicalize()
            .ok()
            .filter(|found| self.repositories.iter().any(|directory| found.starts_with(directory)))
            .map(drop)
            .ok_or_else(|| format!("this server offers no repository {} to weavers", path.display()))
    }

    async fn resolve(&self, _image: &str) -> Result<Option<ResolvedImage>, ProvisionError> {
        Ok(None)
    }

    async fn ensure(&self, spec: &PodSpec) -> Result<(), ProvisionError> {
        let directory = self.directories.path(spec.weaver);
        if directory.join("status.json").exists() || Supervisor::find(&directory)?.is_some() {
            return Ok(self.watch(spec.weaver)?);
        }
        let new = self.directories.make(spec.weaver, |uid| self.spec(spec.weaver, uid))?;
        self.spawn(new).await?;
        self.phases.lock().insert(spec.weaver, PodPhase::Pending);
        Ok(self.watch(spec.weaver)?)
    }

    async fn remove(&self, weaver: WeaverId) -> Result<bool, ProvisionError> {
        let directory = self.directories.path(weaver);
        self.end_supervisor(&directory).await?;
        if let Some(task) = self.watched.lock().remove(&weaver) {
            task.abort();
        }
        let directories = Arc::clone(&self.directories);
        let removed = tokio::task::spawn_blocking(move || directories.remove(weaver)).await;
        removed.context("removing a directory")??;
        self.phases.lock().remove(&weaver);
        Ok(true)
    }

    async fn observe(&self, weaver: WeaverId) -> Result<Option<PodObservation>, ProvisionError> {
        let seen = self.look(weaver)?;
        let mut phases = self.phases.lock();
        match &seen {
            Some(seen) => phases.insert(weaver, seen.phase),
            None => phases.remove(&weaver),
        };
        Ok(seen)
    }

    fn pod(&self, weaver: WeaverId) -> Option<PodInfo> {
        let mut phases = self.phases.lock();
        let phase = phases.get_mut(&weaver)?;
        // Nobody tells that the processes have been started. Their end is told, and then the reconciler looks.
        if *phase == PodPhase::Pending
            && let Ok(seen) = self.look(weaver)
        {
            *phase = seen?.phase;
        }
        Some(PodInfo { phase: Some(format!("{phase:?}")), ..PodInfo::default() })
    }

    async fn list(&self) -> Result<Vec<WeaverId>, ProvisionError> {
        Ok(self.directories.list()?)
    }

    async fn verify_credential(&self, weaver: WeaverId, credential: &Secret) -> Result<bool, ProvisionError> {
        let Some(expected) = self.directories.token(weaver)? else { return Ok(false) };
        if !bool::from(expected.expose().as_bytes().ct_eq(credential.expose().as_bytes())) {
            return Ok(false);
        }
        // The next one is there before this one has done its work: a sidecar that dies now finds it.
        self.directories.rotate_token(weaver)?;
        Ok(true)
    }
}

/// A supervisor that lives.
struct Supervisor {
    pidfd: AsyncFd<OwnedFd>,
}

impl Supervisor {
    /// The supervisor of a weaver's directory. Who holds the lock is alive and has its pid in the file; when the lock
    /// is still held after the pidfd was opened, the pidfd is its.
    fn find(directory: &Path) -> Result<Option<Self>> {
        let mut lock = match File::open(directory.join("lock")) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("opening a supervisor's lock"),
        };
        let held = |lock: &File| match flock(lock, FlockOperation::NonBlockingLockShared) {
            Ok(()) => flock(lock, FlockOperation::Unlock).map(|()| false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error),
        };
        if !held(&lock)? {
            return Ok(None);
        }
        let mut text = String::new();
        lock.read_to_string(&mut text)?;
        // A server that has died since may have started it an instant ago.
        ensure!(!text.is_empty(), "its supervisor is being started");
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::NONBLOCK) else { return Ok(None) };
        Ok(if held(&lock)? { Some(Self { pidfd: namespaces::register(pidfd)? }) } else { None })
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(self.pidfd.get_ref(), signal);
    }

    async fn ended(&self) -> Result<()> {
        // A pidfd is readable once its process has ended (pidfd_open(2)).
        self.pidfd.readable().await?.retain_ready();
        Ok(())
    }
}

fn read_status(directory: &Path) -> Result<Option<LocalStatus>> {
    match fs::read(directory.join("status.json")) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text).context("a supervisor's status")?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("reading a supervisor's status"),
    }
}

/// `loom-server local-init`: the stage that makes a weaver's namespaces; its exit code is the host's.
///
/// # Errors
///
/// When the weaver's root cannot be made.
pub fn init(probe: bool) -> Result<i32> {
    namespaces::init(probe)
}
