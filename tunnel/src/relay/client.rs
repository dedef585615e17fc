//! Keeps a relay connection up and carries frames.

use std::{io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::{Instant, timeout};
use tracing::{debug, info};
use x25519_dalek::PublicKey;

use super::{RelayChannel, RelayConnector, frame};
use crate::{driver::Shared, path::PathKind, random::Random};

/// Time between two attempts, doubled at each failure up to the second; each is shortened by up to half, at random, so
/// that a restarted server is not met by everybody at once.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A connection that has stood this long was a good one: the pauses begin anew.
const GOOD: Duration = Duration::from_secs(10);

/// How long one attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the relay may take no byte before the connection counts as dead.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// Frames written before they are flushed.
const WRITE_BATCH: usize = 8;

/// Keeps a relay connection up until the node ends. A change of the host's network drops the connection, since it would
/// only time out, and cuts a pause short.
pub(crate) async fn run(shared: &Arc<Shared>, connector: impl RelayConnector) {
    let mut network = shared.network.subscribe();
    // Which pause, not how long any secret lives: the clock is random enough.
    let mut random = Random::new(
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64),
    );
    let mut pause = FIRST_PAUSE;
    loop {
        network.mark_unchanged();
        let attempt = tokio::select! {
            () = shared.ended.cancelled() => return,
            attempt = timeout(CONNECT_TIMEOUT, connector.connect()) => attempt.map_err(io::Error::from).flatten(),
        };
        match attempt {
            Ok(channel) => {
                info!("the relay is connected");
                let since = Instant::now();
                set_up(shared, true);
                let ended = tokio::select! {
                    () = shared.ended.cancelled() => return set_up(shared, false),
                    _ = network.changed() => None,
                    ended = carry(shared, channel) => Some(ended),
                };
                set_up(shared, false);
                match ended {
                    None => {
                        info!("the network changed: connecting to the relay anew");
                        pause = FIRST_PAUSE;
                        continue;
                    }
                    Some(Ok(())) => info!("the relay connection ended"),
                    Some(Err(error)) => info!(%error, "the relay connection broke"),
                }
                if since.elapsed() >= GOOD {
                    pause = FIRST_PAUSE;
                }
            }
            Err(error) => debug!(%error, "cannot connect to the relay"),
        }
        let shortened = pause.mul_f64(1.0 - random.below(500) as f64 / 1000.0);
        pause = (pause * 2).min(LONGEST_PAUSE);
        tokio::select! {
            () = shared.ended.cancelled() => return,
            _ = network.changed() => pause = FIRST_PAUSE,
            () = tokio::time::sleep(shortened) => {}
        }
    }
}

fn set_up(shared: &Shared, up: bool) {
    let now = std::time::Instant::now();
    let mut core = shared.lock();
    core.relay.set_up(up);
    core.node.set_relay_up(now, up);
    for peer in core.relay.take_unblocked() {
        core.netstack.set_blocked(peer, false);
    }
    if up {
        core.netstack.hurry(now, None);
    }
    drop(core);
    shared.wake();
}

/// Carries frames both ways until one way ends.
async fn carry(shared: &Shared, (sink, stream): RelayChannel) -> io::Result<()> {
    tokio::select! {
        ended = send(shared, sink) => ended,
        ended = receive(shared, stream) => ended,
    }
}

async fn send(
    shared: &Shared,
    mut sink: std::pin::Pin<Box<dyn futures_util::Sink<Bytes, Error = io::Error> + Send>>,
) -> io::Result<()> {
    loop {
        shared.relay_ready.notified().await;
        loop {
            let frames = take_frames(shared);
            if frames.is_empty() {
                break;
            }
            timeout(WRITE_TIMEOUT, async {
                for frame in frames {
                    sink.feed(frame).await?;
                }
                sink.flush().await
            })
            .await??;
        }
    }
}

fn take_frames(shared: &Shared) -> Vec<Bytes> {
    let mut core = shared.lock();
    let frames = std::iter::from_fn(|| core.relay.pop()).take(WRITE_BATCH).collect();
    let unblocked = core.relay.take_unblocked();
    for &peer in &unblocked {
        core.netstack.set_blocked(peer, false);
    }
    drop(core);
    if !unblocked.is_empty() {
        shared.wake();
    }
    frames
}

async fn receive(
    shared: &Shared,
    mut stream: std::pin::Pin<Box<dyn futures_util::Stream<Item = io::Result<Bytes>> + Send>>,
) -> io::Result<()> {
    while let Some(message) = stream.next().await {
        // In place when nobody else holds the message, as is usual.
        let mut message = BytesMut::from(message?);
        handle_message(shared, &mut message)?;
        shared.wake();
    }
    Ok(())
}

fn handle_message(shared: &Shared, message: &mut BytesMut) -> io::Result<()> {
    let now = std::time::Instant::now();
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    match frame::decode(message).map_err(invalid)? {
        frame::Frame::PeerAbsent { peer } => {
            shared.lock().node.relay_peer_absent(now, &PublicKey::from(peer));
        }
        frame::Frame::Packets { peer, .. } => {
            let peer = PublicKey::from(peer);
            let mut core = shared.lock();
            // The lengths were checked by `decode`.
            let mut at = frame::HEADER_LEN;
            while let Some(&[high, low]) = message.get(at..at + frame::PACKET_HEADER_LEN) {
                let start = at + frame::PACKET_HEADER_LEN;
                at = start + usize::from(u16::from_be_bytes([high, low]));
                let Some(packet) = message.get_mut(start..at) else { break };
                core.handle_datagram(now, PathKind::Relay, Some(&peer), packet);
            }
        }
    }
    Ok(())
}
