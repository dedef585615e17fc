//! What `loom login` stores for each server, in a file that only its user can read: the token, and the CA certificates
//! given with `--ca`.
//!
//! The certificates themselves are stored, not the path of their file: the file could be moved or changed by somebody
//! else, and the daemon has another working directory.
//!
//! `credentials.toml` is replaced by a rename, so that a crash leaves either the old or the new one. A file that others
//! can read is refused, not repaired: its tokens must be considered leaked.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use loom_api::Secret;
use serde::{Deserialize, Serialize};

use crate::error::{CliError, Result};

const FILE: &str = "credentials.toml";
/// Far more than the entries of all servers need.
const MAX_BYTES: u64 = 1 << 20;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Credentials {
    /// The server of the last login.
    #[serde(skip_serializing_if = "Option::is_none")]
    default_server: Option<String>,
    /// By the server's URL.
    servers: BTreeMap<String, Server>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Server {
    /// None after a logout.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<Secret>,
    /// CA certificates in PEM, trusted besides the system's.
    #[serde(skip_serializing_if = "String::is_empty")]
    authorities: String,
}

impl Credentials {
    /// Reads the file in `directory`; empty if there is none.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or parsed, belongs to another user, or others can read it.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let shown = path.display();
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(CliError::failure(format!("cannot read {shown}: {error}"))),
        };
        if metadata.mode() & 0o077 != 0 {
            return Err(CliError::failure(format!("cannot use {shown}: other users can read it"))
                .hint(format!("run: chmod 600 {shown} (and log in again if other people use this machine)")));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(CliError::failure(format!("cannot use {shown}: it belongs to another user"))
                .hint("remove it, and log in again with: loom login"));
        }
        if metadata.len() > MAX_BYTES {
            return Err(CliError::failure(format!("cannot use {shown}: it is too large")));
        }
        let text =
            fs::read_to_string(&path).map_err(|error| CliError::failure(format!("cannot read {shown}: {error}")))?;
        // The parser's message would quote the line, which may contain a token.
        toml::from_str(&text).map_err(|_| {
            CliError::failure(format!("cannot use {shown}: it is damaged"))
                .hint("remove it, and log in again with: loom login")
        })
    }

    /// The server of the last login.
    pub(crate) fn default_server(&self) -> Option<&str> {
        self.default_server.as_deref()
    }

    pub(crate) fn token(&self, url: &str) -> Option<Secret> {
        self.servers.get(url)?.token.clone()
    }

    /// The CA certificates (PEM) that the user trusts for the server at `url`, besides the system's.
    pub(crate) fn authorities(&self, url: &str) -> &str {
        self.servers.get(url).map_or("", |server| &server.authorities)
    }

    /// Replaces the CA certificates (PEM) that are trusted for the server at `url`.
    pub(crate) fn trust(&mut self, url: &str, authorities: &str) {
        authorities.clone_into(&mut self.servers.entry(url.to_owned()).or_default().authorities);
    }

    /// Stores a token, and makes its server the default.
    pub(crate) fn remember(&mut self, url: &str, token: Secret) {
        self.servers.entry(url.to_owned()).or_default().token = Some(token);
        self.default_server = Some(url.to_owned());
    }

    /// Removes a server's token. The server stays the default and its CA certificates trusted, so that a bare `loom login`
    /// is enough to come back.
    pub(crate) fn forget(&mut self, url: &str) {
        if let Some(server) = self.servers.get_mut(url) {
            server.token = None;
        }
        self.servers.retain(|_, server| server.token.is_some() || !server.authorities.is_empty());
    }

    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(FILE);
        let text = zeroize::Zeroizing::new(
            toml::to_string(self)
                .map_err(|error| CliError::failure(format!("cannot write {}: {error}", path.display())))?,
        );
        write_private(directory, &path, text.as_bytes())
            .map_err(|error| CliError::failure(format!("cannot write {}: {error}", path.display())))
    }
}

fn write_private(directory: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let temporary: PathBuf = directory.join(format!(".{FILE}.{}", std::process::id()));
    // Left by a killed process that had the same process id.
    let _ = fs::remove_file(&temporary);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn kept(directory: &Path) -> PathBuf {
        let mut credentials = Credentials::default();
        credentials.remember("https://a.example", "token-a".to_owned().into());
        credentials.remember("https://b.example", "token-b".to_owned().into());
        credentials.write(directory).expect("written");
        directory.join(FILE)
    }

    #[test]
    fn each_server_has_its_token_and_the_last_is_the_default() {
        let base = tempfile::tempdir().expect("a directory");
        let directory = base.path().join("new/loom");
        let path = kept(&directory);
        assert_eq!(fs::metadata(&directory).expect("there").mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        let mut read = Credentials::read(&directory).expect("readable");
        assert_eq!(read.token("https://a.example").expect("kept").expose(), "token-a");
        assert_eq!(read.default_server(), Some("https://b.example"));
        read.forget("https://b.example");
        read.write(&directory).expect("written");
        let read = Credentials::read(&directory).expect("readable");
        assert!(read.token("https://b.example").is_none() && read.token("https://a.example").is_some());
        assert_eq!(fs::read_dir(&directory).expect("there").count(), 1, "no temporary file is left");
    }

    #[test]
    fn authorities_outlive_a_logout_and_a_new_login() {
        let mut credentials = Credentials::default();
        credentials.remember("https://a.example", "token-a".to_owned().into());
        assert_eq!(credentials.authorities("https://a.example"), "");
        credentials.trust("https://a.example", "PEM");
        credentials.forget("https://a.example");
        assert!(credentials.token("https://a.example").is_none());
        credentials.remember("https://a.example", "token-b".to_owned().into());
        assert_eq!(credentials.authorities("https://a.example"), "PEM");
        assert_eq!(credentials.authorities("https://b.example"), "");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_fix() {
        let base = tempfile::tempdir().expect("a directory");
        let path = kept(base.path());
        for mode in [0o640, 0o604, 0o644] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("changed");
            let error = Credentials::read(base.path()).expect_err("refused").lines(false);
            assert!(error.contains(&format!("chmod 600 {}", path.display())), "{error}");
        }
    }

    #[test]
    fn a_damaged_file_is_an_error_that_shows_no_token() {
        let base = tempfile::tempdir().expect("a directory");
        let path = kept(base.path());
        fs::write(&path, "[servers.\"x\"]\ntoken = token-a").expect("written");
        let error = Credentials::read(base.path()).expect_err("refused").lines(false);
        assert!(error.contains("damaged") && !error.contains("token-a"), "{error}");
    }

    #[test]
    fn no_file_is_no_tokens() {
        let base = tempfile::tempdir().expect("a directory");
        assert!(Credentials::read(&base.path().join("absent")).expect("empty").default_server().is_none());
    }
}
