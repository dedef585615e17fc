//! A scanner for control sequences (ECMA-48 §5, and xterm's strings).
//!
//! The screen model has its own parser, but does not tell two things that we need. First, whether the output stops in
//! the middle of a sequence or a character: a snapshot taken there must end with the incomplete part, or the rest would
//! show as text. Second, the sequences that the model ignores or does not expose ([`Sequence`]).

/// In bytes. Of a longer incomplete string only the introducer is kept.
const MAX_PENDING: usize = 4096;

/// A completed sequence that the model ignores or does not expose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sequence {
    /// `CSI ? n… h` or `l`: private modes set or reset.
    PrivateModes(Vec<u16>, bool),
    /// `CSI n… h` or `l`: ANSI modes set or reset.
    Modes(Vec<u16>, bool),
    /// `CSI t ; b r`: the scroll region's first and last row, counted from 1; `None` for the whole screen.
    ScrollRegion(Option<(u16, u16)>),
    /// `ESC ( x` or `ESC ) x`: the character set in slot 0 or 1.
    Charset(usize, u8),
    /// `SO` or `SI`: the slot in use.
    Shift(usize),
    /// `ESC c` or `CSI ! p`.
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ground,
    /// In a UTF-8 character that misses so many bytes.
    Character(u8),
    Escape,
    Csi,
    /// In an operating system command, which `BEL` may end.
    Command,
    /// In any other string, which only `ST` ends.
    Text,
    /// After an `ESC` within a string.
    StringEscape,
}

/// The scanner's state, and the bytes since the last complete sequence or character.
#[derive(Debug)]
pub(super) struct Scanner {
    state: State,
    pending: Vec<u8>,
}

impl Scanner {
    pub(super) const fn new() -> Self {
        Self { state: State::Ground, pending: Vec::new() }
    }

    /// Whether the next byte begins a character or a sequence.
    pub(super) fn is_between(&self) -> bool {
        self.state == State::Ground
    }

    /// The incomplete sequence or character.
    pub(super) fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// Processes one byte; returns the [`Sequence`] that it completes, if any.
    pub(super) fn advance(&mut self, byte: u8) -> Option<Sequence> {
        match (self.state, byte) {
            (State::Ground, 0x0e) => return Some(Sequence::Shift(1)),
            (State::Ground, 0x0f) => return Some(Sequence::Shift(0)),
            (State::Ground, 0xc2..=0xdf) => self.begin(State::Character(1), byte),
            (State::Ground, 0xe0..=0xef) => self.begin(State::Character(2), byte),
            (State::Ground, 0xf0..=0xf4) => self.begin(State::Character(3), byte),
            (State::Ground, 0x1b) => self.begin(State::Escape, byte),
            (State::Ground, _) => {}
            (State::Character(1), 0x80..=0xbf) => self.finish(),
            (State::Character(missing), 0x80..=0xbf) => self.go(State::Character(missing - 1), byte),
            (State::Character(_), _) => {
                self.finish();
                return self.advance(byte);
            }
            // CAN and SUB end every sequence without effect.
            (_, 0x18 | 0x1a) => self.finish(),
            (State::Command | State::Text, 0x1b) => self.go(State::StringEscape, byte),
            (State::Command, 0x07) | (State::StringEscape, b'\\') => self.finish(),
            (State::StringEscape, _) => {
                self.begin(State::Escape, 0x1b);
                return self.advance(byte);
            }
            (State::Command | State::Text, _) => self.go(self.state, byte),
            (_, 0x1b) => self.begin(State::Escape, byte),
            // Other controls act at once, even within a sequence; repeating them would have effect twice.
            (_, 0x00..=0x1f | 0x7f) => {}
            (State::Escape, b'[') if self.pending.len() == 1 => self.go(State::Csi, byte),
            (State::Escape, b']') if self.pending.len() == 1 => self.go(State::Command, byte),
            (State::Escape, b'P' | b'X' | b'^' | b'_') if self.pending.len() == 1 => self.go(State::Text, byte),
            (State::Escape, 0x20..=0x2f) => self.go(State::Escape, byte),
            (State::Escape, _) => {
                let sequence = escape_sequence(&self.pending[1..], byte);
                self.finish();
                return sequence;
            }
            (State::Csi, 0x40..=0x7e) => {
                let sequence = control_sequence(self.pending.get(2..).unwrap_or_default(), byte);
                self.finish();
                return sequence;
            }
            (State::Csi, _) => self.go(State::Csi, byte),
        }
        None
    }

    fn begin(&mut self, state: State, byte: u8) {
        self.pending.clear();
        self.go(state, byte);
    }

