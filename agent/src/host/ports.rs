//! Which TCP ports the weaver's processes listen on, from `/proc/net/tcp` and `tcp6` (proc_pid_net(5)).

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// How much of each table is read, in bytes. Listening sockets come first in them.
const MAX_TABLE: u64 = 4 << 20;
/// The state of a listening socket (`TCP_LISTEN`).
const LISTEN: &str = "0A";

/// The ports, ascending, each once.
pub(super) fn ports() -> Vec<u16> {
    addresses().iter().map(SocketAddr::port).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The addresses that are listened on.
pub(super) fn addresses() -> Vec<SocketAddr> {
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

/// An address as the kernel prints it: 32-bit words in the machine's own byte order.
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
    fn sees_a_real_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(addresses().contains(&address));
        let ports = ports();
        assert!(ports.contains(&address.port()) && ports.is_sorted());
    }
}
