//! The screen model, and the bytes that redraw it on another terminal.
//!
//! `vt100` has the cells, attributes, cursor, scrollback and most modes. This module adds what it lacks and programs
//! need: the scroll region, origin and insert mode, line wrap, focus reports, the line-drawing character set, the title,
//! and the main screen while the alternate one is shown, because `vt100` exposes only the one in use.

use std::{collections::BTreeSet, fmt::Write as _, num::NonZeroU16};

use bytes::Bytes;
use vt100::{Callbacks, Cell, Color, Parser, Screen};

use super::{
    Size,
    scan::{Scanner, Sequence},
};
use crate::protocol::MAX_LARGE_FRAME;

/// In lines. A line takes 32 bytes per column.
const SCROLLBACK: usize = 1000;
/// In bytes.
const MAX_TITLE: usize = 1024;
/// The scrollback's share of a snapshot, in bytes; the oldest lines are dropped first.
const MAX_SCROLLBACK_BYTES: usize = MAX_LARGE_FRAME / 2;
/// In bytes. A longer snapshot is drawn without colours; this leaves room for modes and pending output.
const MAX_STYLED: usize = MAX_LARGE_FRAME - (64 << 10);

/// Private modes that `vt100` does not track and a new client's terminal needs: reverse video, wrap (reset), blinking
/// cursor, focus reports, alternate scroll, and four for the meta key.
const TRACKED_MODES: [u16; 9] = [5, 12, 1004, 1007, 1034, 1035, 1036, 1039, 1042];
const WRAP: u16 = 7;
const ORIGIN: u16 = 6;
/// The modes that switch to the alternate screen. `vt100` implements the first and the last.
const ALTERNATE: [u16; 3] = [47, 1047, 1049];

/// A terminal's screen, fed with the program's output.
pub(super) struct Model {
    parser: Parser<Titles>,
    scanner: Scanner,
    /// The main screen, while the alternate one is in use.
    covered: Option<Drawing>,
    extras: ExtraState,
}

/// State that `vt100` lacks, cleared by a reset.
#[derive(Default)]
struct ExtraState {
    region: Option<(u16, u16)>,
    modes: BTreeSet<u16>,
    origin: bool,
    no_wrap: bool,
    insert: bool,
    charsets: [bool; 2],
    slot: usize,
}

#[derive(Default)]
struct Titles {
    title: Vec<u8>,
}

impl Callbacks for Titles {
    fn set_window_title(&mut self, _: &mut Screen, title: &[u8]) {
        self.title = title[..title.len().min(MAX_TITLE)].to_vec();
    }
}

/// One of the two screens, as bytes that draw it.
struct Drawing {
    scrollback: Vec<String>,
    rows: String,
    cursor: String,
}

impl Model {
    pub(super) fn new(size: Size) -> Self {
        let (rows, cols) = cells(size);
        Self {
            parser: Parser::new_with_callbacks(rows, cols, SCROLLBACK, Titles::default()),
            scanner: Scanner::new(),
            covered: None,
            extras: ExtraState::default(),
        }
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        let mut from = 0;
        for (index, &byte) in bytes.iter().enumerate() {
            let drawn = self.scanner.is_between().then(|| self.extras.line_drawing(byte)).flatten();
            let sequence = self.scanner.advance(byte);
            if let Some(drawn) = drawn {
                self.parser.process(&bytes[from..index]);
                self.parser.process(drawn.encode_utf8(&mut [0; 4]).as_bytes());
                from = index + 1;
            }
            let Some(sequence) = sequence else { continue };
            let enters = sequence.switches_to_alternate(true) && !self.parser.screen().alternate_screen();
            if enters {
                // Without the last byte of the sequence, so that the screen is still the main one.
                self.parser.process(&bytes[from..index]);
                self.covered = Some(self.draw(true, true));
                from = index;
            }
            self.parser.process(&bytes[from..=index]);
            from = index + 1;
            self.note(&sequence);
        }
        self.parser.process(&bytes[from..]);
    }

    fn note(&mut self, sequence: &Sequence) {
        // vt100 does not implement 1047, which is 47 with a clear.
        if let Sequence::PrivateModes(modes, set) = sequence
            && modes.contains(&1047)
        {
            self.parser.process(if *set { b"\x1b[?47h\x1b[2J" } else { b"\x1b[?47l" });
        }
        if sequence.switches_to_alternate(false) || *sequence == Sequence::Reset {
            self.covered = None;
        }
        self.extras.note(sequence);
    }

