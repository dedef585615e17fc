//! The PROXY protocol, versions 1 and 2 (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>): what a proxy
//! sends before everything else, to say whose connection it passes on.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// How version 2 begins.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest header of version 1, with its line break.
const MAX_V1: usize = 107;
/// The longest rest of a header of version 2: addresses take 36 bytes (IPv6), and what proxies add to them, such as a
/// name or a checksum, a few hundred.
const MAX_V2: usize = 1024;

/// Reads a header, and nothing behind it; the client's address, or nothing when the proxy speaks for itself.
///
/// # Errors
///
/// When there is no such header.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    // Both versions' shortest headers are longer.
    let mut start = [0; SIGNATURE.len()];
    stream.read_exact(&mut start).await?;
    if start == SIGNATURE { read_v2(stream).await } else { read_v1(stream, &start).await }
}

async fn read_v1(stream: &mut (impl AsyncRead + Unpin), start: &[u8]) -> io::Result<Option<IpAddr>> {
    if !start.starts_with(b"PROXY ") {
        return Err(invalid("the proxy sent no PROXY header"));
    }
    let mut line = start.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() == MAX_V1 {
            return Err(invalid("the PROXY header does not end"));
        }
        // Byte by byte: what comes behind it is not ours to read.
        line.push(stream.read_u8().await?);
    }
    let line = str::from_utf8(&line).map_err(|_| invalid("the PROXY header is no text"))?;
    let mut words = line.split_ascii_whitespace().skip(1);
    match words.next() {
        Some("UNKNOWN") => Ok(None),
        Some("TCP4" | "TCP6") => {
            let address = words.next().and_then(|word| word.parse().ok());
            address.map(Some).ok_or_else(|| invalid("the PROXY header names no address"))
        }
        _ => Err(invalid("the PROXY header names no protocol")),
    }
}

async fn read_v2(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let (command, family) = (stream.read_u8().await?, stream.read_u8().await?);
    let length = usize::from(stream.read_u16().await?);
    if length > MAX_V2 {
        return Err(invalid("the PROXY header is too long"));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    match (command, family) {
        // LOCAL: the proxy's own, such as a health check.
        (0x20, _) => Ok(None),
        (0x21, 0x11) => Ok(Some(Ipv4Addr::from(first::<4>(&rest)?).into())),
        (0x21, 0x21) => Ok(Some(Ipv6Addr::from(first::<16>(&rest)?).into())),
        (0x21, 0x00) => Ok(None),
        _ => Err(invalid("the PROXY header is for another protocol")),
    }
}

fn first<const N: usize>(bytes: &[u8]) -> io::Result<[u8; N]> {
    bytes.first_chunk().copied().ok_or_else(|| invalid("the PROXY header is too short"))
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn parse(bytes: &[u8]) -> Option<Option<String>> {
        let mut rest = bytes;
        let address = read(&mut rest).await.ok()?;
        assert_eq!(rest, b"GET", "what is behind it was read");
        Some(address.map(|address| address.to_string()))
    }

    #[tokio::test]
    async fn version_1_names_the_client() {
        assert_eq!(parse(b"PROXY TCP4 192.0.2.1 10.0.0.1 5 443\r\nGET").await, Some(Some("192.0.2.1".into())));
        assert_eq!(parse(b"PROXY TCP6 2001:db8::1 ::1 5 443\r\nGET").await, Some(Some("2001:db8::1".into())));
        assert_eq!(parse(b"PROXY UNKNOWN\r\nGET").await, Some(None));
        assert_eq!(parse(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").await, None);
        assert_eq!(parse(&[b"PROXY ".to_vec(), vec![b'x'; 200]].concat()).await, None);
    }

    #[tokio::test]
    async fn version_2_names_the_client() {
        let header = |command: u8, family: u8, rest: &[u8]| {
            let length = u16::try_from(rest.len()).expect("short").to_be_bytes();
            [&SIGNATURE[..], &[command, family], &length, rest, b"GET"].concat()
        };
        let v4 = [192, 0, 2, 1, 10, 0, 0, 1, 0, 5, 1, 187];
        assert_eq!(parse(&header(0x21, 0x11, &v4)).await, Some(Some("192.0.2.1".into())));
        let mut v6 = [0; 36];
        v6[..4].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
        assert_eq!(parse(&header(0x21, 0x21, &v6)).await, Some(Some("2001:db8::".into())));
        assert_eq!(parse(&header(0x20, 0, &[])).await, Some(None));
        assert_eq!(parse(&header(0x21, 0x11, &v4[..3])).await, None);
        assert_eq!(parse(&header(0x31, 0x11, &v4)).await, None);
    }
}
