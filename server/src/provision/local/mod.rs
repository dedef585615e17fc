//! The local backend: each weaver is an isolated process tree on this machine. For development, on loopback.
//!
//! A weaver has a directory, and a supervisor process ([`supervisor`]) that outlives the server:
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

mod config;
mod namespaces;
mod rootfs;
pub mod supervisor;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use loom_api::{Secret, WeaverId};
use rustix::{
    fs::{FlockOperation, flock},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use tokio::{io::unix::AsyncFd, process::Command, sync::mpsc, time::timeout};

use super::{PodObservation, PodPhase, PodSpec, ProvisionError, Provisioner, ResolvedImage};
use crate::secrets::new_token;
pub use config::{Config, DEFAULT_IMAGE, Network, Settings};

/// How long a supervisor may take to end what it runs before it is killed.
const GRACE: Duration = Duration::from_secs(12);

/// What a supervisor runs: `spec.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LocalSpec {
    weaver: WeaverId,
    server_url: String,
    /// The user and group that the processes run as, when the server is root.
    uid: Option<u32>,
    isolated_network: bool,
    udp: bool,
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
    directory: PathBuf,
    server_url: String,
    agent: PathBuf,
    image: String,
    uid: Option<u32>,
    isolated_network: bool,
    udp: bool,
    warnings: Vec<String>,
    changes: mpsc::Sender<WeaverId>,
    watched: Arc<Mutex<HashMap<WeaverId, tokio::task::JoinHandle<()>>>>,
}

impl Local {
    /// Prepares the backend: finds out what this machine can isolate, and watches the weavers that already run.
    /// `changes` gets each weaver whose supervisor ends.
    ///
    /// # Errors
    ///
    /// When its directory cannot be made.
    pub async fn start(config: &Config, server_url: String, changes: mpsc::Sender<WeaverId>) -> Result<Self> {
        make_directory(&config.directory, 0o711)?;
        let uid = rustix::process::geteuid().is_root().then_some(config.uid);
        let mut warnings = namespaces::probe().await?;
        warnings.push("limits of CPU and memory are not enforced".to_owned());
        let isolated_network = config.network == Network::Isolated;
        if isolated_network {
            warnings.push("the weaver's processes have no network to the outside (local-network = \"host\" gives them the machine's)".to_owned());
        } else {
            warnings.push("the weaver's processes share this machine's network".to_owned());
        }
        let local = Self {
            directory: config.directory.clone(),
            server_url,
            agent: config.agent.clone(),
            image: config.image.clone(),
            uid,
            isolated_network,
            udp: config.agent_udp,
            warnings,
            changes,
            watched: Arc::default(),
        };
        for weaver in local.list().await? {
            local.watch(weaver)?;
        }
        Ok(local)
    }

    fn weaver_directory(&self, weaver: WeaverId) -> PathBuf {
        self.directory.join(weaver.uuid().to_string())
    }

    /// Makes the directory of a weaver. What is there already, after a crash in the middle, is made anew.
    fn prepare(&self, spec: &PodSpec) -> Result<PathBuf> {
        let directory = self.weaver_directory(spec.weaver);
        make_directory(&directory, 0o711)?;
        for (name, mode) in
            [("sidecar", 0o700), ("run", 0o700), ("workspace", 0o755), ("home", 0o755), ("bin", 0o755), ("root", 0o755)]
        {
            make_directory(&directory.join(name), mode)?;
            self.give_away(&directory.join(name))?;
        }
        let agent = directory.join("bin/loom-agent");
        let _ = fs::remove_file(&agent);
        // A link costs nothing, and stays what it is when the binary is replaced by an upgrade.
        if fs::hard_link(&self.agent, &agent).is_err() {
            fs::copy(&self.agent, &agent).context("copying the agent")?;
        }
        self.rotate_token(&directory)?;
        let local = LocalSpec {
            weaver: spec.weaver,
            server_url: self.server_url.clone(),
            uid: self.uid,
            isolated_network: self.isolated_network,
            udp: self.udp,
        };
        write_atomically(&directory.join("spec.json"), &serde_json::to_vec(&local)?, 0o644)?;
        Ok(directory)
    }

    /// Gives a file to the user that weavers run as.
    fn give_away(&self, path: &Path) -> Result<()> {
        if let Some(uid) = self.uid {
            std::os::unix::fs::lchown(path, Some(uid), Some(uid))
                .with_context(|| format!("giving {} away", path.display()))?;
        }
        Ok(())
    }

    fn rotate_token(&self, directory: &Path) -> Result<()> {
        let path = directory.join("sidecar/token");
        write_atomically(&path, new_token().expose().as_bytes(), 0o600)?;
        self.give_away(&path)
    }

