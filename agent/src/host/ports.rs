//! Which TCP ports the weaver's processes listen on.
//!
//! The kernel lists its listening sockets over netlink (sock_diag(7)). `/proc/net/tcp` has the same information, but to
//! generate it the kernel walks the node's whole table of connections, which takes milliseconds for each check of each
//! weaver. It is used only where there is no sock_diag, as in gVisor.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

/// The maximum size of a datagram in the kernel's answer, in bytes.
const MAX_DATAGRAM: usize = 32 << 10;
/// How much of each table is read, in bytes. Listening sockets come first.
const MAX_TABLE: u64 = 4 << 20;
/// The state of a listening socket (`TCP_LISTEN`).
const LISTEN: &str = "0A";

/// The listening ports, ascending, without duplicates.
pub(super) fn ports() -> Vec<u16> {
    addresses().iter().map(SocketAddr::port).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The listening addresses.
pub(super) fn addresses() -> Vec<SocketAddr> {
    from_kernel().unwrap_or_else(|_| from_tables())
}

fn from_kernel() -> io::Result<Vec<SocketAddr>> {
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    // The kernel's answer is ready when the request returns, so never wait for one.
    socket.set_non_blocking(true)?;
    let mut found = ask(&socket, AF_INET, SocketId::new_v4())?;
    // Fails on a kernel without IPv6.
    found.extend(ask(&socket, AF_INET6, SocketId::new_v6()).unwrap_or_default());
    Ok(found)
}

fn ask(socket: &Socket, family: u8, any: SocketId) -> io::Result<Vec<SocketAddr>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::LISTEN,
        socket_id: any,
    };
    let mut request = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut found = Vec::new();
    let mut datagram = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut datagram.as_mut_slice(), 0)?;
        if read_answer(&datagram[..length], &mut found)? {
            return Ok(found);
        }
    }
}

/// Parses one datagram of the answer; returns whether it was the last.
fn read_answer(mut datagram: &[u8], found: &mut Vec<SocketAddr>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let length = NetlinkBuffer::new_checked(datagram).map_err(io::Error::other)?.length() as usize;
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(datagram).map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                let id = &response.header.socket_id;
                found.push(SocketAddr::new(id.source_address, id.source_port));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
        // Each message is padded to four bytes (netlink(7)).
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn from_tables() -> Vec<SocketAddr> {
    ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().flat_map(|table| parse(&read(table))).collect()
}

fn read(table: &str) -> String {
    let mut text = String::new();
    // A kernel without IPv6 has no second table, and a container without /proc has none.
    if let Ok(file) = File::open(table) {
        let _ = file.take(MAX_TABLE).read_to_string(&mut text);
    }
    text
}

fn parse(table: &str) -> Vec<SocketAddr> {
    table.lines().skip(1).filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<SocketAddr> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    if state != LISTEN {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    Some(SocketAddr::new(parse_address(address)?, u16::from_str_radix(port, 16).ok()?))
}

/// Parses an address as the kernel prints it: 32-bit words in native byte order.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let word = |index: usize| -> Option<[u8; 4]> {
        let digits = hex.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn reads_both_tables() {
        let four = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 1 1\n   \
            1: 0200000A:0016 0300000A:D431 01 00000000:00000000 00:00000000 00000000  0 0 2 1\n   2: broken\n";
        assert_eq!(parse(four), ["127.0.0.1:5432".parse().unwrap()]);
        let six = "header\n 0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0\n 1: \
            00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0\n";
        assert_eq!(parse(six), ["[::1]:8080".parse().unwrap(), "[::]:80".parse().unwrap()]);
    }

    #[test]
    fn sees_real_listeners_both_ways() {
        let listeners = ["127.0.0.1:0", "[::1]:0"].map(|address| TcpListener::bind(address).unwrap());
        for address in listeners.iter().map(|listener| listener.local_addr().unwrap()) {
            assert!(from_kernel().unwrap().contains(&address), "the kernel does not name {address}");
            assert!(from_tables().contains(&address), "the tables do not name {address}");
            let ports = ports();
            assert!(ports.contains(&address.port()) && ports.is_sorted());
        }
    }

    #[test]
    fn many_listeners_take_more_than_one_datagram() {
        let listeners: Vec<_> = (0..400).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let found = from_kernel().unwrap();
        assert!(listeners.iter().all(|listener| found.contains(&listener.local_addr().unwrap())));
    }

    #[test]
    fn a_broken_answer_is_an_error() {
        for broken in [&[1_u8, 2, 3][..], &[0; 16], &[255; 64]] {
            assert!(read_answer(broken, &mut Vec::new()).is_err());
        }
    }
}
