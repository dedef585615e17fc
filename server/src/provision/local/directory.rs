//! The weavers' directories: each is made whole or not at all, belongs to a user of its own, and is closed to all other
//! weavers.
//!
//! A directory is made under a temporary name and then renamed, with the supervisor's lock held from before it appears.
//! The lock passes from the server to the supervisor by inheritance, so wherever the server dies, a directory whose
//! lock is free and that has no status belongs to a weaver that never ran, and is made anew.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{ErrorKind, Read as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, lchown},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use loom_api::{Secret, WeaverId};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, OFlags, flock};

use super::LocalSpec;
use crate::{
    durable::{write_atomically, write_atomically_for},
    fault,
    secrets::new_token,
};

/// How many users there are for weavers when the server is root, from `local-uid` on.
const UIDS: u32 = 4096;
/// Users that exist on every machine: `nobody`, and what 16-bit programs take for "no user".
const RESERVED_UIDS: [u32; 2] = [65_534, 65_535];
/// What belongs to the weaver's user.
const WEAVER_OWNED: [(&str, u32); 4] = [("sidecar", 0o700), ("run", 0o700), ("workspace", 0o755), ("home", 0o755)];
/// The length of a credential that is read back, at most.
const MAX_TOKEN: u64 = 256;

/// The directories of all weavers of this machine.
pub(super) struct Directories {
    base: PathBuf,
    agent: PathBuf,
    /// The first user for weavers, when the server is root. Otherwise all run as the server's.
    first_uid: Option<u32>,
    /// The user that was given last. Locked until the directory that it is for can be seen by the next search.
    last_uid: Mutex<Option<u32>>,
}

/// A new directory, for a supervisor to be started in.
pub(super) struct New {
    pub(super) directory: PathBuf,
    /// Held, for the supervisor.
    pub(super) lock: File,
}

impl Directories {
    /// Opens the directory of all weavers, and clears away what a crash left unfinished.
    pub(super) fn open(base: PathBuf, agent: PathBuf, first_uid: Option<u32>) -> Result<Self> {
        make_directory(&base, 0o711)?;
        for entry in fs::read_dir(&base).context("listing the weavers' directories")?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with('.')) {
                remove_tree(&entry.path())?;
            }
        }
        Ok(Self { base, agent, first_uid, last_uid: Mutex::default() })
    }

    /// Where a weaver's directory is, or would be.
    pub(super) fn path(&self, weaver: WeaverId) -> PathBuf {
        self.base.join(weaver.uuid().to_string())
    }

    fn unfinished(&self, weaver: WeaverId) -> PathBuf {
        self.base.join(format!(".{}", weaver.uuid()))
    }

    /// The weavers that have one.
    pub(super) fn list(&self) -> Result<Vec<WeaverId>> {
        let entries = fs::read_dir(&self.base).context("listing the weavers' directories")?;
        Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
    }

    /// Makes a weaver's directory in place of one in which no supervisor ever ran. `spec` gets the weaver's user.
    pub(super) fn make(&self, weaver: WeaverId, spec: impl FnOnce(Option<u32>) -> LocalSpec) -> Result<New> {
        let (directory, unfinished) = (self.path(weaver), self.unfinished(weaver));
        remove_tree(&directory)?;
        remove_tree(&unfinished)?;
        let mut last_uid = self.last_uid.lock();
        let uid = self.free_uid(&mut last_uid)?;
        make_directory(&unfinished, 0o700)?;
        for (name, mode) in WEAVER_OWNED {
            make_directory(&unfinished.join(name), mode)?;
            if uid.is_some() {
                lchown(unfinished.join(name), uid, uid).with_context(|| format!("giving {name} away"))?;
            }
        }
        for name in ["bin", "root"] {
            make_directory(&unfinished.join(name), 0o755)?;
        }
        let agent = unfinished.join("bin/loom-agent");
        // A link costs nothing, and stays what it is when the binary is replaced by an upgrade.
        if fs::hard_link(&self.agent, &agent).is_err() {
            fs::copy(&self.agent, &agent).context("copying the agent")?;
        }
        write_token(&unfinished, uid)?;
        write_atomically(&unfinished.join("spec.json"), &serde_json::to_vec(&spec(uid))?, 0o600)?;
        let lock = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(unfinished.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).context("locking a new directory")?;
        if uid.is_some() {
            // The weaver's user may pass through, by its group; others may not.
            chown(&unfinished, None, uid)?;
            fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o710))?;
        }
        fault::point("directory-prepared");
        fs::rename(&unfinished, &directory).with_context(|| format!("making {}", directory.display()))?;
        drop(last_uid);
        fault::point("directory-made");
        Ok(New { directory, lock })
    }

    /// A user that no weaver has. Those that were given lately come last, so that no process of a weaver that has just
    /// been killed shares its user with a new one.
    fn free_uid(&self, last: &mut Option<u32>) -> Result<Option<u32>> {
        let Some(first) = self.first_uid else { return Ok(None) };
        let mut taken: HashSet<u32> = RESERVED_UIDS.into();
        for weaver in self.list()? {
            match fs::metadata(self.path(weaver).join("run")) {
                Ok(metadata) => drop(taken.insert(metadata.uid())),
                Err(error) if error.kind() == ErrorKind::NotFound => {} // removed meanwhile, or never whole
                Err(error) => return Err(error).context("finding out which users are taken"),
            }
        }
        let end = first.saturating_add(UIDS);
        let start = last.map_or(first, |last| last + 1);
        let uid = (start..end).chain(first..start.min(end)).find(|uid| !taken.contains(uid));
        ensure!(uid.is_some(), "each of the {UIDS} users from {first} on (local-uid) has a weaver");
        *last = uid;
        Ok(uid)
    }

    /// Removes what there is of a weaver.
    pub(super) fn remove(&self, weaver: WeaverId) -> Result<()> {
        remove_tree(&self.path(weaver))?;
        remove_tree(&self.unfinished(weaver))
    }

    /// The credential of a weaver's sidecar, if there is one.
    pub(super) fn token(&self, weaver: WeaverId) -> Result<Option<Secret>> {
        // The directory belongs to the sidecar's user, which must not lead us elsewhere or have us wait.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let path = self.path(weaver).join("sidecar/token");
        let file = match fs::OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("opening a credential"),
        };
        ensure!(file.metadata()?.is_file(), "a weaver's credential is not a file");
        let mut token = String::new();
        file.take(MAX_TOKEN).read_to_string(&mut token).context("reading a credential")?;
        Ok(Some(Secret::from(token)))
    }

    /// Replaces it.
    pub(super) fn rotate_token(&self, weaver: WeaverId) -> Result<()> {
        let directory = self.path(weaver);
        let uid = self.first_uid.map(|_| fs::metadata(directory.join("run")).map(|run| run.uid())).transpose()?;
        write_token(&directory, uid)
    }
}

