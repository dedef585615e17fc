//! Connections from devices to the weaver's address in the tunnel.
//!
//! Port 22 is the SSH server and port 1 the port report, both served by the sidecar. All other ports are those of the
//! user's programs: the host first connects to the program, and only then is the device's connection accepted, so that a
//! closed port refuses connections as on any machine.

use std::{net::Ipv6Addr, sync::Arc};

use loom_api::tunnel::{PORTS_PORT, PortReport, SSH_PORT};
use loom_tunnel::{Incoming, IncomingConnection, TunnelStream, forward::splice};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinSet,
};

use super::{Sidecar, ssh};
use crate::protocol::HostError;

/// Concurrent connections; more are refused.
const MAX_CONNECTIONS: usize = 512;

/// Serves incoming connections until the tunnel ends.
pub(crate) async fn serve(sidecar: Arc<Sidecar>, address: Ipv6Addr, mut incoming: Incoming) {
    let mut connections = JoinSet::new();
    loop {
        let connection = tokio::select! {
            connection = incoming.next() => connection,
            Some(_) = connections.join_next() => continue,
        };
        let Some(connection) = connection else { break };
        if connections.len() >= MAX_CONNECTIONS {
            tracing::warn!("too many connections; refusing one");
            connection.refuse();
            continue;
        }
        connections.spawn(answer(Arc::clone(&sidecar), address, connection));
    }
    connections.shutdown().await;
}

async fn answer(sidecar: Arc<Sidecar>, address: Ipv6Addr, connection: IncomingConnection) {
    // The grant may have been revoked since the packet arrived.
    let Some(user) = sidecar.grants.user(&connection.peer) else { return connection.refuse() };
    let port = connection.port;
    let ended = match port {
        SSH_PORT => match connection.accept().await {
            Ok(stream) => ssh::serve(&sidecar, address, &user, stream).await,
            Err(error) => Err(error.into()),
        },
        PORTS_PORT => match connection.accept().await {
            Ok(stream) => report_ports(&sidecar, stream).await.map_err(Into::into),
            Err(error) => Err(error.into()),
        },
        _ => forward(&sidecar, connection).await,
    };
    if let Err(error) = ended {
        tracing::debug!(%user, port, "a connection broke: {error:#}");
    }
}

/// Forwards a connection to the program that listens on its port.
async fn forward(sidecar: &Sidecar, connection: IncomingConnection) -> anyhow::Result<()> {
    let mut local = match sidecar.host.dial(connection.port).await {
        Ok(local) => local,
        Err(error) => {
            if !matches!(error, HostError::Refused(_)) {
                tracing::info!(port = connection.port, "cannot connect within the weaver: {error}");
            }
            connection.refuse();
            return Ok(());
        }
    };
    let mut remote = connection.accept().await?;
    let ended = splice(&mut local, &mut remote).await;
    if ended.is_err() {
        // Reset it: a clean close would look like the end of the data.
        let _ = local.set_zero_linger();
    }
    ended?;
    Ok(())
}

/// Reports the ports that the weaver listens on, at once and at every change, until the device disconnects.
async fn report_ports(sidecar: &Sidecar, stream: TunnelStream) -> std::io::Result<()> {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut state = sidecar.state.subscribe();
    let tell = async {
        let mut told = None;
        loop {
            let ports = state.borrow_and_update().ports.clone();
            if told.as_ref() != Some(&ports) {
                let mut line = serde_json::to_vec(&PortReport { ports: ports.clone() })?;
                line.push(b'\n');
                write.write_all(&line).await?;
                told = Some(ports);
            }
            if state.changed().await.is_err() {
                return write.shutdown().await;
            }
        }
    };
    let gone = async {
        let mut ignored = [0; 64];
        while read.read(&mut ignored).await? > 0 {}
        Ok(())
    };
    tokio::select! {
        ended = tell => ended,
        ended = gone => ended,
    }
}
