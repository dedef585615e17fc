//! Non-blocking access to the host's ends of pipes and pseudo-terminals.
//!
//! The only unsafe call registers the descriptor with the reactor; owning the descriptor satisfies its contract.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bytes::Bytes;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
};
use tokio::io::unix::AsyncFd;

use crate::protocol::MAX_FRAME;

/// An end of a pipe, or the host's side of a pseudo-terminal.
#[derive(Debug)]
pub(super) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Makes the descriptor non-blocking and registers it.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned, so it stays open and the same until it is dropped with the registration.
        #[allow(unsafe_code)]
        let registered = unsafe { AsyncFd::register(descriptor) };
        Ok(Self(registered?))
    }

    /// Waits for data and reads at most one frame's worth; empty at the end, which includes a terminal whose other side
    /// is closed. Cancel-safe.
    pub(super) async fn read(&self) -> io::Result<Bytes> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|descriptor| read(descriptor.as_fd())) {
                return result;
            }
        }
    }

    /// As [`Stream::read`], but returns `None` instead of waiting.
    pub(super) fn read_now(&self) -> io::Result<Option<Bytes>> {
        match read(self.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            result => result.map(Some),
        }
    }

    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            let written = ready.try_io(|descriptor| {
                loop {
                    match rustix::io::write(descriptor, bytes) {
                        Err(Errno::INTR) => {}
                        result => return Ok(result?),
                    }
                }
            });
            if let Ok(written) = written {
                bytes = &bytes[written?..];
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn read(descriptor: BorrowedFd<'_>) -> io::Result<Bytes> {
    // Allocated only when there is something to read, so that an idle session has no buffer.
    let mut bytes = Vec::with_capacity(MAX_FRAME);
    loop {
        match rustix::io::read(descriptor, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            // What a pseudo-terminal returns when its other side is closed.
            Err(Errno::IO) => break,
            Err(error) => return Err(error.into()),
        }
    }
    bytes.shrink_to_fit();
    Ok(bytes.into())
}
