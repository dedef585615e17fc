//! The protocol between commands and the daemon, on its unix socket.
//!
//! Each message is a `u32` length in network order and that many bytes of JSON, at most [`MAX_MESSAGE`]. The daemon
//! begins with a [`Greeting`]; the command sends one [`Request`] and gets one [`Reply`]. After [`Reply::Connected`] the
//! rest of the connection is the stream's bytes.

use std::net::SocketAddr;

use jiff::Timestamp;
use loom_api::Secret;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const MAX_MESSAGE: u32 = 1 << 20;

/// The daemon's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    /// A command replaces a daemon of another version, unless it is busy.
    pub(crate) version: String,
    /// Whether tunnels are up or streams are open.
    pub(crate) busy: bool,
}

/// What a command wants, and on whose behalf.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) server_url: String,
    pub(crate) token: Secret,
    /// CA certificates (PEM) that the user trusts for this server, besides the system's.
    #[serde(default)]
    pub(crate) authorities: String,
    pub(crate) operation: Operation,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub(crate) enum Operation {
    /// Opens a stream to a TCP port of a weaver. `weaver`, here and below, is an id, a prefix of one, or a name.
    Connect { weaver: String, port: u16 },
    /// Brings a weaver's tunnel up, with local listeners.
    Up {
        weaver: String,
        forwards: Vec<Forward>,
        /// Where to serve SOCKS5.
        socks: Option<SocketAddr>,
    },
    /// Takes one tunnel down, or all.
    Down { weaver: Option<String> },
    /// Asks for the status of one tunnel, or of all.
    Status { weaver: Option<String> },
    /// Stops the daemon.
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Forward {
    /// Where to listen on this machine.
    pub(crate) local: SocketAddr,
    /// The port in the weaver.
    pub(crate) remote: u16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(crate) enum Reply {
    Done,
    /// The stream's bytes follow.
    Connected {
        /// The weaver's full id.
        weaver: String,
        /// The public key line of the server's SSH CA.
        ssh_ca: String,
    },
    Tunnels {
        tunnels: Vec<TunnelStatus>,
    },
    /// See [`CliError`](crate::error::CliError).
    Failed {
        exit: u8,
        message: String,
        hint: Option<String>,
    },
}

/// The status of a tunnel, as `loom tunnel status --json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TunnelStatus {
    pub(crate) weaver_id: String,
    /// Whether `loom tunnel up` brought it up; if not, another command opened it.
    pub(crate) up: bool,
    /// The loopback address on which the weaver's ports appear, if the tunnel is up.
    pub(crate) address: Option<String>,
    /// The path in use: `direct`, `relay` or `none`.
    pub(crate) path: String,
    /// The UDP address of a direct path.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The last round trip measured, in milliseconds.
    pub(crate) latency_ms: Option<f64>,
    /// Seconds since the last WireGuard handshake.
    pub(crate) last_handshake_secs: Option<u64>,
    /// Seconds since anything authentic was received.
    pub(crate) last_received_secs: Option<u64>,
    /// Bytes inside the tunnel, without WireGuard's overhead.
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) forwards: Vec<ForwardStatus>,
    /// Where SOCKS5 is served.
    pub(crate) socks: Option<SocketAddr>,
    /// Why the weaver cannot be reached, if the daemon knows.
    pub(crate) problem: Option<String>,
    /// Streams that other commands have open, mostly SSH sessions.
    pub(crate) streams: usize,
    /// Seconds since the daemon got its first grant for the weaver.
    pub(crate) uptime_secs: u64,
    /// When the weaver ends, as far as the daemon knows.
    pub(crate) expires_at: Timestamp,
}

/// A local listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ForwardStatus {
    pub(crate) local: SocketAddr,
    pub(crate) remote_port: u16,
    /// Why the local port has another number.
    pub(crate) note: Option<String>,
    /// Why nothing listens on the local port.
    pub(crate) error: Option<String>,
}

/// Reads a message. Fails when the connection ends, or the message is too long or not a `T`.
pub(crate) async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<T> {
    let length = stream.read_u32().await?;
    if length > MAX_MESSAGE {
        return Err(std::io::Error::other(format!("a message of {length} bytes")));
    }
    // Grows with the bytes received, not with the announced length.
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < length as usize {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&message).map_err(std::io::Error::other)
}

pub(crate) async fn write(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> std::io::Result<()> {
    let body = serde_json::to_vec(message).map_err(std::io::Error::other)?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MAX_MESSAGE);
    let length = length.ok_or_else(|| std::io::Error::other("the message is too long"))?;
    stream.write_all(&[&length.to_be_bytes()[..], &body].concat()).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_message_arrives_and_nonsense_is_an_error() {
        let mut wire = Vec::new();
        let greeting = Greeting { version: "1".to_owned(), busy: true };
        write(&mut wire, &greeting).await.unwrap();
        assert_eq!(read::<Greeting>(&mut wire.as_slice()).await.unwrap(), greeting);
        let nonsense: [&[u8]; 7] =
            [b"", &[0, 0], &[0xff; 8], &[0, 0, 0, 9, b'{'], &[0, 0, 0, 2, b'{', b'}'], &[0; 4], &[0, 0, 0, 1, 0xff]];
        for nonsense in nonsense {
            assert!(read::<Greeting>(&mut &nonsense[..]).await.is_err(), "{nonsense:?}");
            assert!(read::<Request>(&mut &nonsense[..]).await.is_err(), "{nonsense:?}");
        }
    }

    #[tokio::test]
    async fn the_streams_bytes_after_a_message_stay_in_the_stream() {
        let mut wire = Vec::new();
        write(&mut wire, &Greeting { version: "1".to_owned(), busy: false }).await.unwrap();
        wire.extend_from_slice(b"SSH-2.0-x");
        let mut rest = wire.as_slice();
        read::<Greeting>(&mut rest).await.unwrap();
        assert_eq!(rest, b"SSH-2.0-x");
    }
}
