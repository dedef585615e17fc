//! A private network of two: a WireGuard peer and a TCP stack, both in user space.
//!
//! A laptop and a weaver each run one node. Between the two there is a WireGuard session, over it IPv6, in it TCP; no
//! TUN device, no root, and nothing that an application sees of it but byte streams ([`TunnelStream`]). Packets take
//! the best of several ways: straight UDP where it works, and the server's relay, which sees only ciphertext, where
//! it does not.
//!
//! # How a byte travels
//!
//! ```text
//! application            netstack                node                     driver
//! TunnelStream ──────▶ TCP segment ──────▶ encrypt, choose path ──────▶ UDP socket ──▶ ⋯ direct ⋯
//!              bytes               IPv6                         batch └─▶ relay frame ─▶ ⋯ server ⋯
//! ```
//!
//! The core is *sans-IO*: [`node::Node`] owns peers, sessions, paths and timers, but no socket, clock or task. Each
//! call takes the time; what is to be done is polled out of it. So the same node runs in the agent, in the CLI's daemon
//! and in the simulator of `tests/simulation.rs`, where hours of packet loss, restarts and roaming pass in
//! milliseconds. [`driver`] is the one place that knows sockets and tokio.
//!
//! # How two nodes meet
//!
//! 1. The application tells each node of the other ([`PeerConfig`]): key, pre-shared key, tunnel address, UDP addresses
//!    to try. The one that initiates sends a WireGuard handshake over the relay and to every address at once, and again
//!    after 100, 250, 500 ms ([`ladder`]). The other answers on the way by which it came first.
//! 2. With the answer there is a session, and data flows: one round trip, mostly of the relay.
//! 3. Pings inside the session look for direct ways ([`path`]), in a burst that opens NAT mappings from both sides. The
//!    first that is answered takes over the data; where several are, the round trip decides.
//! 4. From then on the way in use is pinged every half second while it is busy. A lost ping sends data over the relay
//!    as well; three move it there. While no way works, packets wait ([`backlog`]) and go when one returns; a session
//!    outlives any relay's restart, and TCP inside it sees only a pause.
//! 5. WireGuard renews its keys every two minutes. When both sides have keys but hear nothing on ways that worked, the
//!    handshake is made anew: the other one has perhaps been restarted.
//!
//! Any WireGuard implementation can be the other side: it is not pinged, and is followed to where its packets come
//! from.
//!
//! # What is refused
//!
//! Datagrams that do not authenticate, were seen before, or are for nobody are counted by their reason
//! ([`node::Counters`]) and never answered. A peer may use only its own address inside the tunnel. A handshake from an
//! unknown key becomes an event, so that the application can ask who that is. Every queue is bounded in bytes.

pub mod backlog;
pub mod driver;
pub mod forward;
pub mod ladder;
mod netstack;
pub mod node;
pub mod output;
pub mod path;
pub mod peer;
mod random;
pub mod relay;
mod stream;
mod wireguard;

pub use driver::{Config, ConnectError, Events, Incoming, IncomingConnection, Tunnel, TunnelEvent};
pub use path::{PathKind, PathStatus};
pub use peer::{PeerConfig, PeerStatus};
pub use stream::TunnelStream;
pub use x25519_dalek::{PublicKey, StaticSecret};
