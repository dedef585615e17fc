//! The background daemon: one for each user, shared by all commands. It owns the WireGuard nodes and all tunnels.
//!
//! A command that needs a tunnel connects to the daemon's socket ([`client`]), and starts the daemon if there is none.
//! [`server`] is the daemon itself: a lock ensures that there is only one, and a private socket and the peer's
//! credentials that only its user can talk to it. For each Loom server it has one [`server_link`], and there for each
//! weaver a [`weaver`] with its grant and, after `loom tunnel up`, its [`listeners`]. Tunnels recover by themselves:
//! when a weaver stops answering, the link asks the server for a new grant.
//!
//! The daemon exits when it has been idle for a while.

pub(crate) mod client;
mod listeners;
pub(crate) mod protocol;
mod reference;
mod relay;
mod server;
mod server_link;
mod weaver;

pub(crate) use self::server::run;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::error::{CliError, Result};

const SOCKET: &str = "daemon.sock";

/// The directory of the daemon's socket and lock. Only its user must be able to enter it.
fn runtime_directory() -> Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty()).map(PathBuf::from);
    // Outside a login session the variable may name a directory that does not exist.
    let directory = runtime
        .filter(|base| base.is_dir())
        .map_or_else(|| PathBuf::from(format!("/tmp/loom-{uid}")), |base| base.join("loom"));
    private_directory(&directory, uid)?;
    Ok(directory)
}

/// Creates a directory that only one user can enter; refuses an existing one that others can.
fn private_directory(directory: &Path, uid: u32) -> Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).create(directory);
    if let Err(error) = made
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(CliError::failure(format!("making {}: {error}", directory.display())));
    }
    // Does not follow links: anybody may be able to create one there.
    let metadata = fs::symlink_metadata(directory)
        .map_err(|error| CliError::failure(format!("looking at {}: {error}", directory.display())))?;
    if !metadata.is_dir() || metadata.uid() != uid || metadata.mode() & 0o077 != 0 {
        return Err(CliError::failure(format!("{} is not a directory that only you can enter", directory.display()))
            .hint(format!("remove it, or set XDG_RUNTIME_DIR; or run: chmod 700 {}", directory.display())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn only_a_private_directory_of_ones_own_is_used() {
        let base = tempfile::tempdir().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        let at = |name: &str| base.path().join(name);

        private_directory(&at("new"), uid).unwrap();
        assert_eq!(fs::metadata(at("new")).unwrap().mode() & 0o777, 0o700);
        private_directory(&at("new"), uid).expect("again");

        private_directory(&at("new"), uid + 1).expect_err("another user's");
        symlink(at("new"), at("link")).unwrap();
        private_directory(&at("link"), uid).expect_err("a link");
        fs::set_permissions(at("new"), fs::Permissions::from_mode(0o750)).unwrap();
        private_directory(&at("new"), uid).expect_err("the group may enter");
        fs::write(at("file"), "").unwrap();
        private_directory(&at("file"), uid).expect_err("a file");
    }
}
