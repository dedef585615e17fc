//! A private network of two: a WireGuard peer and a TCP stack, both in user space.
//!
//! A laptop and a weaver each run one node. Between them is a WireGuard session that carries IPv6 with TCP; there is no
//! TUN device and no need for root, and applications see only byte streams ([`TunnelStream`]). Packets take the best of
//! several paths: direct UDP where it works, and otherwise the server's relay, which sees only ciphertext.
//!
//! # How a byte travels
//!
//! ```text
//! application            netstack                node                     driver
//! TunnelStream ──────▶ TCP segment ──────▶ encrypt, choose path ──────▶ UDP socket ──▶ ⋯ direct ⋯
//!              bytes               IPv6                         batch └─▶ relay frame ─▶ ⋯ server ⋯
//! ```
//!
//! The core is *sans-IO*: [`node::Node`] owns peers, sessions, paths and timers, but no socket, clock or task. The time
//! is an argument of each call, and the caller polls for what to do. So the same node runs in the agent, in the CLI's
//! daemon and in the simulator of `tests/simulation.rs`, where hours of packet loss, restarts and roaming pass in
//! milliseconds. Only [`driver`] uses sockets and tokio.
//!
//! # How two nodes meet
//!
//! 1. The application tells each node about the other ([`PeerConfig`]): key, pre-shared key, tunnel address, UDP
//!    addresses to try. The initiator sends a WireGuard handshake over the relay and to every address at once, and again
//!    after 100, 250, 500 ms ([`retry`]). The responder answers on the path on which it arrived first.
//! 2. With the answer there is a session, and data flows: after one round trip, usually over the relay.
//! 3. Pings inside the session look for direct paths ([`path`]), in a burst that opens NAT mappings from both sides.
//!    Data moves to the first path that answers; if several do, to that with the shortest round trip.
//! 4. From then on the path in use is pinged every half second while it is busy. After one lost ping data is also sent
//!    over the relay, after three only there. While no path works, packets are queued ([`pending`]) until one does. So
//!    a session survives a relay's restart, and TCP inside it sees only a pause.
//! 5. WireGuard renews its keys every two minutes. When both sides have keys but nothing arrives on paths that worked,
//!    a new handshake is made: the peer may have been restarted.
//!
//! The peer may be any WireGuard implementation: others are not pinged, and replies go to where their packets come from.
//!
//! # What is refused
//!
//! Datagrams that do not authenticate, were seen before, or belong to no session are counted by reason
//! ([`node::Counters`]) and never answered. A peer may only use its own address inside the tunnel. A handshake from an
//! unknown key becomes an event, so that the application can find out who it is. Every queue is bounded in bytes.

pub mod driver;
pub mod forward;
mod netstack;
pub mod node;
pub mod output;
pub mod path;
pub mod peer;
pub mod pending;
mod random;
pub mod relay;
pub mod retry;
mod stream;
mod wireguard;

pub use driver::{Config, ConnectError, Events, Incoming, IncomingConnection, Tunnel, TunnelEvent};
pub use path::{PathKind, PathStatus};
pub use peer::{PeerConfig, PeerStatus};
pub use stream::TunnelStream;
pub use x25519_dalek::{PublicKey, StaticSecret};