    /// Changes the size. Programs redraw the screen themselves.
    pub(super) fn resize(&mut self, size: Size) {
        let (rows, cols) = cells(size);
        self.parser.set_size(rows, cols);
        // As real terminals do.
        self.extras.region = None;
    }

    /// The bytes that make any terminal show this screen, in a window of `rows` rows. With `scrollback`, they begin with
    /// the scrollback, which ends up in the terminal's own. Lines wider than the window are cut.
    pub(super) fn snapshot(&mut self, rows: u16, scrollback: bool) -> Bytes {
        let styled = self.snapshot_with(rows, scrollback, true);
        let text = if styled.len() <= MAX_STYLED { styled } else { self.snapshot_with(rows, scrollback, false) };
        let mut bytes = text.into_bytes();
        bytes.truncate(MAX_STYLED);
        bytes.extend_from_slice(self.scanner.pending());
        bytes.into()
    }

    fn snapshot_with(&mut self, rows: u16, scrollback: bool, styled: bool) -> String {
        let shown = self.draw(styled, scrollback && self.covered.is_none());
        let mut out = String::from(RESET);
        let below = self.covered.as_ref().unwrap_or(&shown);
        if scrollback {
            push_scrollback(&mut out, &below.scrollback, rows);
        }
        if let Some(covered) = &self.covered {
            out.push_str(&covered.rows);
            out.push_str("\x1b[?7h");
            out.push_str(&covered.cursor);
            out.push_str("\x1b[?1049h\x1b[?7l\x1b[m\x1b[2J");
        }
        out.push_str(&shown.rows);
        let title = String::from_utf8_lossy(&self.parser.callbacks().title);
        if !title.is_empty() {
            // A control character could end the title sequence.
            let title: String = title.chars().filter(|letter| !letter.is_control()).collect();
            let _ = write!(out, "\x1b]2;{title}\x07");
        }
        self.extras.write(&mut out, self.parser.screen(), &shown.cursor);
        out
    }

    /// Draws the screen in use.
    fn draw(&mut self, styled: bool, scrollback: bool) -> Drawing {
        let screen = self.parser.screen_mut();
        let (rows, cols) = screen.size();
        let lines = if scrollback { scrolled_away(screen, styled) } else { Vec::new() };
        let mut drawn = String::new();
        for row in 0..rows.get() {
            let line = draw_row(screen, row, cols.get(), styled);
            // Clears the row, because on terminals that wrap anyway the row above may have continued into it.
            let _ = write!(drawn, "\x1b[{};1H\x1b[K{line}\x1b[m", row + 1);
        }
        let cursor = screen.cursor_state_formatted() + &screen.attributes_formatted();
        Drawing { scrollback: lines, rows: drawn, cursor }
    }
}

/// Leaves the alternate screen, resets every mode that a program may have set, clears the window, and turns off
/// wrapping, so that a narrow window cuts lines. Keeps the terminal's own scrollback.
const RESET: &str = "\x1b[?1049l\x1b[!p\x1b[r\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1005l\x1b[?1006l\
    \x1b[?2004l\x1b[?1l\x1b>\x1b(B\x1b)B\x0f\x1b[m\x1b[H\x1b[2J\x1b[?7l";

/// Writes the lines, and scrolls exactly these out of a window of `rows` rows.
fn push_scrollback(out: &mut String, lines: &[String], rows: u16) {
    if lines.is_empty() {
        return;
    }
    for line in lines {
        out.push_str(line);
        out.push_str("\x1b[m\r\n");
    }
    let rows = usize::from(rows.max(1));
    let _ = write!(out, "\x1b[{rows};1H");
    out.extend(std::iter::repeat_n('\n', lines.len().min(rows - 1)));
    out.push_str("\x1b[H\x1b[2J");
}

/// The scrollback, oldest line first; of the oldest, those that do not fit are dropped.
fn scrolled_away(screen: &mut Screen, styled: bool) -> Vec<String> {
    let (rows, cols) = screen.size();
    let (rows, cols) = (usize::from(rows.get()), cols.get());
    let total = screen.scrollback_len();
    let mut lines = Vec::new();
    let mut size = 0;
    // Each view begins `above` lines above the screen; only its lines above the screen are taken, from the last one up.
    let mut above = 0;
    'views: while above < total {
        let next = (above + rows).min(total);
        screen.set_scrollback(next);
        for row in (0..next - above).rev() {
            let line = draw_row(screen, u16::try_from(row).unwrap_or(u16::MAX), cols, styled);
            size += line.len() + 5;
            if size > MAX_SCROLLBACK_BYTES {
                break 'views;
            }
            lines.push(line);
        }
        above = next;
    }
    screen.set_scrollback(0);
    lines.reverse();
    lines
}

