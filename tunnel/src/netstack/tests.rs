//! Two stacks on a wire without a tunnel, in virtual time.

use std::{
    collections::VecDeque,
    net::Ipv6Addr,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio::io::ReadBuf;

use super::*;

const A: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const B: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

/// A wire with 1 ms each way between two stacks; `drop` loses packets.
struct Wire {
    now: Instant,
    a: Netstack,
    b: Netstack,
    flying: VecDeque<(Instant, bool, Vec<u8>)>,
    drop: Loss,
}

/// Decides whether a packet is lost.
type Loss = Box<dyn FnMut(&[u8]) -> bool>;

impl Wire {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            now,
            a: Netstack::new(A, 1, now),
            b: Netstack::new(B, 2, now),
            flying: VecDeque::new(),
            drop: Box::new(|_| false),
        }
    }

    /// Runs until nothing moves any more at this moment, then to the next moment at which something does.
    fn step(&mut self) -> bool {
        let (now, flying, drop) = (self.now, &mut self.flying, &mut self.drop);
        for (stack, to_b) in [(&mut self.a, true), (&mut self.b, false)] {
            loop {
                let more = stack.poll(now, 64);
                stack.drain(|packet| {
                    if !drop(packet) {
                        flying.push_back((now + Duration::from_millis(1), to_b, packet.to_vec()));
                    }
                });
                if !more {
                    break;
                }
            }
        }
        let landing = self.flying.front().map(|&(at, ..)| at);
        let next = [landing, self.a.poll_timeout(), self.b.poll_timeout()].into_iter().flatten().min();
        let Some(next) = next else { return false };
        self.now = self.now.max(next);
        while let Some((at, to_b, packet)) = self.flying.pop_front() {
            if at > self.now {
                self.flying.push_front((at, to_b, packet));
                break;
            }
            if to_b { &mut self.b } else { &mut self.a }.handle_packet(self.now, &packet);
        }
        true
    }

    fn run(&mut self, duration: Duration) {
        let until = self.now + duration;
        while self.now < until && self.step() {}
    }

    fn accept(&mut self) -> ConnectionId {
        self.run(Duration::from_millis(5));
        let flow = self.b.poll_incoming().expect("a connection is wanted");
        self.b.accept(self.now, flow).expect("there is room").expect("the peer waits")
    }

    fn pair(&mut self) -> (ConnectionId, ConnectionId) {
        let a = self.a.connect(self.now, B, 80).expect("there is room");
        let b = self.accept();
        self.run(Duration::from_millis(10));
        assert_eq!(open(&mut self.a, a), Poll::Ready(Ok(())));
        assert_eq!(open(&mut self.b, b), Poll::Ready(Ok(())));
        (a, b)
    }
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn open(stack: &mut Netstack, id: ConnectionId) -> Poll<Result<(), OpenError>> {
    stack.poll_open(id, &mut cx())
}

fn read(stack: &mut Netstack, now: Instant, id: ConnectionId) -> Poll<io::Result<Vec<u8>>> {
    let mut bytes = vec![0; 64 << 10];
    let mut buffer = ReadBuf::new(&mut bytes);
    let (result, _) = stack.poll_read(now, id, &mut cx(), &mut buffer);
    result.map_ok(|()| buffer.filled().to_vec())
}

fn write(stack: &mut Netstack, id: ConnectionId, data: &[u8]) -> Poll<io::Result<usize>> {
    stack.poll_write(id, &mut cx(), data)
}

fn kind<T>(poll: Poll<io::Result<T>>) -> Option<io::ErrorKind> {
    match poll {
        Poll::Ready(Err(error)) => Some(error.kind()),
        _ => None,
    }
}

/// Moves `total` bytes from A to B through whatever the wire does; returns how long it took.
fn transfer(wire: &mut Wire, a: ConnectionId, b: ConnectionId, total: usize) -> Duration {
    let begun = wire.now;
    let (mut sent, mut received) = (0, 0);
    while received < total {
        assert!(wire.now - begun < Duration::from_secs(600), "only {received} of {total} bytes arrived");
        if sent < total {
            let data: Vec<u8> = (sent..total.min(sent + 40_000)).map(|at| (at % 251) as u8).collect();
            if let Poll::Ready(count) = write(&mut wire.a, a, &data) {
                sent += count.expect("the connection stands");
            }
        }
        assert!(wire.step());
        while let Poll::Ready(bytes) = read(&mut wire.b, wire.now, b) {
            for byte in bytes.expect("the connection stands") {
                assert_eq!(byte, (received % 251) as u8);
                received += 1;
            }
        }
    }
    wire.now - begun
}

