//! The node's UDP sockets: many datagrams per system call where the kernel can (UDP_SEGMENT, UDP_GRO, `recvmmsg`), one
//! where it cannot.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    task::{Context, Poll, ready},
};

use quinn_udp::{RecvMeta, UdpSocketState};
use rustix::net::{AddressFamily, SocketType, ipproto};
use tokio::{io::Interest, net::UdpSocket};
use tracing::{debug, warn};

use super::interfaces;

/// An environment variable that turns off UDP segmentation offload, unless it is `0`.
pub const NO_GSO: &str = "LOOM_NO_GSO";

/// The requested size of socket buffers, in bytes: 16 ms of a gigabit, while a busy machine does not schedule us. The
/// system may grant less.
const SOCKET_BUFFER: usize = 2 << 20;

/// Receive buffers, and their size in bytes: the longest train of datagrams that the kernel delivers at once. Untouched
/// memory costs nothing.
const RECEIVE_BUFFERS: usize = 8;
const RECEIVE_BUFFER: usize = 64 << 10;

/// In one send: bytes (RFC 768: 16-bit length, minus headers) and segments (`UDP_MAX_SEGMENTS`).
const MAX_TRAIN: usize = 65_000;

/// Remote addresses whose local socket is remembered.
const MAX_ROUTES: usize = 1024;

/// All UDP sockets of a node.
pub(super) struct UdpSockets {
    sockets: Vec<Socket>,
    gso: bool,
    /// Which socket a remote address talks to: behind a NAT it only accepts answers from that.
    routes: HashMap<SocketAddr, usize>,
    memory: Vec<u8>,
    /// The socket to receive from next, so that none starves another.
    next: usize,
}

struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    local: SocketAddr,
}

/// The result of a send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Sent, or failed for good: there is nothing to repeat.
    Done,
    /// The socket's buffer is full from this byte on.
    Full(usize),
}

impl UdpSockets {
    /// Binds a socket to each address.
    ///
    /// # Errors
    ///
    /// When none could be bound although some were asked for.
    pub(super) fn bind(addresses: &[SocketAddr]) -> io::Result<Self> {
        let mut sockets = Vec::new();
        let mut failure = None;
        for &address in addresses {
            match Socket::bind(address) {
                Ok(socket) => sockets.push(socket),
                Err(error) => {
                    warn!(%address, %error, "cannot bind a UDP socket");
                    failure = Some(error);
                }
            }
        }
        if let Some(error) = failure
            && sockets.is_empty()
        {
            return Err(error);
        }
        let switched_off = std::env::var_os(NO_GSO).is_some_and(|value| value != "0");
        let gso = !switched_off && !kernel_corrupts_gso();
        let memory = if sockets.is_empty() { Vec::new() } else { vec![0; RECEIVE_BUFFERS * RECEIVE_BUFFER] };
        Ok(Self { sockets, gso, routes: HashMap::new(), memory, next: 0 })
    }

    /// The addresses that the sockets are bound to.
    pub(super) fn local_addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().map(|socket| socket.local).collect()
    }

    /// Waits until something can be received.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let ready = self.sockets.iter().filter(|socket| socket.io.poll_recv_ready(cx).is_ready()).count();
        if ready > 0 { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Waits until the socket for `remote` can send.
    pub(super) fn poll_writable(&self, remote: SocketAddr, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(index) = self.route(remote) {
            _ = ready!(self.sockets[index].io.poll_send_ready(cx));
        }
        Poll::Ready(())
    }

    /// Receives one batch from the next socket that has one, and passes each datagram with its sender to `take`. Returns
    /// whether there was any.
    pub(super) fn receive(&mut self, take: &mut dyn FnMut(SocketAddr, &mut [u8])) -> bool {
        for turn in 0..self.sockets.len() {
            let index = (self.next + turn) % self.sockets.len();
            let socket = &self.sockets[index];
            let mut metas = [RecvMeta::default(); RECEIVE_BUFFERS];
            let mut buffers = self.memory.chunks_exact_mut(RECEIVE_BUFFER).map(IoSliceMut::new);
            let mut buffers: [_; RECEIVE_BUFFERS] =
                std::array::from_fn(|_| buffers.next().expect("the memory holds this many buffers"));
            let received = socket
                .io
                .try_io(Interest::READABLE, || socket.state.recv((&socket.io).into(), &mut buffers, &mut metas));
            let count = match received {
                Ok(count) => count,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(local = %socket.local, %error, "receiving failed");
                    }
                    continue;
                }
            };
            self.next = index + 1;
            for (meta, buffer) in metas.iter().zip(&mut buffers).take(count) {
                let remote = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
                remember(&mut self.routes, remote, index, self.sockets.len());
                let stride = meta.stride.max(1);
                for datagram in buffer[..meta.len].chunks_mut(stride) {
                    take(remote, datagram);
                }
            }
            return true;
        }
        false
    }

    /// Sends `contents` as datagrams of `segment` bytes, the last of which may be shorter. Datagrams that cannot be sent
    /// are lost, as is normal for UDP.
    pub(super) fn send(&self, remote: SocketAddr, segment: usize, contents: &[u8]) -> Sent {
        let Some(index) = self.route(remote) else { return Sent::Done };
        let socket = &self.sockets[index];
        let mut start = 0;
        while start < contents.len() {
            let segments = if self.gso { socket.state.max_gso_segments().max(1) } else { 1 };
            let train = segment * segments.min(MAX_TRAIN / segment.max(1)).max(1);
            let end = contents.len().min(start + train);
            match socket.send(remote, segment, &contents[start..end]) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Full(start),
                // Offload has just turned out not to work and is now off: send one by one.
                Err(_) if segments > 1 && socket.state.max_gso_segments() == 1 => continue,
                Err(error) => debug!(%remote, %error, "sending failed"),
            }
            start = end;
        }
        Sent::Done
    }

    /// The socket for a remote address: the one it uses, else the first that can reach it.
    fn route(&self, remote: SocketAddr) -> Option<usize> {
        if let Some(&index) = self.routes.get(&remote) {
            return Some(index);
        }
        self.sockets.iter().position(|socket| {
            socket.local.is_ipv4() == remote.is_ipv4()
                && (!socket.local.ip().is_loopback() || remote.ip().is_loopback())
        })
    }
}

