//! The addresses of this host's network interfaces.
//!
//! `getifaddrs` is the one call that lists them on both Linux and macOS, and none of our dependencies wraps it, so this
//! module calls it and needs `unsafe`. Why that is sound: the list comes from the system and is freed once, by a guard;
//! each node is read only while the guard lives; an address is read only after its family says how long it is, and by
//! value, so that alignment does not matter.

#![allow(unsafe_code)]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ptr,
};

/// All addresses of interfaces that are up, in the system's order; empty on an error.
pub(super) fn addresses() -> Vec<IpAddr> {
    let mut first = ptr::null_mut();
    // SAFETY: the pointer is valid for the call to write to.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Vec::new();
    }
    let list = List(first);
    let mut addresses = Vec::new();
    let mut next = list.0;
    while !next.is_null() {
        // SAFETY: `next` is a node of the list, which lives as long as the guard.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        let up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        if up && !entry.ifa_addr.is_null() {
            // SAFETY: the address is not null and belongs to the node.
            addresses.extend(unsafe { read(entry.ifa_addr) });
        }
    }
    addresses
}

/// Frees the list.
struct List(*mut libc::ifaddrs);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the list came from `getifaddrs` and is freed only here.
        unsafe { libc::freeifaddrs(self.0) };
    }
}

/// Reads a socket address of either IP family.
///
/// # Safety
///
/// `address` points to a socket address as long as its family says.
unsafe fn read(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: every socket address begins with its family.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: this family's address is a `sockaddr_in`.
            let address = unsafe { ptr::read_unaligned(address.cast::<libc::sockaddr_in>()) };
            Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))))
        }
        libc::AF_INET6 => {
            // SAFETY: this family's address is a `sockaddr_in6`.
            let address = unsafe { ptr::read_unaligned(address.cast::<libc::sockaddr_in6>()) };
            Some(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_listed() {
        assert!(addresses().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
}
