//! The node in a simulated network with virtual time: `cargo test -p loom-tunnel --features simulated-time`.
//!
//! Each test runs many worlds that differ by their seed; a failing one names its seed.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "a test's own support")]

use std::{net::SocketAddr, time::Duration};

use loom_tunnel::node::{NodeEvent, Path};

mod sim;

use sim::{Link, World, for_seeds, packet};

const SECOND: Duration = Duration::from_secs(1);

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Two hosts with a relay (20 ms each way to the server) and, if given, a direct link; not introduced yet.
fn world(seed: u64, direct: Option<Link>) -> World {
    let mut world = World::pair(seed);
    world.relay_on();
    if let Some(link) = direct {
        world.link(0, 1, link);
    }
    world
}

/// As [`world`], introduced and come to rest.
fn connected(seed: u64, direct: Option<Link>) -> World {
    let mut world = world(seed, direct);
    world.introduce(0, 1);
    world.run_for(3 * SECOND);
    world
}

/// Sends a packet each way every `gap`, for `time`; the numbers begin at `first`.
fn talk(world: &mut World, first: u64, gap: Duration, time: Duration) -> u64 {
    let count = (time.as_micros() / gap.as_micros()) as u64;
    for number in first..first + count {
        world.send(0, 1, number);
        world.send(1, 0, number);
        world.run_for(gap);
    }
    first + count
}

mod handshake {
    use super::*;

    #[test]
    fn first_data_takes_one_relay_round_trip_and_a_way() {
        for_seeds(100, |seed| {
            let mut world = world(seed, None);
            world.relay.delay = ms(1 + seed);
            world.introduce(0, 1);
            world.send(0, 1, 1);

            assert!(world.run_while_not(SECOND, |world| !world.received(1).is_empty()));

            // Four hops for the handshake, two for the data; a lost race against a retry costs at most its gap.
            let hop = ms(1 + seed);
            assert!(world.elapsed() <= hop * 6 + ms(150), "{:?}", world.elapsed());
            if hop * 4 < ms(250) {
                assert_eq!(world.elapsed(), hop * 6);
            }
        });
    }

    #[test]
    fn direct_alone_suffices() {
        for_seeds(50, |seed| {
            let mut world = World::pair(seed);
            world.link(0, 1, Link::with_delay(ms(10)));
            world.introduce(0, 1);
            world.send(0, 1, 1);

            assert!(world.run_while_not(SECOND, |world| !world.received(1).is_empty()));

            assert_eq!(world.elapsed(), ms(30));
            world.send(1, 0, 2);
            world.run_for(SECOND);
            assert_eq!(world.received(0), [2]);
        });
    }

    #[test]
    fn direct_is_adopted_within_300_ms_of_the_first_data() {
        for_seeds(100, |seed| {
            let mut world = world(seed, Some(Link::with_delay(ms(1 + seed % 70))));
            world.introduce(0, 1);
            world.send(0, 1, 1);
            assert!(world.run_while_not(SECOND, |world| !world.received(1).is_empty()));
            let first_data = world.elapsed();

            let adopted = world.run_while_not(SECOND, |world| world.is_direct(0, 1) && world.is_direct(1, 0));

            assert!(adopted && world.elapsed() <= first_data + ms(300), "{:?}", world.elapsed() - first_data);
        });
    }

    #[test]
    fn direct_that_opens_only_after_the_session_is_adopted() {
        for_seeds(50, |seed| {
            let mut world = world(seed, Some(Link::with_delay(ms(5))));
            world.set_link_up(0, 1, false);
            world.introduce(0, 1);
            world.run_for(ms(100));
            assert_eq!(world.path(0, 1), Some(Path::Relay));

            world.set_link_up(0, 1, true);

            assert!(world.run_while_not(ms(500), |world| world.is_direct(0, 1) && world.is_direct(1, 0)));
        });
    }

