//! The background daemon: one for each user, it owns the WireGuard node and all tunnels, and every command shares it.
//!
//! A command that needs a tunnel connects to the daemon's socket ([`client`]), which starts the daemon when there is
//! none. [`server`] is the daemon: a lock settles who it is, a private socket and the peer's credentials settle who may
//! speak to it. For each Loom server it keeps one [`node`], and there for each weaver a [`weaver`] with its grant and,
//! after `loom tunnel up`, its [`listeners`]. Tunnels heal without being told to: a weaver that stops answering is
//! asked for anew.
//!
//! The daemon ends by itself when nobody has used it for a while.

pub(crate) mod client;
mod listeners;
mod node;
pub(crate) mod protocol;
mod reference;
mod relay;
mod server;
mod weaver;

pub(crate) use self::server::run;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::error::{CliError, Result};

/// The socket's name in its directory.
const SOCKET: &str = "daemon.sock";

/// The directory of the daemon's socket and lock: private to its user, or refused.
fn runtime_directory() -> Result<PathBuf> {
    let uid = rustix::process::geteuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty()).map(PathBuf::from);
    // Outside a login session the variable may name what is not there.
    let directory = runtime
        .filter(|base| base.is_dir())
        .map_or_else(|| PathBuf::from(format!("/tmp/loom-{uid}")), |base| base.join("loom"));
    private_directory(&directory, uid)?;
    Ok(directory)
}

/// Makes a directory that only one user can enter; refuses one that is there and is not such.
fn private_directory(directory: &Path, uid: u32) -> Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).create(directory);
    if let Err(error) = made
        && error.kind() != std::io::ErrorKind::AlreadyExists
    {
        return Err(CliError::failure(format!("making {}: {error}", directory.display())));
    }
    // Not following links: the directory may be in a place where everybody can make them.
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
