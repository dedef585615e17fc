//! Between commands and the daemon, on its unix socket.
//!
//! Each message is a `u32` length in network order and that many bytes of JSON, at most [`MAX_MESSAGE`]. The daemon
//! begins with a [`Greeting`]; the command sends one [`Request`] and gets one [`Reply`]. After [`Reply::Connected`] the
//! rest of the connection is the stream's bytes.

use std::net::SocketAddr;

use jiff::Timestamp;
use loom_api::Secret;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The largest message, in bytes.
const MAX_MESSAGE: u32 = 1 << 20;

/// What the daemon says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Greeting {
    /// Its version; a command replaces a daemon of another one when that has nothing to do.
    pub(crate) version: String,
    /// Whether tunnels are up or streams are open.
    pub(crate) busy: bool,
}

/// What a command wants, and as whom.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The Loom server.
    pub(crate) server_url: String,
    /// The user's token there.
    pub(crate) token: Secret,
    /// The authorities that the user trusts for that server, in PEM.
    #[serde(default)]
    pub(crate) authorities: String,
    /// What it wants.
    pub(crate) operation: Operation,
}

/// See [`Request`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub(crate) enum Operation {
    /// Opens a stream to a TCP port of a weaver.
    Connect {
        /// Id, beginning of one, or name.
        weaver: String,
        /// The port.
        port: u16,
    },
    /// Brings a weaver's tunnel up, with listeners here.
    Up {
        /// Id, beginning of one, or name.
        weaver: String,
        /// Explicit forwards.
        forwards: Vec<Forward>,
        /// Where to serve SOCKS5.
        socks: Option<SocketAddr>,
    },
    /// Takes tunnels down: one, or all.
    Down {
        /// Id, beginning of one, or name.
        weaver: Option<String>,
    },
    /// Tells of tunnels: of one, or of all.
    Status {
        /// Id, beginning of one, or name.
        weaver: Option<String>,
    },
    /// Ends the daemon.
    Stop,
}

/// An explicit forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Forward {
    /// Where to listen here.
    pub(crate) local: SocketAddr,
    /// The weaver's port.
    pub(crate) remote: u16,
}

/// The daemon's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub(crate) enum Reply {
    /// It is done.
    Done,
    /// The stream begins.
    Connected {
        /// The weaver's id.
        weaver: String,
        /// The SSH authority's public key line.
        ssh_ca: String,
    },
    /// The tunnels that were asked for.
    Tunnels {
        /// One for each weaver.
        tunnels: Vec<TunnelStatus>,
    },
    /// It is not done.
    Failed {
        /// The command's exit code.
        exit: u8,
        /// What failed and why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
}

/// A tunnel as it is: what `loom tunnel status --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TunnelStatus {
    /// The weaver's id.
    pub(crate) weaver_id: String,
    /// Whether it was brought up, or came with another command.
    pub(crate) up: bool,
    /// Where the weaver's ports are here, once it is up.
    pub(crate) address: Option<String>,
    /// `direct`, `relay` or `none`: the way that data takes.
    pub(crate) path: String,
    /// The UDP address of a direct path.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The last round trip measured, in milliseconds.
    pub(crate) latency_ms: Option<f64>,
    /// Seconds since the last WireGuard handshake.
    pub(crate) last_handshake_secs: Option<u64>,
    /// Seconds since anything authentic was received.
    pub(crate) last_received_secs: Option<u64>,
    /// Bytes sent inside the tunnel.
    pub(crate) sent_bytes: u64,
    /// Bytes received inside the tunnel.
    pub(crate) received_bytes: u64,
    /// What is listened on here.
    pub(crate) forwards: Vec<ForwardStatus>,
    /// Where SOCKS5 is served.
    pub(crate) socks: Option<SocketAddr>,
    /// What is wrong, if something is.
    pub(crate) problem: Option<String>,
    /// Streams that other commands have open through it: SSH sessions, mostly.
    pub(crate) streams: usize,
    /// Seconds since the daemon has it.
    pub(crate) uptime_secs: u64,
    /// When the weaver ends, as far as the daemon knows.
    pub(crate) expires_at: Timestamp,
}

/// A local listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ForwardStatus {
    /// Where it listens here.
    pub(crate) local: SocketAddr,
    /// The weaver's port.
    pub(crate) remote_port: u16,
    /// Why it is not under its own number.
    pub(crate) note: Option<String>,
    /// Why it does not listen.
    pub(crate) error: Option<String>,
}

/// Reads a message.
///
/// # Errors
///
/// When the connection ends, the message is too long, or it is not what is expected.
pub(crate) async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<T> {
    let length = stream.read_u32().await?;
    if length > MAX_MESSAGE {
        return Err(std::io::Error::other(format!("a message of {length} bytes")));
    }
    // Grows with what comes, not with what is promised.
    let mut message = Vec::new();
    stream.take(length.into()).read_to_end(&mut message).await?;
    if message.len() < length as usize {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&message).map_err(std::io::Error::other)
}

/// Writes a message.
///
/// # Errors
///
/// When the connection ends.
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
