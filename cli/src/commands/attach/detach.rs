//! The keys that detach from a terminal, recognised in the bytes from the keyboard.
//!
//! A key sequence may arrive in several reads, so its beginning is held back until the next key. If none comes,
//! [`Matcher::flush`] releases it, so that Ctrl+P alone still reaches the program.

use std::str::FromStr;

/// Ctrl+D, or Ctrl+P Ctrl+Q as in Docker.
pub(super) const DEFAULT: &str = "ctrl-d ctrl-p,ctrl-q";
/// In one sequence.
const MAX_KEYS: usize = 8;

/// Key sequences, each of which detaches. May be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys {
    /// The bytes of each sequence; none is empty.
    sequences: Vec<Vec<u8>>,
}

impl FromStr for DetachKeys {
    type Err = String;

    /// Sequences are separated by spaces, their keys by commas; a key is a character, or `ctrl-` and a character. `none`
    /// means no sequence.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "none" {
            return Ok(Self { sequences: Vec::new() });
        }
        let mut sequences = Vec::new();
        for sequence in text.split_whitespace() {
            let keys = sequence.split(',').map(key).collect::<Result<Vec<u8>, String>>()?;
            if keys.len() > MAX_KEYS {
                return Err(format!("more than {MAX_KEYS} keys in {sequence:?}"));
            }
            if let [control @ 1..=26] = keys[..] {
                // The same key in the encodings that a program can request: the kitty keyboard protocol and xterm's
                // modifyOtherKeys.
                let letter = control + b'a' - 1;
                sequences.push(format!("\x1b[{letter};5u").into_bytes());
                sequences.push(format!("\x1b[27;5;{letter}~").into_bytes());
            }
            sequences.push(keys);
        }
        if sequences.is_empty() {
            return Err("expected keys such as ctrl-d or ctrl-p,ctrl-q, or none".to_owned());
        }
        Ok(Self { sequences })
    }
}

/// The byte that a key sends.
fn key(text: &str) -> Result<u8, String> {
    let wrong = || format!("{text:?} is not a key: expected a character, or ctrl- and one of a-z, @, [, \\, ], ^, _");
    let lower = text.to_ascii_lowercase();
    match lower.strip_prefix("ctrl-").or_else(|| lower.strip_prefix('^')).map(str::as_bytes) {
        Some([letter @ (b'a'..=b'z')]) => Ok(letter - b'a' + 1),
        Some([sign @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(sign - b'@'),
        Some(_) => Err(wrong()),
        None => match text.as_bytes() {
            [byte @ (b'!'..=b'~')] => Ok(*byte),
            _ => Err(wrong()),
        },
    }
}

/// The result of some typed bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Matched {
    /// For the program.
    pub(super) input: Vec<u8>,
    /// Whether the user detaches; bytes typed after that are dropped.
    pub(super) detach: bool,
}

/// Finds the sequences in the typed bytes.
#[derive(Debug)]
pub(super) struct Matcher {
    keys: DetachKeys,
    /// The beginning of one or more sequences.
    held: Vec<u8>,
}

impl Matcher {
    pub(super) const fn new(keys: DetachKeys) -> Self {
        Self { keys, held: Vec::new() }
    }

    pub(super) fn feed(&mut self, typed: &[u8]) -> Matched {
        let mut input = Vec::with_capacity(self.held.len() + typed.len());
        for &byte in typed {
            self.held.push(byte);
            // Bytes that cannot begin a sequence are input.
            while !self.held.is_empty() && !self.keys.sequences.iter().any(|keys| keys.starts_with(&self.held)) {
                input.push(self.held.remove(0));
            }
            if self.keys.sequences.contains(&self.held) {
                self.held.clear();
                return Matched { input, detach: true };
            }
        }
        // A terminal sends the bytes of a key at once, so an escape at the end is the Escape key and must not wait.
        if self.held.first() == Some(&0x1b) {
            input.append(&mut self.held);
        }
        Matched { input, detach: false }
    }

    /// Whether bytes are held back.
    pub(super) const fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Releases the bytes held back, because no further key came.
    pub(super) fn flush(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(keys: &str) -> Matcher {
        Matcher::new(keys.parse().expect("keys"))
    }

    fn input(bytes: &[u8]) -> Matched {
        Matched { input: bytes.to_vec(), detach: false }
    }

    #[test]
    fn the_usual_keys_detach_and_what_was_typed_before_arrives() {
        assert_eq!(matcher(DEFAULT).feed(b"ls\x04rest"), Matched { input: b"ls".to_vec(), detach: true });
        assert_eq!(matcher(DEFAULT).feed(b"\x10\x11"), Matched { input: Vec::new(), detach: true });
    }

    #[test]
    fn a_sequence_may_come_in_pieces() {
        let mut matcher = matcher(DEFAULT);
        assert_eq!(matcher.feed(b"a\x10"), input(b"a"));
        assert!(matcher.holds());
        assert!(matcher.feed(b"\x11").detach);
    }

    #[test]
    fn the_beginning_of_a_sequence_is_not_lost() {
        let mut matcher = matcher(DEFAULT);
        assert_eq!(matcher.feed(b"\x10"), input(b""));
        assert_eq!(matcher.feed(b"\x10x"), input(b"\x10\x10x"));
        assert_eq!(matcher.feed(b"\x10"), input(b""));
        assert_eq!(matcher.flush(), b"\x10");
        assert_eq!(matcher.feed(b"\x11"), input(b"\x11"));
        assert_eq!(matcher.feed(b"\x10\x10"), input(b"\x10"));
        assert!(matcher.feed(b"\x11").detach);
    }

    #[test]
    fn other_encodings_of_the_same_key_detach_and_escape_does_not_wait() {
        assert!(matcher(DEFAULT).feed(b"\x1b[100;5u").detach);
        assert!(matcher(DEFAULT).feed(b"\x1b[27;5;100~").detach);
        assert_eq!(matcher(DEFAULT).feed(b"\x1b"), input(b"\x1b"));
        assert_eq!(matcher(DEFAULT).feed(b"\x1b[A"), input(b"\x1b[A"));
    }

    #[test]
    fn keys_can_be_chosen_or_disabled() {
        let mut own = matcher("ctrl-],q");
        assert_eq!(own.feed(b"\x04"), input(b"\x04"));
        assert!(own.feed(b"\x1dq").detach);
        assert!(matcher("^A").feed(b"\x01").detach);
        assert_eq!(matcher("none").feed(b"\x04\x10\x11"), input(b"\x04\x10\x11"));
    }

    #[test]
    fn invalid_keys_are_refused() {
        for text in ["", "ctrl-", "ctrl-1", "ctrl-ab", "ctrl-p,", "é", "ab", "a,a,a,a,a,a,a,a,a"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text}");
        }
    }
}