    fn go(&mut self, state: State, byte: u8) {
        self.state = state;
        if self.pending.len() < MAX_PENDING {
            self.pending.push(byte);
        } else {
            self.pending.truncate(2);
        }
    }

    fn finish(&mut self) {
        self.state = State::Ground;
        self.pending.clear();
    }
}

fn escape_sequence(intermediates: &[u8], last: u8) -> Option<Sequence> {
    match (intermediates, last) {
        ([], b'c') => Some(Sequence::Reset),
        ([b'('], set) => Some(Sequence::Charset(0, set)),
        ([b')'], set) => Some(Sequence::Charset(1, set)),
        _ => None,
    }
}

fn control_sequence(body: &[u8], last: u8) -> Option<Sequence> {
    match (body, last) {
        (b"!", b'p') => Some(Sequence::Reset),
        ([b'?', numbers @ ..], b'h' | b'l') => Some(Sequence::PrivateModes(parse(numbers)?, last == b'h')),
        (numbers, b'h' | b'l') => Some(Sequence::Modes(parse(numbers)?, last == b'h')),
        (numbers, b'r') => Some(Sequence::ScrollRegion(match parse(numbers)?.as_slice() {
            [top, bottom, ..] if *bottom > (*top).max(1) => Some(((*top).max(1), *bottom)),
            [top] if *top > 1 => Some((*top, u16::MAX)),
            _ => None,
        })),
        _ => None,
    }
}

/// Parses numbers separated by semicolons, 0 where one is missing; `None` if there is anything else.
fn parse(numbers: &[u8]) -> Option<Vec<u16>> {
    let number = |digits: &[u8]| {
        digits.iter().try_fold(0u16, |value, digit| {
            digit.is_ascii_digit().then(|| value.saturating_mul(10).saturating_add(u16::from(digit - b'0')))
        })
    };
    numbers.split(|byte| *byte == b';').map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(bytes: &[u8]) -> (Scanner, Vec<Sequence>) {
        let mut scanner = Scanner::new();
        let sequences = bytes.iter().filter_map(|byte| scanner.advance(*byte)).collect();
        (scanner, sequences)
    }

    #[test]
    fn complete_output_leaves_nothing_pending() {
        for text in [
            "plain äöü 漢字 🦀\r\n",
            "\x1b[1;31mred\x1b[m",
            "\x1b]0;title\x07",
            "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
            "\x1bP1$r0m\x1b\\",
            "\x1b(B\x1b7\x1b8\x1b=",
            "\x1b[3\x18",
        ] {
            let (scanner, _) = scan(text.as_bytes());
            assert!(scanner.is_between() && scanner.pending().is_empty(), "{text:?}");
        }
    }

    #[test]
    fn what_has_begun_is_kept() {
        for (text, pending) in [
            (&b"abc\x1b"[..], &b"\x1b"[..]),
            (b"abc\x1b[1;3", b"\x1b[1;3"),
            (b"\x1b[1\n;3", b"\x1b[1;3"),
            (b"\x1b]0;tit", b"\x1b]0;tit"),
            (b"\x1b]0;tit\x1b", b"\x1b]0;tit\x1b"),
            (b"\x1b]0;tit\x1b[3", b"\x1b[3"),
            (b"\x1b[3\x1b[4", b"\x1b[4"),
            ("漢".as_bytes().split_at(2).0, &[0xe6, 0xbc]),
            (b"\xe6x", b""),
            (b"\x1b(", b"\x1b("),
        ] {
            assert_eq!(scan(text).0.pending(), pending, "{text:?}");
        }
    }

    #[test]
    fn a_long_string_keeps_only_its_introducer() {
        let mut text = b"\x1bPq".to_vec();
        text.resize(100_000, b'~');
        let (scanner, _) = scan(&text);
        assert!(scanner.pending().len() <= MAX_PENDING && scanner.pending().starts_with(b"\x1bP"));
    }

    #[test]
    fn tells_the_sequences_that_matter() {
        let (_, sequences) =
            scan(b"\x1b[?1049;25h\x1b[?7l\x1b[4h\x1b[2;10r\x1b[r\x1b(0\x0e\x0f\x1bc\x1b[38;5;1m\x1b[?u");
        assert_eq!(
            sequences,
            [
                Sequence::PrivateModes(vec![1049, 25], true),
                Sequence::PrivateModes(vec![7], false),
                Sequence::Modes(vec![4], true),
                Sequence::ScrollRegion(Some((2, 10))),
                Sequence::ScrollRegion(None),
                Sequence::Charset(0, b'0'),
                Sequence::Shift(1),
                Sequence::Shift(0),
                Sequence::Reset,
            ]
        );
    }
}
