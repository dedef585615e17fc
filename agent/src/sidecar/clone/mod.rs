//! Clones the weaver's repository into the workspace, without `git`.
//!
//! The clone is made in a temporary directory and renamed when it is complete. A restarted sidecar therefore leaves a
//! complete clone alone, whatever the user has changed since, and removes what its predecessor left incomplete.
//!
//! `file://` repositories, on a developer's own machine, are read by `git upload-pack`. It would refuse a repository
//! that belongs to another user than the sidecar, so it is told to allow that.

use std::{
    error::Error as _,
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use gix::protocol::transport::{
    Protocol,
    client::git::{ConnectMode, blocking_io::Connection},
};
use parking_lot::Mutex;

/// What to clone, and where.
#[derive(Debug, Clone)]
pub(crate) struct Repository {
    pub(crate) url: String,
    /// The branch; by default the repository's.
    pub(crate) branch: Option<String>,
    pub(crate) workspace: PathBuf,
    /// Directories that `file://` repositories may be in.
    pub(crate) file_repositories: Vec<PathBuf>,
}

/// Why a clone failed, for the user to read.
#[derive(Debug, thiserror::Error)]
#[error("the clone failed: {0}")]
pub(crate) struct CloneError(String);

/// The directory that a repository is cloned into: its name without `.git`; `None` when the URL has none.
pub(crate) fn directory_name(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    let path = rest.split(['?', '#']).next()?.trim_end_matches('/');
    let (_, last) = path.rsplit_once('/')?;
    let name = last.strip_suffix(".git").unwrap_or(last);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+@~".contains(&byte);
    (!name.is_empty() && !name.starts_with(['.', '-']) && name.len() <= 128 && name.bytes().all(plain)).then_some(name)
}

impl Repository {
    /// The directory of the clone.
    ///
    /// # Errors
    ///
    /// When the URL names no repository, or its scheme is not allowed here.
    pub(crate) fn destination(&self) -> Result<PathBuf, CloneError> {
        let scheme = self.url.split_once("://").map(|(scheme, _)| scheme);
        match scheme {
            Some("https" | "http" | "git") => {}
            Some("file") if !self.file_repositories.is_empty() => {}
            Some("file") => return Err(CloneError("file:// repositories are for local weavers only".to_owned())),
            _ => return Err(CloneError(format!("{} is not an https:// URL", without_credentials(&self.url)))),
        }
        let name = directory_name(&self.url)
            .ok_or_else(|| CloneError(format!("{} does not name a repository", without_credentials(&self.url))))?;
        Ok(self.workspace.join(name))
    }

    /// Makes the clone. Dropping the future stops it at the next opportunity.
    pub(crate) async fn run(self) -> Result<(), CloneError> {
        let interrupt = Interrupt(Arc::new(AtomicBool::new(false)));
        let flag = Arc::clone(&interrupt.0);
        let done = tokio::task::spawn_blocking(move || self.run_blocking(&flag)).await;
        drop(interrupt);
        done.unwrap_or_else(|_| Err(CloneError("it ended unexpectedly".to_owned())))
    }

    fn run_blocking(&self, interrupt: &AtomicBool) -> Result<(), CloneError> {
        let destination = self.destination()?;
        let name = destination.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let temporary = self.workspace.join(format!(".{name}.cloning"));
        let on_disk = |error: io::Error| CloneError(format!("the workspace cannot be written: {error}"));
        match fs::remove_dir_all(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(on_disk(error)),
            _ => {}
        }
        let cloned = self.fetch_and_check_out(&temporary, interrupt);
        if let Err(error) = cloned {
            // If this fails, the next attempt removes it.
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
        fs::rename(&temporary, &destination).map_err(on_disk)
    }

    fn fetch_and_check_out(&self, into: &Path, interrupt: &AtomicBool) -> Result<(), CloneError> {
        let failed = |error: gix::Error| self.explain(&error);
        let local = self.local_path()?;
        // The library makes paths absolute, but the weaver's user may have no access to the parent directories.
        let into = Path::new("/proc/self/cwd").join(into);
        let uploader = Uploader::default();
        let guard = uploader.clone();
        let mut prepared = gix::clone::PrepareFetch::new(
            self.url.as_str(),
            &into,
            gix::create::Kind::WithWorktree,
            gix::create::Options::default(),
            gix::open::Options::isolated().with(gix::sec::Trust::Full),
        )
        .map_err(failed)?
        .configure_connection(move |connection| {
            // There is nobody to ask for a password.
            connection.set_credentials(|_| Ok(None));
            if let Some(path) = &local {
                *connection.transport_mut() = Box::new(uploader.start(path)?);
            }
            Ok(())
        })
        .with_ref_name(self.branch.as_deref())
        .map_err(|_| {
            CloneError(format!("{:?} is not a valid branch name", self.branch.as_deref().unwrap_or_default()))
        })?;
        let fetched = prepared.fetch_then_checkout(gix::progress::Discard, interrupt);
        guard.end();
        let (mut checkout, _) = fetched.map_err(failed)?;
        checkout.main_worktree(gix::progress::Discard, interrupt).map_err(failed)?;
        if interrupt.load(Ordering::Relaxed) {
            return Err(CloneError("it was interrupted".to_owned()));
        }
        Ok(())
    }

    /// The path of a `file://` repository, which must exist in one of the offered directories.
    fn local_path(&self) -> Result<Option<PathBuf>, CloneError> {
        let Some(path) = self.url.strip_prefix("file://") else { return Ok(None) };
        match Path::new(path).canonicalize() {
            Ok(found) if !self.file_repositories.iter().any(|directory| found.starts_with(directory)) => {
                Err(CloneError(format!("the repository {} is not one that the server offers", self.url)))
            }
            Ok(found) if found.is_dir() => Ok(Some(found)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(CloneError(format!("the repository {} cannot be read by the weaver's user", self.url)))
            }
            _ => Err(CloneError(format!("the repository {} does not exist", self.url))),
        }
    }

    /// Turns the library's error into one for the user.
    fn explain(&self, error: &gix::Error) -> CloneError {
        let mut words = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            let inner_words = inner.to_string();
            if !words.contains(&inner_words) {
                words = format!("{words}: {inner_words}");
            }
            source = inner.source();
        }
        let words = words.replace('\n', " ");
        let url = without_credentials(&self.url);
        let has = |needles: &[&str]| needles.iter().any(|needle| words.contains(needle));
        if let Some(branch) = &self.branch
            && has(&["have any ref that matched", "Unmapped"])
        {
            return CloneError(format!("the repository {url} has no branch {branch}"));
        }
        if has(&["401", "Credentials", "credentials", "uthentication", "denied access", "403"]) {
            return CloneError(format!("{url} asks for authentication: it is private, or does not exist"));
        }
        if has(&["404", "not found on the server"]) {
            return CloneError(format!("the repository {url} does not exist"));
        }
        let short: String = words.chars().take(400).collect();
        CloneError(format!("{url}: {short}"))
    }
}

/// The URL without user name and password.
fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}/{path}")
}