    #[test]
    fn survives_a_fifth_of_all_packets_lost() {
        let mut slow = 0;
        for seed in 0..300 {
            let mut world = world(seed, None);
            // 11 % at each of two hops.
            world.relay = Link::with_delay(ms(10)).with_loss(106);
            world.introduce(0, 1);
            assert!(world.run_while_not(60 * SECOND, |world| world.has_session(0)), "seed {seed}");
            slow += u32::from(world.elapsed() > SECOND);
        }
        assert!(slow <= 9, "{slow} of 300 took more than a second");
    }

    #[test]
    fn both_sides_may_initiate_at_once() {
        for_seeds(100, |seed| {
            let mut world = world(seed, Some(Link::with_delay(ms(7)).with_reordering(500, ms(30))));
            world.admit(0, 1, true);
            world.admit(1, 0, true);
            world.run_for(2 * SECOND);

            talk(&mut world, 0, ms(10), SECOND);
            world.run_for(SECOND);

            let mut received = world.received(0);
            received.sort_unstable();
            assert_eq!(received, (0..100).collect::<Vec<_>>());
        });
    }

    #[test]
    fn the_side_that_was_not_asked_to_initiate_does_so_for_data() {
        for_seeds(20, |seed| {
            let mut world = world(seed, None);
            world.admit(0, 1, false);
            world.admit(1, 0, false);
            world.run_for(5 * SECOND);
            assert_eq!(world.hosts[0].sent + world.hosts[1].sent, 0);

            world.send(1, 0, 5);
            world.run_for(SECOND);

            assert_eq!(world.received(0), [5]);
        });
    }

    #[test]
    fn a_relay_that_comes_late_is_used_at_once() {
        let mut world = World::pair(1);
        world.introduce(0, 1);
        world.run_for(60 * SECOND);
        assert_eq!(world.hosts[0].events.len(), 0);

        world.relay_on();

        assert!(world.run_while_not(ms(85), |world| world.has_session(0)));
    }
}

mod rekey {
    use super::*;

    #[test]
    fn keys_are_renewed_under_traffic_without_a_loss() {
        for_seeds(4, |seed| {
            let link = Link::with_delay(ms(10)).with_reordering(100, ms(3));
            let mut world = connected(seed, (seed % 2 == 0).then_some(link));

            let count = talk(&mut world, 0, ms(50), 400 * SECOND);
            world.run_for(SECOND);

            for id in [0, 1] {
                let mut received = world.received(id);
                received.sort_unstable();
                assert_eq!(received, (0..count).collect::<Vec<_>>());
            }
            assert!(world.status(0, 1).last_handshake.unwrap() < 130 * SECOND);
            assert_eq!(world.hosts[0].events.iter().filter(is_session).count(), 1);
        });
    }

    #[test]
    fn one_way_traffic_is_enough() {
        for from in [0, 1] {
            let mut world = connected(3, None);
            for number in 0..4000 {
                world.send(from, 1 - from, number);
                world.run_for(ms(100));
            }
            assert_eq!(world.received(1 - from).len(), 4000);
        }
    }

    #[test]
    fn an_idle_session_is_ready_after_an_hour() {
        for_seeds(6, |seed| {
            let direct = (seed % 2 == 0).then_some(Link::with_delay(ms(10)));
            let mut world = connected(seed, direct);
            world.run_for(3600 * SECOND);

            let before = world.elapsed();
            world.send(1, 0, 1);
            assert!(world.run_while_not(SECOND, |world| !world.received(0).is_empty()));

            assert!(world.elapsed() - before <= ms(41), "{:?}", world.elapsed() - before);
        });
    }

    #[test]
    fn lossy_links_renew_keys_too() {
        for_seeds(5, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(10)).with_loss(200)));
            world.relay.loss = 100;

            let count = talk(&mut world, 0, ms(100), 600 * SECOND);

            for id in [0, 1] {
                let received = world.received(id).len() as u64;
                assert!(received > count * 7 / 10, "{received} of {count}");
            }
        });
    }

    fn is_session(event: &&(std::time::Instant, NodeEvent)) -> bool {
        matches!(event.1, NodeEvent::SessionEstablished(_))
    }
}

