//! The data path allocates nothing per packet once its buffers have grown.

#![allow(unsafe_code, reason = "an allocator that counts can be written in no other way; it only adds a counter")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{Ipv6Addr, SocketAddr},
    time::Instant,
};

use loom_tunnel::{
    PeerConfig, StaticSecret,
    node::{Node, NodeConfig, Path},
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One of two nodes on a perfect wire.
struct End {
    node: Node,
    address: Ipv6Addr,
    endpoint: SocketAddr,
    received: u64,
}

fn end(number: u8) -> End {
    let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number));
    let private_key = StaticSecret::from([number; 32]);
    let node = Node::new(NodeConfig { private_key, address, seed: u64::from(number) }, Instant::now());
    End { node, address, endpoint: SocketAddr::from(([127, 0, 0, number], 1)), received: 0 }
}

fn admit(at: &mut End, of: &End, initiate: bool) {
    let peer = PeerConfig {
        public_key: of.node.public_key(),
        preshared_key: None,
        address: of.address,
        candidates: vec![of.endpoint],
    };
    at.node.upsert_peer(Instant::now(), peer, initiate);
}

/// Carries what `from` has ready to `to`.
fn carry(from: &mut End, to: &mut End, wire: &mut Vec<u8>, packet: &mut Vec<u8>) {
    let now = Instant::now();
    while let Some(transmit) = from.node.poll_transmit(wire) {
        for datagram in wire.chunks_mut(transmit.segment_size) {
            to.node.handle_datagram(now, Path::Direct(from.endpoint), None, datagram);
        }
    }
    while to.node.poll_packet(packet).is_some() {
        to.received += 1;
    }
}

#[test]
fn no_packet_allocates() {
    const BURST: usize = 64;
    let (mut a, mut b) = (end(1), end(2));
    admit(&mut b, &a, false);
    admit(&mut a, &b, true);
    let (mut wire, mut packet) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        carry(&mut a, &mut b, &mut wire, &mut packet);
        carry(&mut b, &mut a, &mut wire, &mut packet);
    }
    let mut inner = vec![0; 1280];
    inner[0] = 0x60;
    inner[4..6].copy_from_slice(&1240u16.to_be_bytes());
    inner[8..24].copy_from_slice(&a.address.octets());
    inner[24..40].copy_from_slice(&b.address.octets());
    let mut burst = |a: &mut End, b: &mut End| {
        for _ in 0..BURST {
            a.node.handle_packet(Instant::now(), &inner);
        }
        carry(a, b, &mut wire, &mut packet);
    };
    (0..20).for_each(|_| burst(&mut a, &mut b));

    let (before, start) = (ALLOCATIONS.with(Cell::get), Instant::now());
    (0..500).for_each(|_| burst(&mut a, &mut b));
    let (allocations, time) = (ALLOCATIONS.with(Cell::get) - before, start.elapsed());

    let packets = 500 * BURST;
    let rate = packets as f64 * 1280.0 * 8.0 / time.as_secs_f64() / 1e9;
    println!("{packets} packets of 1280 bytes through both nodes on one core: {rate:.1} Gbit/s");
    assert_eq!(b.received, (520 * BURST) as u64);
    assert_eq!(allocations, 0);
}
