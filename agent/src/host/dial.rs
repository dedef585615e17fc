//! Connects to a port of the weaver, from inside its network.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{net::TcpStream, time::timeout};

use super::ports;
use crate::protocol::{Failure, FailureKind};

/// For one address. They are all local.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Addresses tried besides loopback.
const MAX_OTHER_ADDRESSES: usize = 4;

/// Connects to `port` on `127.0.0.1`, on `::1`, then on the addresses that listen on it.
///
/// # Errors
///
/// [`FailureKind::PortRefused`] when none of them accepts.
pub(super) async fn dial(port: u16) -> Result<TcpStream, Failure> {
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    for address in loopback {
        if let Some(stream) = connect(SocketAddr::new(address, port)).await {
            return Ok(stream);
        }
    }
    let listening = ports::addresses().into_iter().filter(|address| address.port() == port);
    let others = listening.filter(|address| !address.ip().is_unspecified() && !loopback.contains(&address.ip()));
    for address in others.take(MAX_OTHER_ADDRESSES) {
        if let Some(stream) = connect(address).await {
            return Ok(stream);
        }
    }
    Err(Failure::new(FailureKind::PortRefused, format!("nothing in the weaver accepts connections on port {port}")))
}

async fn connect(address: SocketAddr) -> Option<TcpStream> {
    timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await.ok()?.ok()
}