/// Draws one row up to its last visible cell. Does not reset the style at the end.
fn draw_row(screen: &Screen, row: u16, cols: u16, styled: bool) -> String {
    let style_of = |cell: &Cell| if styled { Style::of(cell) } else { Style::default() };
    let shows = |cell: &Cell| cell.has_contents() || style_of(cell).shows_on_blank();
    let last = (0..cols).rev().find(|&col| screen.cell(row, col).is_some_and(shows));
    let mut line = String::new();
    let mut current = Style::default();
    for col in 0..last.map_or(0, |last| last + 1) {
        let Some(cell) = screen.cell(row, col).filter(|cell| !cell.is_wide_continuation()) else {
            continue;
        };
        let style = style_of(cell);
        if style != current {
            style.write(&mut line);
            current = style;
        }
        line.push_str(if cell.has_contents() { cell.contents() } else { " " });
    }
    line
}

/// The style of a cell (SGR, ECMA-48 §8.3.117).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Style {
    foreground: Color,
    background: Color,
    /// Bold, dim, italic, underlined, inverse.
    flags: [bool; 5],
}

impl Style {
    fn of(cell: &Cell) -> Self {
        Self {
            foreground: cell.fgcolor(),
            background: cell.bgcolor(),
            flags: [cell.bold(), cell.dim(), cell.italic(), cell.underline(), cell.inverse()],
        }
    }

    fn shows_on_blank(&self) -> bool {
        self.background != Color::Default || self.flags[3] || self.flags[4]
    }

    fn write(&self, out: &mut String) {
        out.push_str("\x1b[0");
        for (set, code) in self.flags.iter().zip([1, 2, 3, 4, 7]) {
            if *set {
                let _ = write!(out, ";{code}");
            }
        }
        for (color, base) in [(self.foreground, 30), (self.background, 40)] {
            let _ = match color {
                Color::Default => Ok(()),
                Color::Idx(index @ 0..=7) => write!(out, ";{}", base + u16::from(index)),
                Color::Idx(index @ 8..=15) => write!(out, ";{}", base + 52 + u16::from(index)),
                Color::Idx(index) => write!(out, ";{};5;{index}", base + 8),
                Color::Rgb(red, green, blue) => write!(out, ";{};2;{red};{green};{blue}", base + 8),
            };
        }
        out.push('m');
    }
}

impl ExtraState {
    fn note(&mut self, sequence: &Sequence) {
        match sequence {
            Sequence::PrivateModes(modes, set) => {
                for mode in modes {
                    match *mode {
                        WRAP => self.no_wrap = !set,
                        ORIGIN => self.origin = *set,
                        mode if TRACKED_MODES.contains(&mode) && *set => drop(self.modes.insert(mode)),
                        mode => drop(self.modes.remove(&mode)),
                    }
                }
            }
            Sequence::Modes(modes, set) => self.insert = if modes.contains(&4) { *set } else { self.insert },
            Sequence::ScrollRegion(region) => self.region = *region,
            Sequence::Charset(slot, set) => self.charsets[*slot] = *set == b'0',
            Sequence::Shift(slot) => self.slot = *slot,
            Sequence::Reset => *self = Self::default(),
        }
    }

    /// The character for a byte in the line-drawing set, if that set is in use (VT100, table 3-9).
    fn line_drawing(&self, byte: u8) -> Option<char> {
        const DRAWN: [char; 31] = [
            '◆', '▒', '␉', '␌', '␍', '␊', '°', '±', '␤', '␋', '┘', '┐', '┌', '└', '┼', '⎺', '⎻', '─', '⎼', '⎽', '├',
            '┤', '┴', '┬', '│', '≤', '≥', 'π', '≠', '£', '·',
        ];
        self.charsets[self.slot].then(|| DRAWN.get(usize::from(byte).checked_sub(0x60)?).copied()).flatten()
    }

