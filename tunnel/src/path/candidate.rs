//! Addresses at which a peer may be reachable: which ones to try, and how many.

use std::net::{IpAddr, SocketAddr};

/// Addresses tried for one peer. A host with containers and a VPN has about ten. Each costs a few packets per handshake,
/// so this also bounds how much traffic a peer can make us send.
pub const MAX_CANDIDATES: usize = 16;

/// Addresses learnt from a peer's packets in addition to those given. The one that was silent longest is dropped first.
pub const MAX_LEARNT: usize = 8;

/// How an address became known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The application gave it.
    Given,
    /// An authentic packet came from it.
    Learnt,
}

/// The address in canonical form (no IPv4-mapped IPv6, no flow label), or `None` if no peer can have it.
pub(crate) fn normalise(address: SocketAddr) -> Option<SocketAddr> {
    let ip = address.ip().to_canonical();
    if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
        return None;
    }
    match (ip, address) {
        (IpAddr::V4(v4), _) if v4.is_broadcast() => None,
        // A link-local address means nothing without its scope (RFC 4007 §11).
        (IpAddr::V6(v6), SocketAddr::V6(full)) if v6.is_unicast_link_local() => {
            (full.scope_id() != 0).then_some(SocketAddr::V6(full))
        }
        _ => Some(SocketAddr::new(ip, address.port())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(text: &str) -> Option<String> {
        normalise(text.parse().expect("an address")).map(|address| address.to_string())
    }

    #[test]
    fn mapped_addresses_become_ipv4() {
        assert_eq!(normalised("[::ffff:192.0.2.1]:5").as_deref(), Some("192.0.2.1:5"));
        assert_eq!(normalised("[2001:db8::1]:5").as_deref(), Some("[2001:db8::1]:5"));
    }

    #[test]
    fn impossible_addresses_are_dropped() {
        for text in
            ["0.0.0.0:5", "[::]:5", "192.0.2.1:0", "224.0.0.1:5", "[ff02::1]:5", "255.255.255.255:5", "[fe80::1]:5"]
        {
            assert_eq!(normalised(text), None, "{text}");
        }
    }
}