mod paths {
    use super::*;

    #[test]
    fn relay_restart_keeps_the_session() {
        for_seeds(100, |seed| {
            let mut world = connected(seed, None);
            let handshakes = world.status(0, 1).last_handshake.unwrap();
            let back = [ms(200 + world.random.below(2000)), ms(200 + world.random.below(2000))];
            world.restart_relay(&back);
            world.run_for(ms(100));
            world.send(0, 1, 1);
            world.send(1, 0, 2);
            let last = back[0].max(back[1]);
            world.run_for(last - ms(100));
            let back_at = world.elapsed();

            assert!(world.run_while_not(SECOND, |w| !w.received(0).is_empty() && !w.received(1).is_empty()));

            assert!(world.elapsed() - back_at <= ms(130), "{:?}", world.elapsed() - back_at);
            assert!(world.status(0, 1).last_handshake.unwrap() > handshakes, "the same session");
            assert_eq!((world.received(0), world.received(1)), (vec![2], vec![1]));
        });
    }

    #[test]
    fn a_lost_direct_path_falls_back_within_two_seconds_and_returns() {
        for_seeds(100, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(5 + seed % 40))));
            assert!(world.is_direct(0, 1) && world.is_direct(1, 0));
            let phase = ms(world.random.below(500));
            let next = talk(&mut world, 0, ms(20), 2 * SECOND + phase);
            world.run_for(ms(100));
            assert_eq!(world.received(0).len() as u64, next);

            world.set_link_up(0, 1, false);
            let next = talk(&mut world, next, ms(20), 2 * SECOND);
            assert_eq!((world.path(0, 1), world.path(1, 0)), (Some(Path::Relay), Some(Path::Relay)));
            world.run_for(ms(100));
            let lost = next - world.received(0).iter().collect::<std::collections::HashSet<_>>().len() as u64;
            assert!(lost <= 50, "{lost} packets of 20 ms lost: more than a second");

            let before = world.received(1).len();
            let next = talk(&mut world, next, ms(20), SECOND);
            world.run_for(ms(100));
            assert_eq!(world.received(1).len() - before, 50, "nothing is lost on the relay");

            world.set_link_up(0, 1, true);
            talk(&mut world, next, ms(20), 3 * SECOND);
            assert!(world.is_direct(0, 1) && world.is_direct(1, 0));
        });
    }

    #[test]
    fn packets_wait_while_no_path_works_and_go_when_one_returns() {
        for_seeds(100, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(10))));
            world.set_link_up(0, 1, false);
            world.set_on_relay(0, false);
            talk(&mut world, 0, ms(100), 3 * SECOND);
            assert_eq!((world.path(0, 1), world.path(1, 0)), (None, None));
            world.send(0, 1, 1000);
            world.send(1, 0, 1001);

            if seed % 2 == 0 {
                world.set_on_relay(0, true);
                assert!(world.run_while_not(ms(200), |w| w.received(1).contains(&1000)));
                assert!(world.run_while_not(ms(200), |w| w.received(0).contains(&1001)));
            } else {
                world.set_link_up(0, 1, true);
                assert!(world.run_while_not(2 * SECOND, |w| w.received(1).contains(&1000)));
                assert!(world.run_while_not(2 * SECOND, |w| w.received(0).contains(&1001)));
            }
        });
    }

    #[test]
    fn hours_without_any_network_end_with_the_network() {
        for_seeds(10, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(10))));
            world.set_link_up(0, 1, false);
            world.restart_relay(&[7200 * SECOND, 7200 * SECOND + ms(300)]);
            // The first tells that nothing works any more, the second waits.
            world.send(0, 1, 1);
            world.run_for(5 * SECOND);
            world.send(0, 1, 2);
            world.run_for(7195 * SECOND);

            assert!(world.run_while_not(SECOND, |world| world.received(1) == [2]));
        });
    }

    #[test]
    fn a_changed_source_address_moves_the_path() {
        for_seeds(60, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(10))));
            let relay = seed % 3 != 0;
            if !relay {
                world.set_on_relay(0, false);
            }
            let next = talk(&mut world, 0, ms(20), SECOND);

            // Host 0 moves to another network: the old address is gone, the new one known to nobody.
            let moved = SocketAddr::from(([198, 51, 100, 7], 40_000));
            world.hosts[0].endpoint = moved;
            world.input(0, |node, now| node.network_changed(now));
            let next = talk(&mut world, next, ms(20), 2 * SECOND);

            assert_eq!(world.path(1, 0), Some(Path::Direct(moved)));
            assert!(world.is_direct(0, 1));
            let before = (world.received(0).len(), world.received(1).len());
            talk(&mut world, next, ms(20), SECOND);
            world.run_for(ms(100));
            assert_eq!((world.received(0).len() - before.0, world.received(1).len() - before.1), (50, 50));
        });
    }

    #[test]
    fn the_faster_of_two_direct_paths_is_taken() {
        let mut world = world(1, Some(Link::with_delay(ms(5))));
        let mut peer = world.peer_config(1);
        peer.candidates.insert(0, SocketAddr::from(([203, 0, 113, 1], 9)));
        world.admit(1, 0, false);
        world.upsert(0, peer, true);
        world.run_for(2 * SECOND);

        assert!(world.is_direct(0, 1));
    }

    #[test]
    fn a_foreign_peer_is_followed_where_it_goes_and_never_probed() {
        // No relay and no probe was ever seen: both sides take the other for foreign.
        for_seeds(50, |seed| {
            let mut world = World::pair(seed);
            world.link(0, 1, Link::with_delay(ms(10)));
            world.capture = Some(Vec::new());
            world.introduce(0, 1);
            let next = talk(&mut world, 0, ms(20), 2 * SECOND);
            let moved = SocketAddr::from(([198, 51, 100, 7], 40_000));
            world.hosts[0].endpoint = moved;

            talk(&mut world, next, ms(20), 2 * SECOND);
            world.run_for(ms(100));

            assert_eq!(world.path(1, 0), Some(Path::Direct(moved)));
            assert!(world.received(0).len() >= 198 && world.received(1).len() == 200);
            let probes = world.capture.unwrap().iter().filter(|datagram| datagram.bytes.len() == 100).count();
            assert_eq!(probes, 0);
        });
    }

    #[test]
    fn an_idle_pair_is_quiet() {
        let mut world = connected(1, Some(Link::with_delay(ms(10))));
        let before = world.hosts[0].sent;
        world.run_for(600 * SECOND);

        let sent = world.hosts[0].sent - before;
        assert!(sent < 250, "{sent} datagrams in ten minutes");
    }
}

