//! Connects to the host's socket, and to nothing else.
//!
//! The run directory belongs to the user, who can put anything in place of the socket. The sidecar may see more than the
//! user does (on the local backend, the whole machine), so it must not be led out of the directory: the socket is opened
//! without following links, and the connection goes through that descriptor.
//!
//! Then the listener is checked. It must run as our own user. If the provisioner has named the host's process (on the
//! local backend, where the sidecar sees it), it must be that process. In a Kubernetes pod the two containers have
//! separate PID namespaces and the kernel reports the listener's PID as 0, so only the user can be checked; but there
//! the sidecar cannot see other pods' files either.

use std::{io, os::fd::AsRawFd as _, path::Path};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    process::geteuid,
};
use tokio::net::UnixStream;

use super::SOCKET;

/// Connects to the host that listens in `run_dir`.
///
/// # Errors
///
/// `NotFound` and `ConnectionRefused` while no host listens, `PermissionDenied` when something else listens in its place.
pub(super) async fn connect(run_dir: &Path, host_pid: Option<i32>) -> io::Result<UnixStream> {
    let refused = |why: &str| io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = openat(CWD, run_dir, flags | OFlags::DIRECTORY, Mode::empty())?;
    let socket = openat(&directory, SOCKET, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(refused("it is not a socket"));
    }
    // This name refers to the open file itself, whatever its path may lead to by now (proc_pid_fd(5)).
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
    let listener = stream.peer_cred()?;
    if listener.uid() != geteuid().as_raw() {
        return Err(refused("another user listens there"));
    }
    if host_pid.is_some() && listener.pid() != host_pid {
        return Err(refused("another process than the weaver's host listens there"));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn the_socket_in_the_directory_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(directory.path().join(SOCKET)).unwrap();
        connect(directory.path(), None).await.unwrap();
        connect(directory.path(), Some(std::process::id().cast_signed())).await.unwrap();
    }

    #[tokio::test]
    async fn links_are_not_followed() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let elsewhere = other.path().join(SOCKET);
        let _listener = UnixListener::bind(&elsewhere).unwrap();
        symlink(&elsewhere, own.path().join(SOCKET)).unwrap();
        let error = connect(own.path(), None).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        // Nor is the directory itself one.
        let link = own.path().join("run");
        symlink(other.path(), &link).unwrap();
        connect(&link, None).await.unwrap_err();
    }

    #[tokio::test]
    async fn another_listener_than_the_host_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(directory.path().join(SOCKET)).unwrap();
        let error = connect(directory.path(), Some(1)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    }

    #[tokio::test]
    async fn no_socket_is_not_found_so_that_it_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(connect(directory.path(), None).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