fn write_token(directory: &Path, uid: Option<u32>) -> Result<()> {
    let path = directory.join("sidecar/token");
    write_atomically_for(uid, &path, new_token().expose().as_bytes(), 0o600)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn directories(base: &Path) -> Directories {
        Directories::open(base.join("weavers"), std::env::current_exe().unwrap(), Some(70_000)).unwrap()
    }

    fn make(directories: &Directories, weaver: WeaverId) -> Option<u32> {
        let mut given = None;
        let spec = |uid| {
            given = uid;
            LocalSpec {
                weaver,
                server_url: String::new(),
                server_authorities: None,
                uid,
                isolated_network: true,
                udp: false,
                repositories: Vec::new(),
            }
        };
        directories.make(weaver, spec).unwrap();
        given
    }

    #[test]
    fn each_weaver_has_a_user_of_its_own_also_after_a_restart() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can give directories away
        }
        let base = tempfile::tempdir().unwrap();
        let [first, second, third] = [(); 3].map(|()| WeaverId::generate());
        let before = directories(base.path());
        assert_eq!(make(&before, first), Some(70_000));
        assert_eq!(make(&before, second), Some(70_001));
        let restarted = directories(base.path());
        assert_eq!(make(&restarted, third), Some(70_002));
        // One that is free again is given only when the others were.
        restarted.remove(first).unwrap();
        assert_eq!(make(&restarted, first), Some(70_003));
        let mut last = Some(70_000 + UIDS - 1);
        assert_eq!(restarted.free_uid(&mut last).unwrap(), Some(70_000));

        let mode = fs::metadata(restarted.path(second)).unwrap();
        assert_eq!((mode.mode() & 0o777, mode.uid(), mode.gid()), (0o710, 0, 70_001));
    }

    #[test]
    fn what_a_crash_left_unfinished_is_cleared_away() {
        let base = tempfile::tempdir().unwrap();
        let left = base.path().join("weavers").join(format!(".{}", WeaverId::generate().uuid()));
        fs::create_dir_all(left.join("run")).unwrap();
        assert!(directories(base.path()).list().unwrap().is_empty());
        assert!(!left.exists());
    }

    #[test]
    fn a_credential_that_is_a_link_is_not_read() {
        let base = tempfile::tempdir().unwrap();
        let directories = directories(base.path());
        let (weaver, target) = (WeaverId::generate(), base.path().join("target"));
        fs::create_dir_all(directories.path(weaver).join("sidecar")).unwrap();
        assert!(directories.token(weaver).unwrap().is_none());
        fs::write(&target, "someone else's").unwrap();
        std::os::unix::fs::symlink(&target, directories.path(weaver).join("sidecar/token")).unwrap();
        assert!(directories.token(weaver).is_err());
    }
}