mod restart {
    use super::*;

    #[test]
    fn a_peer_that_lost_its_keys_is_found_again() {
        for_seeds(60, |seed| {
            let direct = (seed % 2 == 0).then_some(Link::with_delay(ms(10)));
            let mut world = connected(seed, direct);
            let next = talk(&mut world, 0, ms(20), SECOND);

            world.restart_host(1, false);
            world.admit(1, 0, false);
            let next = talk(&mut world, next, ms(20), 5 * SECOND);
            world.run_for(ms(200));

            world.hosts[1].received.clear();
            talk(&mut world, next, ms(20), SECOND);
            world.run_for(ms(100));
            assert_eq!(world.received(1).len(), 50);
        });
    }

    #[test]
    fn a_peer_with_a_new_key_takes_over_its_address() {
        for_seeds(40, |seed| {
            let direct = (seed % 2 == 0).then_some(Link::with_delay(ms(10)));
            let mut world = connected(seed, direct);
            let old = world.hosts[1].key;
            world.send(0, 1, 1);
            world.run_for(ms(100));

            world.restart_host(1, true);
            let new = world.hosts[1].key;
            world.introduce(0, 1);
            world.send(0, 1, 2);

            assert!(world.run_while_not(SECOND, |world| world.received(1) == [1, 2]));
            let replaced = NodeEvent::PeerReplaced { old, new };
            assert!(world.hosts[0].events.iter().any(|(_, event)| *event == replaced));
        });
    }

