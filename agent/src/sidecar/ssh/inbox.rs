//! The queue from the connection's loop to a channel's task, for what the client sends.
//!
//! The loop must not wait for a program that does not read: it serves all channels, and the program may be waiting for
//! output that only the loop can send. So the queue itself accepts everything and the SSH window bounds it: while more
//! than [`HIGH_WATER`] is queued for any channel, windows are not reopened. A client that ignores its windows runs into
//! [`MAX_QUEUED`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::mpsc;

/// In bytes; above it the client's window is not reopened.
pub(super) const HIGH_WATER: usize = 1 << 20;
/// In bytes; only a client that ignores its windows can exceed it.
pub(super) const MAX_QUEUED: usize = 64 << 20;
/// Memory of an entry besides its data, in bytes.
const ENTRY_OVERHEAD: usize = 64;

/// One message from a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// Bytes for the program or the connection.
    Data(Bytes),
    /// The client has sent its last byte.
    Eof,
    /// The terminal's new size.
    Resize { rows: u16, cols: u16 },
    /// A signal, as SSH names it.
    Signal(String),
}

impl Input {
    fn weight(&self) -> usize {
        ENTRY_OVERHEAD
            + match self {
                Self::Data(bytes) => bytes.len(),
                Self::Signal(name) => name.len(),
                Self::Eof | Self::Resize { .. } => 0,
            }
    }
}

/// The connection's side. Dropping it closes the channel.
pub(super) struct Inbox {
    queue: mpsc::UnboundedSender<Input>,
    waiting: Arc<AtomicUsize>,
}

/// The channel task's side.
pub(super) struct Inputs {
    queue: mpsc::UnboundedReceiver<Input>,
    waiting: Arc<AtomicUsize>,
}

pub(super) fn inbox() -> (Inbox, Inputs) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    (Inbox { queue: sender, waiting: Arc::clone(&waiting) }, Inputs { queue: receiver, waiting })
}

impl Inbox {
    /// Queues an input; false if the queue is full. Drops the input if the task has ended.
    pub(super) fn push(&self, input: Input) -> bool {
        let weight = input.weight();
        if self.waiting() + weight > MAX_QUEUED {
            return false;
        }
        self.waiting.fetch_add(weight, Ordering::Relaxed);
        let _ = self.queue.send(input);
        true
    }

    /// Queued bytes; zero once the task has ended.
    pub(super) fn waiting(&self) -> usize {
        if self.is_over() { 0 } else { self.waiting.load(Ordering::Relaxed) }
    }

    /// Whether the channel's task has ended.
    pub(super) fn is_over(&self) -> bool {
        self.queue.is_closed()
    }
}

impl Inputs {
    /// The next input; `None` once the channel is closed. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Input> {
        let input = self.queue.recv().await?;
        self.waiting.fetch_sub(input.weight(), Ordering::Relaxed);
        Some(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn queued_input_is_counted_until_it_is_taken() {
        let (inbox, mut inputs) = inbox();
        assert!(inbox.push(Input::Data(Bytes::from(vec![0; HIGH_WATER]))));
        assert!(inbox.push(Input::Eof));
        assert!(inbox.waiting() > HIGH_WATER);
        assert!(matches!(inputs.next().await, Some(Input::Data(_))));
        assert_eq!(inputs.next().await, Some(Input::Eof));
        assert_eq!(inbox.waiting(), 0);
        drop(inbox);
        assert_eq!(inputs.next().await, None);
    }

    #[test]
    fn a_client_that_ignores_its_window_meets_the_limit() {
        let (inbox, inputs) = inbox();
        let part = Bytes::from(vec![0; 1 << 20]);
        let taken = (0..100).take_while(|_| inbox.push(Input::Data(part.clone()))).count();
        assert_eq!(taken, 63);
        drop(inputs);
        assert_eq!(inbox.waiting(), 0);
    }
}
