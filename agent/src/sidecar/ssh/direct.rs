//! One `direct-tcpip` channel: a connection within the weaver that the client asked for (RFC 4254 §7.2).

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

/// Bytes read at once.
const CHUNK: usize = 32 << 10;

/// Whether a name is the weaver itself; nothing else is reached from here.
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

/// Connects, answers the client, and carries the connection to its end.
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
            tracing::debug!(port, "a forwarded connection is refused: {error}");
            return reply.reject(ChannelOpenFailure::ConnectFailed).await;
        }
    };
    reply.accept().await;
    let (mut from, mut to) = stream.into_split();
    // Cancelled when the client sends no more, or nobody takes it.
    let no_more = CancellationToken::new();
    let give = async {
        loop {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            match from.read_buf(&mut chunk).await {
                Ok(0) | Err(_) => break,
                Ok(_) => write.data_bytes(chunk.freeze()).await?,
            }
        }
        write.eof().await?;
        no_more.cancelled().await;
        write.close().await
    };
    let take = async {
        let mut inputs = inputs;
        while let Some(input) = inputs.next().await {
            let taken = match input {
                Input::Data(_) if no_more.is_cancelled() => Ok(()),
                Input::Data(bytes) => to.write_all(&bytes).await,
                Input::Eof => to.shutdown().await.and(Err(std::io::ErrorKind::BrokenPipe.into())),
                Input::Resize { .. } | Input::Signal(_) => Ok(()),
            };
            if taken.is_err() {
                no_more.cancel();
            }
        }
    };
    tokio::select! {
        // The client closed the channel: both directions are dropped.
        () = take => {}
        // An error here is a client that has gone.
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
