//! Which addresses are public: those that may be connected to for whoever asks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Networks of IPv4 that are not the public internet's (IANA's special-purpose registry), and multicast.
const SPECIAL: [([u8; 4], u8); 15] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10), // shared by carriers, RFC 6598
    ([127, 0, 0, 0], 8),
    ([169, 254, 0, 0], 16), // link-local: metadata services
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 0, 2, 0], 24),
    ([192, 88, 99, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([198, 51, 100, 0], 24),
    ([203, 0, 113, 0], 24),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
];
/// Networks inside IPv6's global unicast that are not the public internet's: protocols such as Teredo, documentation, and
/// 6to4, which holds any IPv4 address.
const SPECIAL6: [([u16; 2], u8); 4] = [([0x2001, 0], 23), ([0x2001, 0xdb8], 32), ([0x2002, 0], 16), ([0x3fff, 0], 20)];

/// Whether an address is one of the public internet's.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public4(address),
        IpAddr::V6(address) => is_public6(address),
    }
}

fn is_public4(address: Ipv4Addr) -> bool {
    !SPECIAL.iter().any(|(network, length)| {
        let differs = address.to_bits() ^ Ipv4Addr::from(*network).to_bits();
        differs >> (32 - length) == 0
    })
}

fn is_public6(address: Ipv6Addr) -> bool {
    let [a, b, c, d, e, f, g, h] = address.segments();
    // What an IPv6-only network makes of an IPv4 address (RFC 6052) is as public as that address.
    if [a, b, c, d, e, f] == [0x64, 0xff9b, 0, 0, 0, 0] {
        return is_public4(Ipv4Addr::from_bits(u32::from(g) << 16 | u32::from(h)));
    }
    // Global unicast is 2000::/3. Mapped, unique-local, link-local and multicast addresses are all outside of it.
    let start = u32::from(a) << 16 | u32::from(b);
    a >> 13 == 1
        && !SPECIAL6.iter().any(|([first, second], length)| {
            (start ^ (u32::from(*first) << 16 | u32::from(*second))) >> (32 - length) == 0
        })
}

/// Resolves names to their public addresses only, which are then connected to without asking again.
#[derive(Debug)]
pub(super) struct PublicOnly;

/// A name has no public address, or none at all.
#[derive(Debug, thiserror::Error)]
#[error("no public address")]
pub(super) struct NoPublicAddress;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = match tokio::net::lookup_host((name.as_str(), 0)).await {
                Ok(found) => found.collect(),
                Err(error) => {
                    tracing::info!(host = ?name.as_str(), "the registry's name does not resolve: {error}");
                    return Err(NoPublicAddress.into());
                }
            };
            let public: Vec<SocketAddr> = found.iter().copied().filter(|address| is_public(address.ip())).collect();
            if public.is_empty() {
                tracing::info!(host = ?name.as_str(), ?found, "the registry has no public address");
                return Err(NoPublicAddress.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_internet_are_public() {
        let refused = "0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.0.1 \
            169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.9.9 \
            198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 \
            :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe \
            64:ff9b:1::808:808 100::1 2001::1 2001:1ff:ffff::1 2001:db8::1 2002:7f00:1::1 3fff::1 3fff:fff::1 \
            4000::1 5f00::1 fc00::1 fd12:3456::1 fe80::1 fec0::1 ff02::1";
        for address in refused.split_whitespace() {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        let allowed = "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.1.1.1 128.0.0.1 169.253.1.1 \
            169.255.0.1 172.15.1.1 172.32.0.1 192.1.0.1 192.167.1.1 192.169.0.1 198.17.1.1 198.20.0.1 223.255.255.255 \
            2001:200::1 2001:4860:4860::8888 2003::1 2606:4700::1111 2a00:1450::1 3ffe::1 64:ff9b::808:808";
        for address in allowed.split_whitespace() {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }
}
