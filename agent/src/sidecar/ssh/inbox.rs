//! What a client sends on one channel, on its way from the connection's loop to the channel's task.
//!
//! The loop never waits for a program that does not read: it serves all channels, and the program may in turn wait for
//! output that only the loop can take away. So the queue takes everything, and what bounds it is the SSH window: while
//! more than [`ENOUGH`] waits anywhere, windows are no longer opened. A client that sends beyond its windows meets
//! [`LIMIT`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use tokio::sync::mpsc;

/// With more bytes than this waiting, the client is given no more window.
pub(super) const ENOUGH: usize = 1 << 20;
/// With more bytes than this waiting, the client does not keep to its windows.
pub(super) const LIMIT: usize = 64 << 20;
/// What one entry weighs beside its bytes.
const ENTRY: usize = 64;

/// One message from a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// Bytes for the program or the connection.
    Data(Bytes),
    /// The client will send no more bytes.
    Eof,
    /// The terminal's new size.
    Resize { rows: u16, cols: u16 },
    /// A signal, as SSH names it.
    Signal(String),
}

impl Input {
    fn weight(&self) -> usize {
        ENTRY
            + match self {
                Self::Data(bytes) => bytes.len(),
                Self::Signal(name) => name.len(),
                Self::Eof | Self::Resize { .. } => 0,
            }
    }
}

/// The connection's end. Dropping it says that the channel is closed.
pub(super) struct Inbox {
    queue: mpsc::UnboundedSender<Input>,
    waiting: Arc<AtomicUsize>,
}

/// The channel's end.
pub(super) struct Inputs {
    queue: mpsc::UnboundedReceiver<Input>,
    waiting: Arc<AtomicUsize>,
}

/// An empty queue.
pub(super) fn inbox() -> (Inbox, Inputs) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let waiting = Arc::new(AtomicUsize::new(0));
    (Inbox { queue: sender, waiting: Arc::clone(&waiting) }, Inputs { queue: receiver, waiting })
}

impl Inbox {
    /// Adds one thing; false when there is too much already. What a task that has ended is not told is of no interest.
    pub(super) fn push(&self, input: Input) -> bool {
        let weight = input.weight();
        if self.waiting() + weight > LIMIT {
            return false;
        }
        self.waiting.fetch_add(weight, Ordering::Relaxed);
        let _ = self.queue.send(input);
        true
    }

    /// Bytes that wait; none once the task has ended.
    pub(super) fn waiting(&self) -> usize {
        if self.is_over() { 0 } else { self.waiting.load(Ordering::Relaxed) }
    }

    /// Whether the channel's task has ended.
    pub(super) fn is_over(&self) -> bool {
        self.queue.is_closed()
    }
}

impl Inputs {
    /// The next thing; `None` once the channel is closed. Cancel-safe.
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
    async fn what_waits_is_counted_until_it_is_taken() {
        let (inbox, mut inputs) = inbox();
        assert!(inbox.push(Input::Data(Bytes::from(vec![0; ENOUGH]))));
        assert!(inbox.push(Input::Eof));
        assert!(inbox.waiting() > ENOUGH);
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
