//! SOCKS5 (RFC 1928): a client names a weaver and a port with each connection.
//!
//! Only CONNECT, only without authentication (RFC 1928 §3, method 0): the listener is on loopback. Addresses are names
//! that the caller resolves, or IPv6 addresses inside the tunnel; so clients should leave name resolution to us
//! (`socks5h` in curl).

use std::{io, net::Ipv6Addr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{CONNECT_TIMEOUT, forward_connection, serve};
use crate::{ConnectError, Tunnel};

/// For the whole SOCKS handshake.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;

/// Address types (RFC 1928 §5).
mod address_type {
    pub(super) const IPV4: u8 = 1;
    pub(super) const NAME: u8 = 3;
    pub(super) const IPV6: u8 = 4;
}

/// The answers of RFC 1928 §6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Reply {
    Succeeded = 0,
    GeneralFailure = 1,
    HostUnreachable = 4,
    ConnectionRefused = 5,
    CommandNotSupported = 7,
    AddressTypeNotSupported = 8,
}

/// Serves SOCKS5 (RFC 1928, CONNECT, no authentication). `resolve` turns a name such as `ID.loom` into a tunnel address.
/// `cancel` ends it and its connections.
pub async fn serve_socks(
    listener: TcpListener,
    tunnel: Tunnel,
    resolve: impl Fn(&str) -> Option<Ipv6Addr> + Send + Sync + 'static,
    cancel: CancellationToken,
) {
    let resolve = Arc::new(resolve);
    serve(listener, cancel, move |local| {
        let (tunnel, resolve) = (tunnel.clone(), Arc::clone(&resolve));
        async move {
            if let Err(error) = serve_client(local, &tunnel, &*resolve).await {
                debug!(%error, "a SOCKS client failed");
            }
        }
    })
    .await;
}

async fn serve_client(
    mut local: TcpStream,
    tunnel: &Tunnel,
    resolve: &(dyn Fn(&str) -> Option<Ipv6Addr> + Send + Sync),
) -> io::Result<()> {
    let request = tokio::time::timeout(GREETING_TIMEOUT, read_request(&mut local, resolve)).await??;
    let (address, port) = match request {
        Ok(target) => target,
        Err(refusal) => return answer(&mut local, refusal).await,
    };
    match tunnel.connect(address, port, CONNECT_TIMEOUT).await {
        Ok(remote) => {
            answer(&mut local, Reply::Succeeded).await?;
            forward_connection(local, remote).await;
            Ok(())
        }
        Err(error) => {
            debug!(%address, port, %error, "cannot connect for a SOCKS client");
            answer(&mut local, reply_to(&error)).await
        }
    }
}

/// Reads the greeting and the request (RFC 1928 §3 and §4), at most 259 + 262 bytes. The inner error is the reply for
/// the client.
async fn read_request(
    local: &mut TcpStream,
    resolve: &(dyn Fn(&str) -> Option<Ipv6Addr> + Send + Sync),
) -> io::Result<Result<(Ipv6Addr, u16), Reply>> {
    if local.read_u8().await? != VERSION {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not SOCKS5"));
    }
    let methods = usize::from(local.read_u8().await?);
    let mut buffer = [0; 255];
    local.read_exact(&mut buffer[..methods]).await?;
    if !buffer[..methods].contains(&NO_AUTHENTICATION) {
        local.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the SOCKS client requires authentication"));
    }
    local.write_all(&[VERSION, NO_AUTHENTICATION]).await?;

    let mut header = [0; 4];
    local.read_exact(&mut header).await?;
    let [version, command, _reserved, kind] = header;
    if version != VERSION {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not SOCKS5"));
    }
    let address = match kind {
        address_type::IPV6 => {
            let mut octets = [0; 16];
            local.read_exact(&mut octets).await?;
            Ok(Ipv6Addr::from(octets))
        }
        address_type::NAME => {
            let length = usize::from(local.read_u8().await?);
            local.read_exact(&mut buffer[..length]).await?;
            find(&buffer[..length], resolve).ok_or(Reply::HostUnreachable)
        }
        address_type::IPV4 => {
            local.read_exact(&mut buffer[..4]).await?;
            Err(Reply::AddressTypeNotSupported)
        }
        // The address's length is unknown, so the port cannot be read.
        _ => return Ok(Err(Reply::AddressTypeNotSupported)),
    };
    let port = local.read_u16().await?;
    if command != CONNECT {
        return Ok(Err(Reply::CommandNotSupported));
    }
    Ok(address.map(|address| (address, port)))
}

/// Resolves a name; some clients send an address as a name.
fn find(name: &[u8], resolve: &(dyn Fn(&str) -> Option<Ipv6Addr> + Send + Sync)) -> Option<Ipv6Addr> {
    let name = std::str::from_utf8(name).ok()?;
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    bare.parse().ok().or_else(|| resolve(name))
}

fn reply_to(error: &ConnectError) -> Reply {
    match error {
        ConnectError::Refused => Reply::ConnectionRefused,
        ConnectError::NoPeer(_) | ConnectError::TimedOut => Reply::HostUnreachable,
        ConnectError::Closed | ConnectError::TooMany => Reply::GeneralFailure,
    }
}

/// Sends the reply (RFC 1928 §6). The bound address has no meaning outside the tunnel and is left unspecified.
async fn answer(local: &mut TcpStream, reply: Reply) -> io::Result<()> {
    let mut message = [0; 22];
    message[..4].copy_from_slice(&[VERSION, reply as u8, 0, address_type::IPV6]);
    local.write_all(&message).await
}
