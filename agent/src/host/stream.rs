//! The host's ends of pipes and pseudo-terminals, without blocking.
//!
//! The one unsafe call is the registration with the reactor, which asks for a promise that an owned descriptor keeps.

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

/// One end of a pipe, or the host's end of a pseudo-terminal.
#[derive(Debug)]
pub(super) struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes a descriptor and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be polled.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        // SAFETY: the descriptor is owned, so it is open, stays so until it is dropped with this, and is always the
        // same.
        #[allow(unsafe_code)]
        let registered = unsafe { AsyncFd::register(descriptor) };
        Ok(Self(registered?))
    }

    /// What is there, at most a frame full; empty at the end. Cancel-safe.
    ///
    /// # Errors
    ///
    /// Those of read(2); a terminal whose other side is closed is an end, not an error.
    pub(super) async fn read(&self) -> io::Result<Bytes> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|descriptor| read(descriptor.as_fd())) {
                return result;
            }
        }
    }

    /// What is there now; `None` when there is nothing now, empty at the end.
    ///
    /// # Errors
    ///
    /// As [`Stream::read`].
    pub(super) fn read_now(&self) -> io::Result<Option<Bytes>> {
        match read(self.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            result => result.map(Some),
        }
    }

    /// Writes all bytes, as fast as they are taken.
    ///
    /// # Errors
    ///
    /// Those of write(2).
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
    // Allocated only when there is something to read, so that a silent session costs no buffer.
    let mut bytes = Vec::with_capacity(MAX_FRAME);
    loop {
        match rustix::io::read(descriptor, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            // A pseudo-terminal's way to say that nobody has its other side open.
            Err(Errno::IO) => break,
            Err(error) => return Err(error.into()),
        }
    }
    bytes.shrink_to_fit();
    Ok(bytes.into())
}