    /// What follows the rows. The cursor is last, because setting the region and the modes moves it.
    fn write(&self, out: &mut String, screen: &Screen, cursor: &str) {
        if !self.no_wrap {
            out.push_str("\x1b[?7h");
        }
        for mode in &self.modes {
            let _ = write!(out, "\x1b[?{mode}h");
        }
        out.push_str(&screen.input_mode_formatted());
        if let Some((top, bottom)) = self.region {
            let _ = write!(out, "\x1b[{top};{bottom}r");
        }
        out.push_str(cursor);
        if self.origin {
            let (row, col) = screen.cursor_position();
            let top = self.region.map_or(0, |(top, _)| top - 1);
            let _ = write!(out, "\x1b[?6h\x1b[{};{}H", row.saturating_sub(top) + 1, col + 1);
        }
        if self.insert {
            out.push_str("\x1b[4h");
        }
        for (slot, name) in [(0, '('), (1, ')')] {
            if self.charsets[slot] {
                let _ = write!(out, "\x1b{name}0");
            }
        }
        if self.slot == 1 {
            out.push('\x0e');
        }
    }
}

impl Sequence {
    /// Whether it enters (or leaves) the alternate screen.
    fn switches_to_alternate(&self, enters: bool) -> bool {
        matches!(self, Self::PrivateModes(modes, set)
            if *set == enters && modes.iter().any(|mode| ALTERNATE.contains(mode)))
    }
}

