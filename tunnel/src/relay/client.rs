//! Maintains the relay connection and exchanges frames over it.

use std::{io, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::time::{Instant, timeout};
use tracing::{debug, info};
use x25519_dalek::PublicKey;

use super::{RelayChannel, RelayConnector, frame};
use crate::{driver::Shared, path::PathKind, random::Random};

/// The pause between attempts doubles from the first to the second. Each is randomly shortened by up to half, so that
/// not all clients reconnect to a restarted server at once.
const MIN_PAUSE: Duration = Duration::from_millis(250);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// A connection that lasted this long resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// For one attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection on which no byte can be written for this long is dead.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// Frames written before they are flushed.
const WRITE_BATCH: usize = 8;

/// Maintains the relay connection until the node ends. When the host's network changes, drops the connection, which would
/// otherwise have to time out, and ends a pause early.
pub(crate) async fn run(shared: &Arc<Shared>, connector: impl RelayConnector) {
    let mut network = shared.network.subscribe();
    // Only for jitter, so the clock is random enough.
    let mut random = Random::new(
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64),
    );
    let mut pause = MIN_PAUSE;
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
                    ended = exchange(shared, channel) => Some(ended),
                };
                set_up(shared, false);
                match ended {
                    None => {
                        info!("the network has changed; reconnecting to the relay");
                        pause = MIN_PAUSE;
                        continue;
                    }
                    Some(Ok(())) => info!("the relay connection ended"),
                    Some(Err(error)) => info!(%error, "the relay connection broke"),
                }
                if since.elapsed() >= STABLE_AFTER {
                    pause = MIN_PAUSE;
                }
            }
            Err(error) => debug!(%error, "cannot connect to the relay"),
        }
        let shortened = pause.mul_f64(1.0 - random.below(500) as f64 / 1000.0);
        pause = (pause * 2).min(MAX_PAUSE);
        tokio::select! {
            () = shared.ended.cancelled() => return,
            _ = network.changed() => pause = MIN_PAUSE,
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
        core.netstack.retransmit_now(now, None);
    }
    drop(core);
    shared.wake();
}

/// Sends and receives frames until either direction ends.
async fn exchange(shared: &Shared, (sink, stream): RelayChannel) -> io::Result<()> {
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
        // Does not copy unless the message is shared, which is unusual.
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