    #[test]
    fn a_changed_preshared_key_needs_both_sides() {
        let mut world = connected(1, None);
        let mut peer = world.peer_config(1);
        peer.preshared_key = Some([8; 32]);
        world.upsert(0, peer, true);
        world.send(0, 1, 1);
        world.run_for(5 * SECOND);
        assert!(world.received(1).is_empty());

        let mut peer = world.peer_config(0);
        peer.preshared_key = Some([8; 32]);
        world.upsert(1, peer, false);
        world.run_for(6 * SECOND);

        assert_eq!(world.received(1), [1]);
    }
}

mod hostile {
    use super::*;

    /// A connected pair, and all that went over the wire since.
    fn captured(seed: u64) -> World {
        let mut world = connected(seed, Some(Link::with_delay(ms(10))));
        world.capture = Some(Vec::new());
        talk(&mut world, 0, ms(20), SECOND);
        world.run_for(ms(100));
        world
    }

    /// What host 0 sent straight to host 1 since the capture began.
    fn datagrams(world: &mut World) -> Vec<Vec<u8>> {
        let captured = world.capture.take().unwrap();
        captured.into_iter().filter(|one| one.from == 0 && one.path != Path::Relay).map(|one| one.bytes).collect()
    }

    #[test]
    fn unknown_peers_are_reported_and_never_answered() {
        for_seeds(30, |seed| {
            let mut world = world(seed, Some(Link::with_delay(ms(10))));
            world.admit(0, 1, true);

            world.run_for(2 * SECOND);

            let stranger = world.hosts[0].key;
            let reports = &world.hosts[1].events;
            assert!(!reports.is_empty() && reports.len() <= 3, "{}", reports.len());
            assert!(reports.iter().all(|(_, event)| *event == NodeEvent::UnknownPeer(stranger)));
            assert_eq!(world.hosts[1].sent, 0);
            assert!(world.counters(1).unknown_peer >= 6);
        });
    }

    #[test]
    fn a_stranger_that_is_admitted_is_answered_at_once() {
        for_seeds(50, |seed| {
            let mut world = world(seed, None);
            world.admit(0, 1, true);
            world.send(0, 1, 1);
            assert!(world.run_while_not(SECOND, |world| !world.hosts[1].events.is_empty()));
            world.run_for(ms(30));

            world.admit(1, 0, false);

            assert!(world.run_while_not(ms(81), |world| world.received(1) == [1]));
        });
    }

    #[test]
    fn many_strangers_are_reported_a_few_times() {
        let mut world = World::new(1);
        let victim = world.add_host();
        for _ in 0..20 {
            let id = world.add_host();
            world.link(id, victim, Link::with_delay(ms(1)));
            world.admit(id, victim, true);
        }
        world.run_for(ms(900));

        assert_eq!(world.hosts[victim].events.len(), 4);
        assert_eq!(world.hosts[victim].sent, 0);
    }

    #[test]
    fn a_flood_of_handshakes_is_answered_with_cookies_that_let_the_honest_through() {
        let mut world = World::new(1);
        let victim = world.add_host();
        for _ in 0..200 {
            let id = world.add_host();
            world.link(id, victim, Link::with_delay(ms(1)));
            world.admit(id, victim, true);
        }
        let honest = 200;
        world.admit(victim, honest, false);
        world.run_for(2 * SECOND);

        assert!(world.counters(victim).rate_limited > 0);
        assert!(world.run_while_not(8 * SECOND, |world| world.has_session(honest)));
    }

