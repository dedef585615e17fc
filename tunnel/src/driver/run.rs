//! The driver's loop.

use std::{future::poll_fn, net::SocketAddr, sync::Arc, time::Instant};

use parking_lot::MutexGuard;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::{
    Core, IncomingConnection, Shared, TunnelEvent,
    udp::{Sent, UdpSockets},
};
use crate::{node::NodeEvent, path::PathKind};

/// Packets built and encrypted per lock acquisition: about 100 µs of work.
const BATCH: usize = 64;

/// Batches received before sending and vice versa, so that acknowledgements are neither late nor too many.
const TURN: usize = 8;

/// Turns before yielding to other tasks of the runtime.
const TURNS: usize = 16;

/// The task that owns the sockets.
pub(super) struct Driver {
    shared: Arc<Shared>,
    udp: UdpSockets,
    connections: mpsc::Sender<IncomingConnection>,
    events: mpsc::Sender<TunnelEvent>,
    batch: Vec<u8>,
    /// What a full socket did not take of `batch`: destination, segment size, and offset.
    unsent: Option<(SocketAddr, usize, usize)>,
}

/// What to do after a turn.
enum Next {
    /// Continue.
    Work,
    /// Nothing until something happens, or until this moment.
    Wait(Option<Instant>),
}

/// What the driver has to do next for the state machines.
enum Step {
    /// The batch is to be sent there, in segments of this size.
    Send(SocketAddr, usize),
    /// Nothing until something happens, or until this moment.
    Wait(Option<Instant>),
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        udp: UdpSockets,
        connections: mpsc::Sender<IncomingConnection>,
        events: mpsc::Sender<TunnelEvent>,
    ) -> Self {
        Self { shared, udp, connections, events, batch: Vec::new(), unsent: None }
    }

    /// Runs until the node ends; then resets every connection.
    pub(super) async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        while !shared.ended.is_cancelled() {
            match self.work() {
                Next::Work => tokio::task::yield_now().await,
                Next::Wait(deadline) => {
                    tokio::select! {
                        () = shared.ended.cancelled() => {}
                        () = shared.wake.notified() => {}
                        () = poll_fn(|cx| self.udp.poll_readable(cx)) => {}
                        () = writable(&self.udp, self.unsent) => {}
                        () = sleep_until(deadline) => {}
                    }
                }
            }
        }
        {
            let mut core = shared.lock();
            core.closed = true;
            core.netstack.reset(None);
        }
        self.send();
    }

    fn work(&mut self) -> Next {
        for _ in 0..TURNS {
            let received = self.receive();
            match self.send() {
                Next::Wait(deadline) if !received => return Next::Wait(deadline),
                _ => {}
            }
        }
        Next::Work
    }

    /// Receives what has arrived; returns whether there may be more.
    fn receive(&mut self) -> bool {
        for _ in 0..TURN {
            // Locked only after the system call, with the first datagram.
            let mut core: Option<MutexGuard<'_, Core>> = None;
            let now = Instant::now();
            let shared = &self.shared;
            let received = self.udp.receive(&mut |remote, datagram| {
                let core = core.get_or_insert_with(|| shared.lock());
                core.handle_datagram(now, PathKind::Direct(remote), None, datagram);
            });
            if !received {
                return false;
            }
        }
        true
    }

    /// Sends what is due.
    fn send(&mut self) -> Next {
        if let Some((remote, segment, start)) = self.unsent.take()
            && let Sent::Full(more) = self.udp.send(remote, segment, &self.batch[start..])
        {
            self.unsent = Some((remote, segment, start + more));
            return Next::Wait(self.shared.lock().deadline());
        }
        for _ in 0..TURN {
            match self.step() {
                Step::Wait(deadline) => return Next::Wait(deadline),
                Step::Send(remote, segment) => {
                    if let Sent::Full(start) = self.udp.send(remote, segment, &self.batch) {
                        self.unsent = Some((remote, segment, start));
                        return Next::Wait(self.shared.lock().deadline());
                    }
                }
            }
        }
        Next::Work
    }

    /// Runs the state machines until there is a batch to send.
    fn step(&mut self) -> Step {
        let now = Instant::now();
        let mut core = self.shared.lock();
        let mut relayed = !core.relay.is_empty();
        let step = loop {
            if let Some((remote, segment, batch)) = core.final_batches.pop_front() {
                self.batch = batch;
                break Step::Send(remote, segment);
            }
            match core.node.poll_transmit(&mut self.batch) {
                Some(transmit) => match transmit.path {
                    PathKind::Direct(remote) => break Step::Send(remote, transmit.segment_size),
                    PathKind::Relay => {
                        core.push_relay(&transmit.peer, transmit.segment_size, &self.batch);
                        relayed = true;
                    }
                },
                None if !core.advance(now) => break Step::Wait(core.deadline()),
                None => {}
            }
        };
        while let Some(event) = core.node.poll_event() {
            handle_event(&mut core, now, event, &self.events);
        }
        let mut wanted = Vec::new();
        while let Some(flow) = core.netstack.poll_incoming() {
            let Some(&peer) = core.peers.get(&flow.remote) else { continue };
            wanted.push((peer, flow));
        }
        drop(core);
        if relayed {
            self.shared.relay_ready.notify_one();
        }
        for (peer, flow) in wanted {
            let connection = IncomingConnection {
                peer,
                peer_address: flow.remote,
                port: flow.local_port,
                shared: Arc::clone(&self.shared),
                flow: Some(flow),
            };
            // The application does not accept, or too slowly. Dropping the connection refuses it.
            if self.connections.try_send(connection).is_err() {
                debug!(port = flow.local_port, "refusing a connection that the application does not accept");
            }
        }
        step
    }
}