#[test]
fn data_and_both_ends_arrive_in_order() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    transfer(&mut wire, a, b, 3_000_000);

    wire.a.finish(a).expect("it stands");
    wire.run(Duration::from_millis(20));
    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(end)) if end.is_empty()));
    // Half-closed: the other direction still works.
    assert!(matches!(write(&mut wire.b, b, b"late"), Poll::Ready(Ok(4))));
    wire.run(Duration::from_millis(20));
    assert!(matches!(read(&mut wire.a, wire.now, a), Poll::Ready(Ok(bytes)) if bytes == b"late"));
    wire.b.finish(b).expect("it stands");
    wire.run(Duration::from_millis(20));
    assert!(matches!(read(&mut wire.a, wire.now, a), Poll::Ready(Ok(end)) if end.is_empty()));
    assert_eq!(kind(write(&mut wire.a, a, b"more")), Some(io::ErrorKind::BrokenPipe));

    wire.a.release(wire.now, a);
    wire.b.release(wire.now, b);
    wire.run(Duration::from_millis(20));
    assert!(wire.a.connections.is_empty() && wire.b.connections.is_empty());
    assert_eq!((wire.a.buffered, wire.a.flows.len(), wire.a.timers.len()), (0, 0, 0));
}

#[test]
fn what_was_finished_is_delivered_though_nobody_holds_it_any_more() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    assert!(matches!(write(&mut wire.a, a, &[7; 50_000]), Poll::Ready(Ok(50_000))));
    wire.a.finish(a).expect("it stands");
    wire.a.release(wire.now, a);
    wire.run(Duration::from_millis(200));

    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(bytes)) if bytes.len() == 50_000));
    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(end)) if end.is_empty()));
}

#[test]
fn what_arrived_can_be_read_long_after_both_ends() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.b.finish(b).expect("it stands");
    wire.run(Duration::from_millis(10));
    assert!(matches!(write(&mut wire.a, a, b"the end"), Poll::Ready(Ok(7))));
    wire.a.finish(a).expect("it stands");
    wire.run(Duration::from_secs(90));
    wire.now += Duration::from_secs(3600);
    wire.run(Duration::from_secs(90));

    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(bytes)) if bytes == b"the end"));
    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(end)) if end.is_empty()));
}

#[test]
fn a_lost_last_answer_is_repeated_after_the_connection_is_gone() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.a.finish(a).expect("it stands");
    wire.run(Duration::from_millis(20));
    // B finishes last; the answer to it is lost.
    let mut lost = false;
    wire.drop = Box::new(move |packet| {
        let last_answer = packet[8..24] == A.octets() && !lost;
        lost |= last_answer;
        last_answer
    });
    wire.b.finish(b).expect("it stands");
    wire.run(Duration::from_millis(4));
    wire.a.release(wire.now, a);
    wire.step();
    assert!(wire.a.connections.is_empty());
    wire.run(Duration::from_secs(5));

    assert_eq!(wire.b.get(b).end(), Some(CloseReason::Finished));
}

#[test]
fn refusal_is_told() {
    let mut wire = Wire::new();
    let a = wire.a.connect(wire.now, B, 80).expect("there is room");
    wire.run(Duration::from_millis(5));
    let flow = wire.b.poll_incoming().expect("a connection is wanted");
    assert_eq!(open(&mut wire.a, a), Poll::Pending);
    wire.b.refuse(wire.now, flow);
    wire.run(Duration::from_millis(5));

    assert_eq!(open(&mut wire.a, a), Poll::Ready(Err(OpenError::Refused)));
}