    #[test]
    fn replays_are_dropped_counted_and_not_answered() {
        for_seeds(10, |seed| {
            let mut world = captured(seed);
            let (before, received) = (world.counters(1), world.received(1).len());
            let datagrams = datagrams(&mut world);
            let sent = world.hosts[1].sent;
            let elsewhere = Path::Direct(SocketAddr::from(([203, 0, 113, 9], 9)));

            for datagram in &datagrams {
                world.inject(1, elsewhere, None, datagram);
            }

            assert_eq!(world.counters(1).replayed - before.replayed, datagrams.len() as u64);
            assert_eq!((world.received(1).len(), world.hosts[1].sent), (received, sent));
            assert!(world.is_direct(1, 0), "a replay moves nothing");
        });
    }

    #[test]
    fn a_replayed_initiation_is_not_answered() {
        let mut world = world(1, Some(Link::with_delay(ms(10))));
        world.capture = Some(Vec::new());
        world.introduce(0, 1);
        world.run_for(3 * SECOND);
        let initiation = datagrams(&mut world).into_iter().find(|bytes| bytes[0] == 1).unwrap();
        let path = Path::Direct(world.hosts[0].endpoint);
        let sent = world.hosts[1].sent;

        world.inject(1, path, None, &initiation);
        let late = 30 * SECOND;
        let (soon, sent_soon) = (world.counters(1).replayed, world.hosts[1].sent);
        world.run_for(late);
        let before = world.hosts[1].sent;
        world.inject(1, path, None, &initiation);

        assert_eq!((soon, sent_soon), (1, sent));
        assert_eq!((world.counters(1).replayed, world.hosts[1].sent), (2, before));
    }

    #[test]
    fn forged_truncated_and_oversized_datagrams_are_dropped_and_not_answered() {
        for_seeds(20, |seed| {
            let mut world = captured(seed);
            let mut datagrams = datagrams(&mut world);
            let (received, sent) = (world.received(1).len(), world.hosts[1].sent);
            datagrams.push(vec![0; 148]);
            let paths = [Path::Direct(SocketAddr::from(([203, 0, 113, 9], 9))), Path::Relay];
            let source = world.hosts[0].key;
            let mut count = 0;
            let total = |world: &World| {
                let counters = world.counters(1);
                counters.forged
                    + counters.malformed
                    + counters.replayed
                    + counters.stale
                    + counters.unknown_peer
                    + counters.rate_limited
            };
            let before = total(&world);

            for round in 0..400 {
                let at = world.random.below(datagrams.len() as u64) as usize;
                let mut bytes = datagrams[at].clone();
                match round % 4 {
                    0 => {
                        let bit = world.random.below(bytes.len() as u64 * 8) as usize;
                        bytes[bit / 8] ^= 1 << (bit % 8);
                    }
                    1 => bytes.truncate(world.random.below(bytes.len() as u64) as usize),
                    2 => bytes.resize(bytes.len() + 1 + world.random.below(60_000) as usize, 7),
                    _ => {
                        for byte in &mut bytes[12..] {
                            *byte = world.random.next() as u8;
                        }
                    }
                }
                world.inject(1, paths[round % 2], Some(source), &bytes);
                count += 1;
            }
            for kind in 0..=5 {
                for len in [0, 1, 3, 4, 8, 16, 31, 32, 64, 92, 148, 1500, 65_535] {
                    let mut bytes = vec![0; len];
                    if let Some(first) = bytes.first_mut() {
                        *first = kind;
                    }
                    world.inject(1, paths[0], None, &bytes);
                    count += 1;
                }
            }

            assert_eq!(total(&world) - before, count);
            assert_eq!((world.received(1).len(), world.hosts[1].sent), (received, sent));
        });
    }

