//! Passes a reply together with an open file over a unix socket (`SCM_RIGHTS`, unix(7)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use tokio::{io::Interest, net::UnixStream};

use crate::protocol::{MAX_MESSAGE, Reply, encode_message};

/// Sends a reply, with a descriptor if there is one.
pub(crate) async fn send(stream: &UnixStream, reply: &Reply, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = encode_message(reply)?;
    let mut sent = 0;
    while sent < bytes.len() {
        sent += stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let passed = descriptor.as_slice();
                if sent == 0 && !passed.is_empty() {
                    ancillary.push(SendAncillaryMessage::ScmRights(passed));
                }
                let parts = [IoSlice::new(&bytes[sent..])];
                Ok(sendmsg(stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)?)
            })
            .await?;
    }
    Ok(())
}

/// Receives a reply's JSON and the descriptor that comes with it.
pub(crate) async fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut descriptor = None;
    let mut prefix = [0; 4];
    fill(stream, &mut prefix, &mut descriptor).await?;
    let length = u32::from_be_bytes(prefix) as usize;
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a reply longer than allowed"));
    }
    let mut body = vec![0; length];
    fill(stream, &mut body, &mut descriptor).await?;
    Ok((body, descriptor))
}

async fn fill(stream: &UnixStream, buffer: &mut [u8], descriptor: &mut Option<OwnedFd>) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let read = stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(&mut buffer[filled..])];
                let message = recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                for part in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(mut passed) = part {
                        *descriptor = passed.next().or(descriptor.take());
                    }
                }
                Ok(message.bytes)
            })
            .await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += read;
    }
    Ok(())
}
