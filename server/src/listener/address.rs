//! Where a request comes from.

use std::net::{IpAddr, Ipv6Addr};

use axum::{
    extract::{ConnectInfo, FromRequestParts, connect_info::Connected},
    http::request::Parts,
    serve::IncomingStream,
};

use super::PlainListener;
use crate::{problem::Problem, tls::TlsListener};

/// The address of the client that a request comes from.
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

impl Connected<IncomingStream<'_, PlainListener>> for ClientAddress {
    fn connect_info(stream: IncomingStream<'_, PlainListener>) -> Self {
        Self(stream.remote_addr().ip().to_canonical())
    }
}

impl Connected<IncomingStream<'_, TlsListener>> for ClientAddress {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        Self(stream.remote_addr().ip().to_canonical())
    }
}

impl<S: Sync> FromRequestParts<S> for ClientAddress {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let ConnectInfo(address) = parts
            .extensions
            .get::<ConnectInfo<Self>>()
            .ok_or_else(|| anyhow::anyhow!("a request came without the address of its client"))?;
        Ok(*address)
    }
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
}