    /// Starts the supervisor. It is in a session of its own and is not waited for: the server may end before it.
    async fn spawn(&self, directory: &Path) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(directory.join("pod.log"))?;
        // Ourselves, also when another version stands at our path by now.
        let mut child = Command::new("/proc/self/exe")
            .arg0("loom-server")
            .args(["local-pod", &directory.to_string_lossy()])
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting a supervisor")?;
        // The child goes on in a grandchild that has left our session, once that holds the lock.
        let status = child.wait().await?;
        if !status.success() {
            bail!("the supervisor did not start ({status}); {} says why", directory.join("pod.log").display());
        }
        Ok(())
    }

    /// Watches a supervisor that lives, unless it is watched already.
    fn watch(&self, weaver: WeaverId) -> Result<()> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.get(&weaver).is_some_and(|task| !task.is_finished()) {
            return Ok(());
        }
        let Some(supervisor) = Supervisor::find(&self.weaver_directory(weaver))? else { return Ok(()) };
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

    async fn end_supervisor(&self, directory: &Path) -> Result<()> {
        let Some(supervisor) = Supervisor::find(directory)? else { return Ok(()) };
        supervisor.signal(Signal::TERM);
        if timeout(GRACE, supervisor.ended()).await.is_err() {
            supervisor.signal(Signal::KILL);
            timeout(GRACE, supervisor.ended()).await.context("a killed supervisor did not end")??;
        }
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        for (_, task) in self.watched.lock().unwrap_or_else(PoisonError::into_inner).drain() {
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

    async fn resolve(&self, _image: &str) -> Result<Option<ResolvedImage>, ProvisionError> {
        Ok(None)
    }

    async fn ensure(&self, spec: &PodSpec) -> Result<(), ProvisionError> {
        let directory = self.weaver_directory(spec.weaver);
        if directory.join("status.json").exists() || Supervisor::find(&directory)?.is_some() {
            return Ok(self.watch(spec.weaver)?);
        }
        self.prepare(spec)?;
        self.spawn(&directory).await?;
        Ok(self.watch(spec.weaver)?)
    }

    async fn remove(&self, weaver: WeaverId) -> Result<bool, ProvisionError> {
        let directory = self.weaver_directory(weaver);
        self.end_supervisor(&directory).await?;
        if let Some(task) = self.watched.lock().unwrap_or_else(PoisonError::into_inner).remove(&weaver) {
            task.abort();
        }
        let removed = tokio::task::spawn_blocking(move || remove_tree(&directory)).await;
        removed.context("removing a directory")??;
        Ok(true)
    }

    async fn observe(&self, weaver: WeaverId) -> Result<Option<PodObservation>, ProvisionError> {
        let directory = self.weaver_directory(weaver);
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

    async fn list(&self) -> Result<Vec<WeaverId>, ProvisionError> {
        let entries = fs::read_dir(&self.directory).context("listing the weavers' directories")?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    async fn verify_credential(&self, weaver: WeaverId, credential: &Secret) -> Result<bool, ProvisionError> {
        let directory = self.weaver_directory(weaver);
        let expected = match fs::read_to_string(directory.join("sidecar/token")) {
            Ok(token) => Secret::from(token),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(anyhow::Error::from(error).context("reading a credential").into()),
        };
        if !bool::from(expected.expose().as_bytes().ct_eq(credential.expose().as_bytes())) {
            return Ok(false);
        }
        // The next one is there before this one has done its work: a sidecar that dies now finds it.
        self.rotate_token(&directory)?;
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

fn make_directory(path: &Path, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("making {}", path.display()))
        }
        // The mode again, because the process's mask took bits away, or it was there with another.
        _ => Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?),
    }
}

/// Writes a file so that whoever reads it sees the old content or the new one.
fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    drop(file);
    fs::rename(&temporary, path).with_context(|| format!("writing {}", path.display()))
}

/// Removes a directory and all in it, also directories that their owner has made read-only. Links are removed, not
/// followed.
fn remove_tree(directory: &Path) -> Result<()> {
    let again = |error: std::io::Error| -> Result<()> {
        if error.kind() == ErrorKind::NotFound {
            return Ok(());
        }
        let mut pending = vec![directory.to_owned()];
        while let Some(path) = pending.pop() {
            let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o700));
            let children = fs::read_dir(&path).into_iter().flatten().flatten();
            pending.extend(
                children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()),
            );
        }
        fs::remove_dir_all(directory).with_context(|| format!("removing {}", directory.display()))
    };
    fs::remove_dir_all(directory).or_else(again)
}

/// `loom-server local-init`: the stage that makes a weaver's namespaces; its exit code is the host's.
///
/// # Errors
///
/// When the weaver's root cannot be made.
pub fn init(probe: bool) -> Result<i32> {
    namespaces::init(probe)
}