fn cells(size: Size) -> (NonZeroU16, NonZeroU16) {
    (NonZeroU16::new(size.rows).unwrap_or(NonZeroU16::MIN), NonZeroU16::new(size.cols).unwrap_or(NonZeroU16::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Size = Size { rows: 6, cols: 20 };

    fn fed(output: &[u8]) -> Model {
        let mut model = Model::new(SIZE);
        model.feed(output);
        model
    }

    /// A new client's terminal after the snapshot and `rest`.
    fn new_client(model: &mut Model, rest: &[u8]) -> Model {
        let snapshot = model.snapshot(SIZE.rows, true);
        let mut other = Model::new(SIZE);
        other.feed(b"what was \x1b[31mthere before\r\n");
        other.feed(&snapshot);
        other.feed(rest);
        model.feed(rest);
        other
    }

    fn cells_of(screen: &Screen) -> Vec<String> {
        let row = |row| {
            let cells =
                (0..SIZE.cols).filter_map(|col| screen.cell(row, col)).filter(|cell| !cell.is_wide_continuation());
            let mut line = String::new();
            for cell in cells {
                Style::of(cell).write(&mut line);
                line.push_str(if cell.has_contents() { cell.contents() } else { " " });
            }
            line
        };
        (0..SIZE.rows).map(row).collect()
    }

    fn assert_same(model: &mut Model, other: &mut Model) {
        let (ours, theirs) = (model.parser.screen().clone(), other.parser.screen().clone());
        assert_eq!(cells_of(&ours), cells_of(&theirs));
        assert_eq!(ours.attributes_formatted(), theirs.attributes_formatted());
        assert_eq!(ours.hide_cursor(), theirs.hide_cursor());
        assert_eq!(ours.input_mode_formatted(), theirs.input_mode_formatted());
        assert_eq!(ours.cursor_position(), theirs.cursor_position());
        assert_eq!(ours.alternate_screen(), theirs.alternate_screen());
        assert_eq!(model.extras.region, other.extras.region);
        assert_eq!(model.parser.callbacks().title, other.parser.callbacks().title);
    }

    #[test]
    fn a_new_client_sees_the_same_screen_whatever_was_on_it() {
        let outputs: [&[u8]; 9] = [
            b"",
            b"hello\r\n\x1b[1;31mred\x1b[0m \x1b[4;38;2;1;2;3;48;5;200munder\x1b[m",
            "漢字 äö 🦀 e\u{301}\r\n".as_bytes(),
            b"\x1b[3;5H\x1b[7minverse    \x1b[K\x1b[44m\x1b[K",
            b"01234567890123456789",
            b"01234567890123456789abc",
            b"\x1b[?1h\x1b=\x1b[?2004h\x1b[?1002h\x1b[?1006h\x1b[?25l\x1b]0;a title\x07",
            b"\x1b[2;4r\x1b[2;1Ha\nb\nc\nd",
            b"\x1b[2;5r\x1b[?6h\x1b[2;3Hx",
        ];
        for output in outputs {
            let mut model = fed(output);
            let mut other = new_client(&mut model, b"!next\r\nline");
            assert_same(&mut model, &mut other);
        }
    }

    #[test]
    fn a_full_screen_program_is_redrawn_with_the_shell_beneath_it() {
        let mut output = b"$ ls\r\nfile\r\n$ vim".to_vec();
        output.extend_from_slice(b"\x1b[?1049h\x1b[22;0;0t\x1b[?1h\x1b=\x1b[?2004h\x1b[1;6r\x1b[H\x1b[2J\x1b[1;1H\x1b[34m~\x1b[6;1H-- INSERT --");
        let mut model = fed(&output);
        let mut other = new_client(&mut model, b"");
        assert!(other.parser.screen().alternate_screen());
        assert_same(&mut model, &mut other);
        for one in [&mut model, &mut other] {
            one.feed(b"\x1b[?1l\x1b>\x1b[?2004l\x1b[r\x1b[?1049l\r\nback");
        }
        assert_same(&mut model, &mut other);
        assert_eq!(other.parser.screen().contents().trim_end(), "$ ls\nfile\n$ vim\nback");
        assert!(other.covered.is_none());
    }

    #[test]
    fn the_scrollback_comes_along_once() {
        let mut output = Vec::new();
        for line in 0..50 {
            output.extend_from_slice(format!("\x1b[3{}mline {line}\x1b[m\r\n", line % 8).as_bytes());
        }
        output.extend_from_slice(b"$ ");
        let mut model = fed(&output);
        let mut other = new_client(&mut model, b"");
        assert_same(&mut model, &mut other);
        let lines = |model: &mut Model| scrolled_away(model.parser.screen_mut(), true);
        let (ours, theirs) = (lines(&mut model), lines(&mut other));
        assert_eq!(ours.len(), 45);
        assert!(theirs.ends_with(&ours), "{theirs:?}");
        assert!(theirs.len() <= ours.len() + 1, "no blank lines between: {theirs:?}");
    }

    #[test]
    fn few_lines_above_the_screen_leave_no_gap() {
        let mut model = fed(b"1\r\n2\r\n3\r\n4\r\n5\r\n6\r\n7\r\n8");
        let snapshot = model.snapshot(SIZE.rows, true);
        let mut other = Model::new(SIZE);
        other.feed(&snapshot);
        assert_eq!(scrolled_away(other.parser.screen_mut(), false), ["1", "2"]);
    }

    #[test]
    fn a_snapshot_in_the_middle_of_a_sequence_or_character_goes_on_cleanly() {
        let output = "\x1b[1;32mgreen 漢 \x1b]0;title\x07🦀\x1b[0m end".as_bytes();
        for cut in 0..=output.len() {
            let mut model = fed(&output[..cut]);
            let mut other = new_client(&mut model, &output[cut..]);
            assert_same(&mut model, &mut other);
            assert_eq!(other.parser.screen().contents().trim_end(), "green 漢 🦀 end");
        }
    }

    #[test]
    fn line_drawing_is_kept_as_lines() {
        let mut model = fed(b"\x1b(0lqk\x1b(B x \x1b)0\x0emj\x0f");
        assert_eq!(model.parser.screen().contents(), "┌─┐ x └┘");
        let other = new_client(&mut model, b"q\x0eq");
        assert_eq!(other.parser.screen().contents(), "┌─┐ x └┘q─");
    }

    #[test]
    fn narrow_windows_cut_lines_instead_of_wrapping_them() {
        let mut model = fed(b"0123456789abcdefghij\r\nsecond");
        let snapshot = model.snapshot(6, true);
        let mut narrow = Model::new(Size { rows: 6, cols: 10 });
        narrow.feed(&snapshot);
        let rows: Vec<_> = narrow.parser.screen().rows(0, 10).take(2).collect();
        assert_eq!(rows[1], "second");
    }

    #[test]
    fn no_snapshot_is_longer_than_a_frame() {
        let mut model = Model::new(Size { rows: 300, cols: 500 });
        let mut output = Vec::new();
        for cell in 0..400_000u32 {
            output.extend_from_slice(format!("\x1b[38;2;{};{};7mX", cell % 256, cell / 7 % 256).as_bytes());
        }
        model.feed(&output);
        assert!(model.snapshot(300, true).len() <= MAX_LARGE_FRAME);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm() {
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut model = Model::new(SIZE);
        for round in 0..2000 {
            let bytes: Vec<u8> = (0..32)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    let byte = (seed >> 32) as u8;
                    let special = b"\x1b[]?;0149hlrmHJ(0\x0e";
                    if byte < 60 { special[usize::from(byte) % special.len()] } else { byte }
                })
                .collect();
            model.feed(&bytes);
            if round % 50 == 0 {
                model.resize(Size { rows: 1 + (seed % 9) as u16, cols: 1 + (seed % 31) as u16 });
            }
            let _ = model.snapshot(5, true);
        }
    }
}