/// Stops the clone when it is dropped.
struct Interrupt(Arc<AtomicBool>);

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The `git upload-pack` of a local repository, ended with the clone.
#[derive(Default, Clone)]
struct Uploader(Arc<Mutex<Option<Child>>>);

type Pipe = Connection<std::process::ChildStdout, std::process::ChildStdin>;

impl Uploader {
    fn start(&self, path: &Path) -> gix::Result<Pipe> {
        let failed = gix::Error::from_error;
        let mut child = Command::new("git")
            .arg("upload-pack")
            .arg("--strict")
            .arg(repository(path))
            .env("GIT_PROTOCOL", "version=2")
            // The user chose the repository, so it does not matter who owns it.
            .env("GIT_CONFIG_COUNT", "1")
            .env("GIT_CONFIG_KEY_0", "safe.directory")
            .env("GIT_CONFIG_VALUE_0", "*")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        self.0.lock().replace(child);
        let (stdin, stdout) = (stdin.expect("piped above"), stdout.expect("piped above"));
        let path = path.to_string_lossy().into_owned();
        Ok(Connection::new(stdout, stdin, Protocol::V2, path, None::<(String, _)>, ConnectMode::Process, false))
    }

    fn end(&self) {
        if let Some(mut child) = self.0.lock().take() {
            // After a successful clone it has exited already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.end();
    }
}

/// The `.git` directory if there is one: `--strict` accepts nothing else.
fn repository(path: &Path) -> PathBuf {
    let inside = path.join(".git");
    if inside.exists() { inside } else { path.to_owned() }
}

#[cfg(test)]
mod tests;
