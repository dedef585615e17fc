//! A `direct-tcpip` channel: a connection to a port of the weaver (RFC 4254 §7.2).

use std::net::{IpAddr, Ipv6Addr};

use bytes::BytesMut;
use loom_api::WeaverId;
use russh::{
    ChannelOpenFailure, ChannelWriteHalf,
    server::{ChannelOpenHandle, Msg},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

use super::inbox::{Input, Inputs};
use crate::protocol::HostClient;

/// The size of a read, in bytes.
const CHUNK_SIZE: usize = 32 << 10;

/// Whether a host name means the weaver itself, the only allowed target.
pub(super) fn is_the_weaver(name: &str, weaver: WeaverId, address: Ipv6Addr) -> bool {
    let name = name.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase();
    if let Ok(literal) = name.parse::<IpAddr>() {
        return literal.to_canonical().is_loopback() || literal == IpAddr::V6(address);
    }
    let own = weaver.to_string().to_ascii_lowercase();
    let bare = weaver.uuid().to_string();
    let name = name.strip_suffix(".loom").unwrap_or(&name);
    name == "localhost" || name == own || name == bare
}

/// Connects, replies to the client, and forwards the connection until it ends.
pub(super) async fn run(
    host: HostClient,
    port: u16,
    reply: ChannelOpenHandle,
    write: ChannelWriteHalf<Msg>,
    inputs: Inputs,
) {
    let stream = match host.dial(port).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(port, "refusing a forwarded connection: {error}");
            return reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
    };
    reply.accept().await;
    let (mut from, mut to) = stream.into_split();
    // Cancelled when the client has sent its last byte, or the program does not read any more.
    let input_ended = CancellationToken::new();
    let give = async {
        loop {
            let mut chunk = BytesMut::with_capacity(CHUNK_SIZE);
            match from.read_buf(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(_) => write.data_bytes(chunk.freeze()).await?,
            }
        }
        write.eof().await?;
        input_ended.cancelled().await;
        write.close().await
    };
    let take = async {
        let mut inputs = inputs;
        while let Some(input) = inputs.next().await {
            let taken = match input {
                Input::Data(_) if input_ended.is_cancelled() => Ok(()),
                Input::Data(bytes) => to.write_all(&bytes).await,
                Input::Eof => to.shutdown().await.and(Err(std::io::ErrorKind::BrokenPipe.into())),
                Input::Resize { .. } | Input::Signal(_) => Ok(()),
            };
            if taken.is_err() {
                input_ended.cancel();
            }
        }
    };
    tokio::select! {
        // The client closed the channel, which ends both directions.
        () = take => {}
        // An error here means that the client has disconnected.
        _ = give => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_weaver_is_reached() {
        let weaver: WeaverId = "W-01930000-0000-7000-8000-000000000000".parse().unwrap();
        let address = "fd00::7".parse().unwrap();
        for own in [
            "localhost",
            "LOCALHOST",
            "127.0.0.1",
            "127.0.0.2",
            "::1",
            "[::1]",
            "fd00::7",
            "W-01930000-0000-7000-8000-000000000000",
            "w-01930000-0000-7000-8000-000000000000.loom",
        ] {
            assert!(is_the_weaver(own, weaver, address), "{own}");
        }
        for other in ["example.org", "10.0.0.1", "0.0.0.0", "fd00::8", "localhost.example.org", ""] {
            assert!(!is_the_weaver(other, weaver, address), "{other}");
        }
    }
}
