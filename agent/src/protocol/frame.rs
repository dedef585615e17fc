//! The bytes on the socket: length-prefixed JSON messages first, then typed frames.

use std::io;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_util::codec::{Decoder, Encoder};

use super::{MAX_FRAME, MAX_LARGE_FRAME, MAX_MESSAGE};

/// What a stream frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Exec, client: bytes for standard input.
    Stdin = 1,
    /// Exec, client: no more input.
    StdinEof = 2,
    /// Exec, client: a [`super::WindowSize`] as JSON.
    Resize = 3,
    /// Exec, client: a signal's name as SSH spells it (`INT`), for the program's process group.
    Signal = 4,
    /// Exec and logs, host: bytes of standard output.
    Stdout = 5,
    /// Exec, host: bytes of standard error.
    Stderr = 6,
    /// Exec, host: `u32 BE`, the number of bytes of standard input that the program has read.
    Window = 7,
    /// Exec, host: an [`super::ExitStatus`] as JSON; the last frame.
    Exit = 8,
    /// Watch, host: a [`super::HostState`] as JSON.
    State = 9,
    /// Attach, both ways: a WebSocket's binary frame.
    Binary = 10,
    /// Attach, both ways: a WebSocket's text frame.
    Text = 11,
}

impl FrameKind {
    const ALL: [Self; 11] = [
        Self::Stdin,
        Self::StdinEof,
        Self::Resize,
        Self::Signal,
        Self::Stdout,
        Self::Stderr,
        Self::Window,
        Self::Exit,
        Self::State,
        Self::Binary,
        Self::Text,
    ];

    fn from_wire(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte).checked_sub(1)?).copied()
    }
}

/// One frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: FrameKind,
    pub payload: Bytes,
}

impl Frame {
    pub fn new(kind: FrameKind, payload: impl Into<Bytes>) -> Self {
        Self { kind, payload: payload.into() }
    }

    /// A frame with JSON.
    ///
    /// # Panics
    ///
    /// When `value` cannot be serialised, which does not happen with the protocol's types.
    pub fn json(kind: FrameKind, value: &impl Serialize) -> Self {
        Self::new(kind, serde_json::to_vec(value).expect("the protocol's types are always representable as JSON"))
    }
}

/// Encodes frames as `u8 kind | u32 BE length | payload`, with a maximum length.
#[derive(Debug, Clone, Copy)]
pub struct FrameCodec {
    limit: usize,
}

impl FrameCodec {
    const HEADER: usize = 5;

    /// For every stream but attach and watch: [`MAX_FRAME`].
    #[must_use]
    pub const fn stream() -> Self {
        Self { limit: MAX_FRAME }
    }

    /// For attach and watch: [`MAX_LARGE_FRAME`].
    #[must_use]
    pub const fn large() -> Self {
        Self { limit: MAX_LARGE_FRAME }
    }
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Frame>> {
        let Some(header) = buffer.first_chunk::<{ Self::HEADER }>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *header;
        let kind = FrameKind::from_wire(kind).ok_or_else(|| invalid("a frame of unknown kind"))?;
        let length = u32::from_be_bytes(length) as usize;
        if length > self.limit {
            return Err(invalid("a frame longer than allowed"));
        }
        if buffer.len() < Self::HEADER + length {
            buffer.reserve(Self::HEADER + length - buffer.len());
            return Ok(None);
        }
        buffer.advance(Self::HEADER);
        Ok(Some(Frame { kind, payload: buffer.split_to(length).freeze() }))
    }
}

impl Encoder<Frame> for FrameCodec {
    type Error = io::Error;

    fn encode(&mut self, frame: Frame, buffer: &mut BytesMut) -> io::Result<()> {
        let length = u32::try_from(frame.payload.len()).ok().filter(|_| frame.payload.len() <= self.limit);
        let length = length.ok_or_else(|| invalid("a frame longer than allowed"))?;
        buffer.reserve(Self::HEADER + frame.payload.len());
        buffer.put_u8(frame.kind as u8);
        buffer.put_u32(length);
        buffer.put_slice(&frame.payload);
        Ok(())
    }
}

/// Reads one length-prefixed JSON message, and not a byte more.
pub async fn read_message<T: DeserializeOwned>(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let length = reader.read_u32().await? as usize;
    if length > MAX_MESSAGE {
        return Err(invalid("a message longer than allowed"));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await?;
    // The error's text could quote the message, which may contain secrets.
    serde_json::from_slice(&body).map_err(|_| invalid("a message that is not one of this protocol's"))
}

/// Writes one length-prefixed JSON message.
pub async fn write_message(writer: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    writer.write_all(&encode_message(message)?).await
}

/// Encodes one length-prefixed JSON message.
pub fn encode_message(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(message)?;
    if body.len() > MAX_MESSAGE {
        return Err(invalid("a message longer than allowed"));
    }
    let length = u32::try_from(body.len()).map_err(|_| invalid("a message longer than allowed"))?;
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_the_documented_bytes() {
        let mut bytes = BytesMut::new();
        FrameCodec::stream().encode(Frame::new(FrameKind::Stderr, &b"hi"[..]), &mut bytes).unwrap();
        assert_eq!(bytes.as_ref(), [6, 0, 0, 0, 2, b'h', b'i']);
        for cut in 0..bytes.len() {
            assert_eq!(FrameCodec::stream().decode(&mut BytesMut::from(&bytes[..cut])).unwrap(), None);
        }
        let frame = FrameCodec::stream().decode(&mut bytes).unwrap().unwrap();
        assert_eq!(frame, Frame::new(FrameKind::Stderr, &b"hi"[..]));
    }

    #[test]
    fn every_kind_reads_back_as_itself() {
        for kind in FrameKind::ALL {
            assert_eq!(FrameKind::from_wire(kind as u8), Some(kind));
        }
    }

    #[test]
    fn long_and_unknown_frames_are_refused() {
        let long = [&[1][..], &(MAX_FRAME as u32 + 1).to_be_bytes()].concat();
        assert!(FrameCodec::stream().decode(&mut BytesMut::from(&long[..])).is_err());
        assert!(FrameCodec::large().decode(&mut BytesMut::from(&long[..])).is_ok());
        for kind in [0, 12, 255] {
            assert!(FrameCodec::stream().decode(&mut BytesMut::from(&[kind, 0, 0, 0, 0][..])).is_err());
        }
    }
}