impl Socket {
    fn bind(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let fd = rustix::net::socket(family, SocketType::DGRAM, Some(ipproto::UDP))?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        if address.is_ipv6() {
            // Each family has a socket of its own: otherwise the second one's bind to the same port would fail.
            rustix::net::sockopt::set_ipv6_v6only(&fd, true)?;
        }
        rustix::net::bind(&fd, &address)?;
        let std = std::net::UdpSocket::from(fd);
        std.set_nonblocking(true)?;
        let local = std.local_addr()?;
        let state = UdpSocketState::new((&std).into())?;
        // Smaller buffers work too, but more slowly.
        _ = state.set_recv_buffer_size((&std).into(), SOCKET_BUFFER);
        _ = state.set_send_buffer_size((&std).into(), SOCKET_BUFFER);
        Ok(Self { io: UdpSocket::from_std(std)?, state, local })
    }

    fn send(&self, remote: SocketAddr, segment: usize, contents: &[u8]) -> io::Result<()> {
        let transmit = quinn_udp::Transmit {
            destination: remote,
            ecn: None,
            contents,
            segment_size: (contents.len() > segment).then_some(segment),
            src_ip: None,
        };
        self.io.try_io(Interest::WRITABLE, || self.state.try_send((&self.io).into(), &transmit))
    }
}

fn remember(routes: &mut HashMap<SocketAddr, usize>, remote: SocketAddr, index: usize, sockets: usize) {
    // With one socket there is nothing to choose.
    if sockets < 2 || routes.get(&remote) == Some(&index) {
        return;
    }
    if routes.len() >= MAX_ROUTES {
        routes.clear();
    }
    routes.insert(remote, index);
}

/// The addresses at which sockets bound to `bound` may be reachable; a wildcard stands for every address of this host.
/// Leaves out link-local addresses, which mean nothing elsewhere; loopback addresses come last.
pub(super) fn candidates(bound: &[SocketAddr]) -> Vec<SocketAddr> {
    let interfaces = interfaces::addresses();
    let mut candidates: Vec<SocketAddr> = Vec::new();
    for local in bound {
        if local.ip().is_unspecified() {
            let family = interfaces.iter().filter(|address| address.is_ipv4() == local.is_ipv4());
            candidates.extend(family.map(|&address| SocketAddr::new(address, local.port())));
        } else {
            candidates.push(*local);
        }
    }
    candidates.retain(|candidate| !is_link_local(candidate.ip()) && !candidate.ip().is_multicast());
    candidates.sort_by_key(|candidate| candidate.ip().is_loopback());
    candidates.dedup();
    candidates
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => Ipv4Addr::is_link_local(&address),
        IpAddr::V6(address) => Ipv6Addr::is_unicast_link_local(&address),
    }
}

/// Linux 7.0 to 7.1.4 corrupt a train of equally long segments without an error.
fn kernel_corrupts_gso() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| is_corrupting(&release))
}

fn is_corrupting(release: &str) -> bool {
    let numeric = release.split(|c: char| c != '.' && !c.is_ascii_digit()).next().unwrap_or_default();
    let mut numbers = numeric.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ((7, 0, 0)..=(7, 1, 4)).contains(&version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_with_the_fault_go_without_offload() {
        for (release, corrupting) in [
            ("6.18.44", false),
            ("7.0.0-12-generic", true),
            ("7.1.4", true),
            ("7.1.5", false),
            ("7.2", false),
            ("", false),
        ] {
            assert_eq!(is_corrupting(release), corrupting, "{release}");
        }
    }

    #[test]
    fn loopback_candidates_come_last_and_link_local_ones_not_at_all() {
        let bound = [SocketAddr::from(([0, 0, 0, 0], 1)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, 2))];
        let candidates = candidates(&bound);
        assert!(candidates.contains(&SocketAddr::from(([127, 0, 0, 1], 1))));
        assert!(candidates.is_sorted_by_key(|candidate| candidate.ip().is_loopback()));
        assert!(!candidates.iter().any(|candidate| is_link_local(candidate.ip())));
    }
}
