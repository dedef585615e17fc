//! The network device for smoltcp: one packet in by reference, any number of packets out into one buffer.
//!
//! There is no segmentation offload: smoltcp 0.14 drops an IPv6 packet longer than the MTU even when the device offers
//! to split it.

use smoltcp::{
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    time::Instant,
};

/// The MTU inside the tunnel, in bytes: the minimum of IPv6 (RFC 8200 §5), so that it passes everywhere.
const MTU: usize = 1280;

/// Outgoing packets, one after the other in one allocation.
#[derive(Default)]
pub(super) struct PacketBuffer {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl PacketBuffer {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The newest packet.
    pub(super) fn last(&self) -> Option<&[u8]> {
        let start = self.ends.len().checked_sub(2).map_or(0, |before| self.ends[before]);
        self.ends.last().map(|&end| &self.bytes[start..end])
    }

    /// Appends a complete packet.
    pub(super) fn push(&mut self, packet: &[u8]) {
        self.bytes.extend_from_slice(packet);
        self.ends.push(self.bytes.len());
    }

    /// Passes all packets to `take`, oldest first, and keeps the memory for later ones.
    pub(super) fn drain(&mut self, mut take: impl FnMut(&[u8])) {
        let mut start = 0;
        for &end in &self.ends {
            take(&self.bytes[start..end]);
            start = end;
        }
        self.bytes.clear();
        self.ends.clear();
    }
}

/// The network device of one call into smoltcp: at most one packet to receive, and the buffer for those to send.
pub(super) struct Port<'p> {
    /// The packet to receive.
    pub(super) incoming: Option<&'p [u8]>,
    /// Where packets are sent.
    pub(super) out: &'p mut PacketBuffer,
}

impl Device for Port<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sender<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Sender<'_>)> {
        let packet = self.incoming.take()?;
        Some((Received(packet), Sender(self.out)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        Some(Sender(self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // Checksums stay on in both directions: foreign WireGuard peers with a kernel's TCP check them.
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// The packet that smoltcp is about to read.
pub(super) struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet that smoltcp is about to write.
pub(super) struct Sender<'a>(&'a mut PacketBuffer);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let start = self.0.bytes.len();
        self.0.bytes.resize(start + len, 0);
        let result = f(&mut self.0.bytes[start..]);
        self.0.ends.push(start + len);
        result
    }
}