impl Core {
    /// Builds and encrypts the packets that are due; returns whether there were any.
    pub(super) fn advance(&mut self, now: Instant) -> bool {
        let is_due = |core: &Self| core.node.poll_timeout().is_some_and(|at| at <= now);
        let mut any = false;
        if is_due(self) {
            self.node.handle_timeout(now);
            // Still due: leave it to another turn instead of looping endlessly.
            any = !is_due(self);
        }
        self.netstack.poll(now, BATCH);
        self.netstack.drain(|packet| {
            self.node.handle_packet(now, packet);
            any = true;
        });
        any
    }

    /// Moves everything that is ready to be sent to `final_batches`.
    pub(super) fn take_final_batches(&mut self) {
        let mut batch = Vec::new();
        while let Some(transmit) = self.node.poll_transmit(&mut batch) {
            match transmit.path {
                PathKind::Direct(remote) => {
                    self.final_batches.push_back((remote, transmit.segment_size, std::mem::take(&mut batch)));
                }
                PathKind::Relay => self.push_relay(&transmit.peer, transmit.segment_size, &batch),
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        [self.node.poll_timeout(), self.netstack.poll_timeout()].into_iter().flatten().min()
    }

    /// Queues a batch for the relay; if the queue is full, pauses the TCP connections to the peer.
    fn push_relay(&mut self, peer: &x25519_dalek::PublicKey, segment: usize, batch: &[u8]) {
        self.relay.push(peer, segment, batch);
        if self.relay.is_full()
            && let Some(address) = self.address_of(peer)
        {
            self.relay.note_blocked(address);
            self.netstack.set_blocked(address, true);
        }
    }
}

fn handle_event(core: &mut Core, now: Instant, event: NodeEvent, events: &mpsc::Sender<TunnelEvent>) {
    match event {
        NodeEvent::UnknownPeer(key) => {
            // If the channel is full the event is dropped; the peer's next attempt makes another.
            _ = events.try_send(TunnelEvent::UnknownPeer(key));
        }
        NodeEvent::SessionEstablished(key) => {
            let address = core.address_of(&key);
            if address.is_some() {
                core.netstack.retransmit_now(now, address);
            }
        }
        NodeEvent::PathChanged { peer, path } => {
            let address = core.address_of(&peer);
            info!(address = ?address, path = ?path, "the path to a peer changed");
            if address.is_some() && path.is_some() {
                core.netstack.retransmit_now(now, address);
            }
        }
        // `add_peer` has reset its connections.
        NodeEvent::PeerReplaced { .. } => {}
    }
}

async fn writable(udp: &UdpSockets, unsent: Option<(SocketAddr, usize, usize)>) {
    match unsent {
        Some((remote, ..)) => poll_fn(|cx| udp.poll_writable(remote, cx)).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
