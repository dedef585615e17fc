//! Where a request comes from.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, request::Parts},
};

use crate::problem::Problem;

/// The address of the client that a request comes from. Behind a trusted proxy it is what the proxy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientAddress(pub IpAddr);

impl ClientAddress {
    /// What limits per address count by: an IPv4 address, or the /64 that an IPv6 host picks its addresses from at will
    /// (RFC 4291 §2.5.1).
    #[must_use]
    pub fn network(self) -> IpAddr {
        match self.0.to_canonical() {
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
            }
            address @ IpAddr::V4(_) => address,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ClientAddress {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let address = parts.extensions.get::<Self>().copied();
        Ok(address.ok_or_else(|| anyhow::anyhow!("a request came without the address of its client"))?)
    }
}

/// The client of a request that the trusted `proxy` passed on: the last address in X-Forwarded-For that is not trusted
/// itself. What stands before it was written by whoever is at that address, and is not believed.
pub(super) fn forwarded_for(headers: &HeaderMap, proxy: IpAddr, trusted: impl Fn(IpAddr) -> bool) -> IpAddr {
    let mut client = proxy;
    let values: Vec<_> = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok()).collect();
    for text in values.iter().rev().flat_map(|value| value.rsplit(',')) {
        let Some(address) = parse(text.trim()) else { break };
        client = address;
        if !trusted(address) {
            break;
        }
    }
    client
}

/// An address, also with a port, as some proxies write it.
fn parse(text: &str) -> Option<IpAddr> {
    let address = text.parse().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()))?;
    Some(IpAddr::to_canonical(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_client_counts_by_its_subnet() {
        let network = |text: &str| ClientAddress(text.parse().expect("an address")).network().to_string();
        assert_eq!(network("192.0.2.7"), "192.0.2.7");
        assert_eq!(network("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }

    #[test]
    fn the_client_is_the_last_address_that_no_proxy_has() {
        let client = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append("x-forwarded-for", value.parse().expect("a value"));
            }
            let is_proxy = |address: IpAddr| address.to_string().starts_with("10.");
            forwarded_for(&headers, [10, 0, 0, 1].into(), is_proxy).to_string()
        };
        assert_eq!(client(&[]), "10.0.0.1");
        assert_eq!(client(&["192.0.2.1"]), "192.0.2.1");
        assert_eq!(client(&["198.51.100.9, 192.0.2.1:4711, 10.0.0.2"]), "192.0.2.1", "the first is the client's claim");
        assert_eq!(client(&["192.0.2.1", "[2001:db8::1]:9"]), "2001:db8::1");
        assert_eq!(client(&["10.0.0.3, 10.0.0.2"]), "10.0.0.3");
        assert_eq!(client(&["192.0.2.1, unknown"]), "10.0.0.1");
    }
}
