//! Connecting to a port of the weaver, from inside its network.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{net::TcpStream, time::timeout};

use super::ports;
use crate::protocol::{Failure, FailureKind};

/// How long one address may take: all of them are this machine's own.
const PATIENCE: Duration = Duration::from_secs(3);
/// How many addresses besides loopback are tried.
const MAX_OTHERS: usize = 4;

/// Connects to `port`: `127.0.0.1`, `::1`, then the addresses that listen on it.
///
/// # Errors
///
/// [`FailureKind::PortRefused`] when none accepts.
pub(super) async fn dial(port: u16) -> Result<TcpStream, Failure> {
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    for address in loopback {
        if let Some(stream) = connect(SocketAddr::new(address, port)).await {
            return Ok(stream);
        }
    }
    let listening = ports::addresses().into_iter().filter(|address| address.port() == port);
    let others = listening.filter(|address| !address.ip().is_unspecified() && !loopback.contains(&address.ip()));
    for address in others.take(MAX_OTHERS) {
        if let Some(stream) = connect(address).await {
            return Ok(stream);
        }
    }
    Err(Failure::new(FailureKind::PortRefused, format!("nothing in the weaver accepts connections on port {port}")))
}

async fn connect(address: SocketAddr) -> Option<TcpStream> {
    timeout(PATIENCE, TcpStream::connect(address)).await.ok()?.ok()
}
