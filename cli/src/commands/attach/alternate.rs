//! Tracks whether the alternate screen is shown, from the bytes sent to the terminal.
//!
//! When detaching we must know, because the sequence that leaves the alternate screen moves the cursor if it is not
//! shown.

/// The private modes that switch to it (xterm, "Private Modes").
const MODES: [&[u8]; 3] = [b"47", b"1047", b"1049"];
/// In bytes; a longer parameter string is not one of [`MODES`].
const MAX_PARAMETERS: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Alternate {
    shown: bool,
    state: State,
    parameters: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy)]
enum State {
    #[default]
    Text,
    /// After ESC.
    Escape,
    /// After ESC [.
    Sequence,
    /// After ESC [ ?.
    Private,
}

impl Alternate {
    /// Processes output; returns whether the alternate screen is shown after it.
    pub(super) fn feed(&mut self, output: &[u8]) -> bool {
        for &byte in output {
            self.state = match (self.state, byte) {
                (_, 0x1b) => State::Escape,
                (State::Escape, b'[') => State::Sequence,
                (State::Escape, b'c') => {
                    self.shown = false; // a full reset (RIS)
                    State::Text
                }
                (State::Sequence, b'?') => {
                    self.parameters.clear();
                    State::Private
                }
                (State::Private, b'0'..=b'9' | b';') if self.parameters.len() < MAX_PARAMETERS => {
                    self.parameters.push(byte);
                    State::Private
                }
                (State::Private, b'h' | b'l') => {
                    if self.parameters.split(|byte| *byte == b';').any(|mode| MODES.contains(&mode)) {
                        self.shown = byte == b'h';
                    }
                    State::Text
                }
                _ => State::Text,
            };
        }
        self.shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_are_recognised_across_reads() {
        let output = b"text\x1b[?25l\x1b[?1049h\x1b[2Jvim";
        for cut in 0..output.len() {
            let mut alternate = Alternate::default();
            alternate.feed(&output[..cut]);
            assert!(alternate.feed(&output[cut..]), "cut at {cut}");
            assert!(!alternate.feed(b"\x1b[?1049l"));
        }
    }

    #[test]
    fn other_modes_are_ignored() {
        let mut alternate = Alternate::default();
        assert!(!alternate.feed(b"\x1b[?1h\x1b[?2004h\x1b[47h?1049h\x1b[1049h"));
        assert!(alternate.feed(b"\x1b[?25;47h"));
        assert!(!alternate.feed(b"\x1bc"));
    }
}