#[test]
fn a_repeated_wish_is_one_wish() {
    let mut wire = Wire::new();
    let a = wire.a.connect(wire.now, B, 80).expect("there is room");
    wire.run(Duration::from_secs(8));
    let flow = wire.b.poll_incoming().expect("a connection is wanted");
    assert!(wire.b.poll_incoming().is_none());
    wire.b.accept(wire.now, flow).expect("there is room").expect("the peer waits");
    wire.run(Duration::from_millis(10));

    assert_eq!(open(&mut wire.a, a), Poll::Ready(Ok(())));
}

#[test]
fn a_wish_that_was_given_up_cannot_be_accepted() {
    let mut wire = Wire::new();
    let a = wire.a.connect(wire.now, B, 80).expect("there is room");
    wire.run(Duration::from_millis(5));
    let flow = wire.b.poll_incoming().expect("a connection is wanted");
    wire.a.release(wire.now, a);
    wire.run(Duration::from_millis(5));

    assert!(matches!(wire.b.accept(wire.now, flow), Ok(None)));
    assert!(wire.a.connections.is_empty());
}

#[test]
fn removal_of_the_peer_resets_at_once() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    assert!(matches!(write(&mut wire.a, a, b"x"), Poll::Ready(Ok(1))));
    wire.a.reset(Some(B));

    assert_eq!(kind(read(&mut wire.a, wire.now, a)), Some(io::ErrorKind::ConnectionReset));
    assert_eq!(kind(write(&mut wire.a, a, b"x")), Some(io::ErrorKind::ConnectionReset));
    wire.run(Duration::from_millis(5));
    assert_eq!(kind(read(&mut wire.b, wire.now, b)), Some(io::ErrorKind::ConnectionReset));
}

#[test]
fn dropping_an_unfinished_stream_resets() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.a.release(wire.now, a);
    wire.run(Duration::from_millis(5));

    assert_eq!(kind(read(&mut wire.b, wire.now, b)), Some(io::ErrorKind::ConnectionReset));
    assert!(wire.a.connections.is_empty());
}

#[test]
fn hours_of_silence_keep_a_connection_and_a_dead_peer_ends_it() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.run(Duration::from_secs(5 * 3600));
    assert!(matches!(write(&mut wire.a, a, b"x"), Poll::Ready(Ok(1))));
    wire.run(Duration::from_millis(20));
    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(bytes)) if bytes == b"x"));

    wire.drop = Box::new(|_| true);
    wire.run(Duration::from_secs(3 * 3600));
    assert_eq!(kind(read(&mut wire.a, wire.now, a)), Some(io::ErrorKind::TimedOut));
}

#[test]
fn when_the_path_returns_waiting_segments_go_at_once() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.drop = Box::new(|_| true);
    assert!(matches!(write(&mut wire.a, a, b"x"), Poll::Ready(Ok(1))));
    wire.run(Duration::from_secs(100));
    wire.drop = Box::new(|_| false);
    wire.a.retransmit_now(wire.now, Some(B));
    let back = wire.now;
    wire.run(Duration::from_millis(5));

    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(bytes)) if bytes == b"x"));
    assert!(wire.now - back < Duration::from_millis(50), "{:?}", wire.now - back);
}

#[test]
fn loss_and_doubling_slow_a_transfer_but_do_not_damage_it() {
    for seed in 0..5 {
        let mut wire = Wire::new();
        let (a, b) = wire.pair();
        let mut random = Random::new(seed);
        wire.drop = Box::new(move |_| random.below(100) < 3);
        let took = transfer(&mut wire, a, b, 500_000);
        assert!(took < Duration::from_secs(300), "seed {seed}: {took:?}");
    }
}

#[test]
fn a_reader_that_pauses_stops_the_writer_and_loses_nothing() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    let mut written = 0;
    for _ in 0..200 {
        if let Poll::Ready(count) = write(&mut wire.a, a, &[5; 60_000]) {
            written += count.expect("the connection stands");
        }
        wire.run(Duration::from_secs(1));
    }
    assert!(write(&mut wire.a, a, b"x").is_pending());
    assert!((1 << 20..=2 << 20).contains(&written), "{written}");
    let mut received = 0;
    for _ in 0..200 {
        while let Poll::Ready(bytes) = read(&mut wire.b, wire.now, b) {
            received += bytes.expect("the connection stands").len();
        }
        wire.run(Duration::from_millis(10));
    }
    assert_eq!(received, written);
}