    #[test]
    fn spoofed_inner_sources_are_dropped() {
        let mut world = connected(1, None);
        let mut spoofed = packet("fd12::99".parse().unwrap(), world.hosts[1].address, 9, 100);
        world.input(0, |node, now| node.handle_packet(now, &spoofed));
        spoofed[0] = 0x45;
        world.run_for(SECOND);

        assert_eq!(world.counters(1).spoofed, 1);
        assert!(world.received(1).is_empty());
        world.input(0, |node, now| node.handle_packet(now, &spoofed));
        assert_eq!(world.counters(0).malformed, 1);
    }

    #[test]
    fn the_relay_cannot_say_that_another_sent_it() {
        let mut world = captured(1);
        let datagrams = datagrams(&mut world);
        let third = world.add_host();
        let key = world.hosts[third].key;
        let before = world.counters(1).forged;

        world.inject(1, Path::Relay, Some(key), &datagrams[0]);

        assert_eq!(world.counters(1).forged, before + 1);
    }

    #[test]
    fn a_removed_peer_is_cut_at_once() {
        for_seeds(10, |seed| {
            let mut world = connected(seed, Some(Link::with_delay(ms(10))));
            let key = world.hosts[0].key;
            world.send(0, 1, 1);

            world.input(1, |node, now| {
                assert!(node.remove_peer(now, &key).is_some());
                assert!(node.remove_peer(now, &key).is_none());
            });
            world.capture = Some(Vec::new());
            world.send(1, 0, 2);
            talk(&mut world, 3, ms(50), 3 * SECOND);

            assert!(world.received(1).is_empty() && world.received(0).is_empty());
            assert!(world.capture.as_ref().unwrap().iter().all(|datagram| datagram.from == 0));
            assert!(world.counters(1).no_route > 0 && world.counters(1).unknown_peer > 0);
            // Admitted again, it goes on by itself.
            world.admit(1, 0, false);
            world.send(0, 1, 1000);
            assert!(world.run_while_not(6 * SECOND, |world| world.received(1).contains(&1000)));
        });
    }
}

mod chance {
    use super::*;

    /// Anything may happen to the network for a minute; ten seconds after it is whole again, data flows directly.
    #[test]
    fn whatever_happened_a_whole_network_is_used_again() {
        for_seeds(300, |seed| {
            let mut world = world(seed, Some(Link::with_delay(ms(10)).with_reordering(100, ms(20))));
            world.introduce(0, 1);
            for number in 0..30 {
                match world.random.below(9) {
                    0 => world.set_link_up(0, 1, false),
                    1 => world.set_link_up(0, 1, true),
                    2 => {
                        let back = [ms(world.random.below(3000)), ms(world.random.below(3000))];
                        world.restart_relay(&back);
                    }
                    3 => {
                        let host = world.random.below(256) as u8;
                        world.hosts[0].endpoint = SocketAddr::from(([198, 51, 100, host], 1000));
                        world.input(0, |node, now| node.network_changed(now));
                    }
                    4 => {
                        world.restart_host(1, false);
                        world.admit(1, 0, false);
                    }
                    5 => world.relay.loss = world.random.below(300),
                    _ => {}
                }
                world.send(0, 1, number);
                world.send(1, 0, number);
                let pause = ms(world.random.below(4000));
                world.run_for(pause);
            }
            world.run_for(3 * SECOND);
            world.relay.loss = 0;
            world.set_link_up(0, 1, true);
            talk(&mut world, 1000, ms(100), 30 * SECOND);

            world.hosts.iter_mut().for_each(|host| host.received.clear());
            talk(&mut world, 10_000, ms(20), SECOND);
            world.run_for(ms(200));

            for (id, other) in [(0, 1), (1, 0)] {
                let mut received = world.received(id);
                received.sort_unstable();
                assert_eq!(received, (10_000..10_050).collect::<Vec<_>>());
                assert!(world.is_direct(id, other), "{:?}", world.status(id, other).paths);
            }
        });
    }
}