#[test]
fn a_blocked_peer_is_sent_nothing_until_it_is_not() {
    let mut wire = Wire::new();
    let (a, b) = wire.pair();
    wire.a.set_blocked(B, true);
    assert!(matches!(write(&mut wire.a, a, b"x"), Poll::Ready(Ok(1))));
    wire.run(Duration::from_millis(50));
    assert!(read(&mut wire.b, wire.now, b).is_pending());
    wire.a.set_blocked(B, false);
    wire.run(Duration::from_millis(50));

    assert!(matches!(read(&mut wire.b, wire.now, b), Poll::Ready(Ok(bytes)) if bytes == b"x"));
}

#[test]
fn there_is_a_limit_and_places_come_back() {
    let mut wire = Wire::new();
    let ids: Vec<_> = std::iter::from_fn(|| wire.a.connect(wire.now, B, 80).ok()).collect();
    assert!((500..=MAX_CONNECTIONS).contains(&ids.len()), "{}", ids.len());
    for id in ids {
        wire.a.release(wire.now, id);
    }
    wire.step();
    assert_eq!((wire.a.connections.len(), wire.a.buffered), (0, 0));
    wire.a.connect(wire.now, B, 80).expect("there is room again");
}

#[test]
fn a_ping_is_answered() {
    let mut wire = Wire::new();
    let mut ping = vec![0x60, 0, 0, 0, 0, 12, 58, 64];
    ping.extend(A.octets());
    ping.extend(B.octets());
    ping.extend([128, 0, 0, 0, 0x12, 0x34, 0, 1, b'l', b'o', b'o', b'm']);
    let sum = checksum(&ping);
    ping[42..44].copy_from_slice(&sum.to_be_bytes());
    wire.b.handle_packet(wire.now, &ping);
    let mut answers = Vec::new();
    wire.b.drain(|packet| answers.push(packet.to_vec()));

    assert_eq!(answers.len(), 1);
    assert_eq!((&answers[0][8..24], answers[0][40], &answers[0][44..]), (&B.octets()[..], 129, &ping[44..]));
}

/// ICMPv6's checksum (RFC 4443 §2.3) of a packet whose own is zero.
fn checksum(packet: &[u8]) -> u16 {
    let length = (packet.len() - 40) as u32 + u32::from(packet[6]);
    let words = packet[8..].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + length;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Every packet of a real exchange, damaged in a few bytes with the TCP checksum made right again, and pure noise.
#[test]
fn damaged_packets_and_noise_never_panic() {
    for seed in 0..200 {
        let mut wire = Wire::new();
        let mut random = Random::new(seed);
        let (a, b) = wire.pair();
        for round in 0..60 {
            _ = write(&mut wire.a, a, &vec![1; random.below(5000) as usize]);
            _ = write(&mut wire.b, b, &vec![2; random.below(5000) as usize]);
            if round == 40 {
                _ = wire.a.finish(a);
            }
            let mut damaged = Vec::new();
            for (_, to_b, packet) in &wire.flying {
                let mut packet = packet.clone();
                for _ in 0..=random.below(3) {
                    let at = random.below(packet.len().min(100) as u64) as usize;
                    packet[at] = random.next() as u8;
                }
                if packet.len() > 58 && random.below(4) > 0 {
                    packet[56..58].fill(0);
                    let sum = checksum(&packet);
                    packet[56..58].copy_from_slice(&sum.to_be_bytes());
                }
                damaged.push((*to_b, packet));
            }
            damaged.push((true, (0..random.below(200)).map(|_| random.next() as u8).collect()));
            let mut noise: Vec<u8> = (0..40 + random.below(60)).map(|_| random.next() as u8).collect();
            noise[0] = 0x60;
            noise[6] = 6;
            noise[24..40].copy_from_slice(&B.octets());
            damaged.push((true, noise));
            for (to_b, packet) in damaged {
                if to_b { &mut wire.b } else { &mut wire.a }.handle_packet(wire.now, &packet);
            }
            wire.step();
            _ = read(&mut wire.a, wire.now, a);
            _ = read(&mut wire.b, wire.now, b);
        }
    }
}
