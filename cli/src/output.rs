//! What commands print: data on standard output, everything else on standard error.
//!
//! Write errors are returned, so that `loom ps | head -1` ends quietly; `println!` would panic there. Text from servers
//! and weavers is made [`printable`] first, so that no name or reason can send control sequences to the terminal.

use std::{
    borrow::Cow,
    env,
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
};

use serde::Serialize;

use crate::error::CliError;

/// Writes one line of data.
pub(crate) fn line(text: &str) -> Result<(), CliError> {
    bytes(text.as_bytes())?;
    bytes(b"\n")
}

/// Writes data as it is.
pub(crate) fn bytes(data: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(data).and_then(|()| out.flush()).map_err(|error| CliError::output(&error))
}

/// Writes an object as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CliError::failure(format!("cannot write the answer as JSON: {error}")))?;
    line(&all_escaped(text))
}

/// Writes an object as one line of JSON, for streams of them.
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    let text = serde_json::to_string(value)
        .map_err(|error| CliError::failure(format!("cannot write an event as JSON: {error}")))?;
    line(&all_escaped(text))
}

/// The same JSON with escapes for the control characters that JSON allows in strings and terminals obey: U+007F to
/// U+009F.
fn all_escaped(json: String) -> String {
    let obeyed = |c: char| ('\u{7f}'..='\u{9f}').contains(&c);
    if !json.contains(obeyed) {
        return json;
    }
    json.chars().fold(String::with_capacity(json.len()), |mut text, c| {
        if obeyed(c) {
            let _ = write!(text, "\\u{:04x}", u32::from(c));
        } else {
            text.push(c);
        }
        text
    })
}

/// Prints a message that is not data. Ignores a closed standard error.
pub(crate) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(text));
}

/// Prints a warning.
pub(crate) fn warning(text: &str) {
    let (start, end) = if colour_on_stderr() { ("\x1b[1;33m", "\x1b[0m") } else { ("", "") };
    let _ = writeln!(io::stderr().lock(), "{start}warning:{end} {}", printable(text));
}

pub(crate) fn error(error: &CliError) {
    let _ = io::stderr().lock().write_all(error.lines(colour_on_stderr()).as_bytes());
}

/// Whether to use colours on standard error.
pub(crate) fn colour_on_stderr() -> bool {
    colour(io::stderr().is_terminal(), |name| env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// `NO_COLOR` (no-color.org) turns colours off and `CLICOLOR_FORCE` (bixense.com/clicolors) on; by default terminals get
/// them.
fn colour(terminal: bool, set: impl Fn(&str) -> bool) -> bool {
    !set("NO_COLOR") && (set("CLICOLOR_FORCE") || terminal)
}

/// Replaces control characters, except line breaks and tabs.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let control = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(control) { Cow::Owned(text.replace(control, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// Rows under a header, in columns as wide as their widest cell, two spaces apart.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell).replace(['\n', '\t'], " ")).collect()).collect();
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    for row in std::iter::once(&header).chain(&rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Formats hours: `4h`, `1.5h`, and `0.02h` with two digits where one would show zero.
pub(crate) fn hours(hours: f64) -> String {
    let hours = hours.max(0.0);
    let text = if hours < 0.1 { format!("{hours:.2}") } else { format!("{hours:.1}") };
    format!("{}h", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Formats a short duration: `0.4s`, `1m 5s`.
pub(crate) fn seconds(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    if seconds < 59.95 {
        format!("{seconds:.1}s")
    } else {
        format!("{}m {}s", seconds as u64 / 60, seconds as u64 % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_columns_as_wide_as_needed_and_no_trailing_spaces() {
        let rows = vec![
            vec!["W-1".to_owned(), "debian".to_owned(), String::new()],
            vec!["W-22222".to_owned(), "x".to_owned(), "two\nlines\u{1b}[2J".to_owned()],
        ];
        assert_eq!(
            table(&["ID", "IMAGE", "REASON"], &rows),
            "ID       IMAGE   REASON\nW-1      debian\nW-22222  x       two lines\u{fffd}[2J\n"
        );
        assert_eq!(table(&["ID"], &[]), "ID\n");
    }

    #[test]
    fn json_has_escapes_for_all_that_a_terminal_obeys() {
        let hostile = "\u{1b}[2J\u{7f}\u{9b}31mé\n";
        let text = all_escaped(serde_json::to_string(hostile).expect("JSON"));
        assert_eq!(text, "\"\\u001b[2J\\u007f\\u009b31mé\\n\"");
        assert_eq!(serde_json::from_str::<String>(&text).expect("JSON"), hostile);
    }

    #[test]
    fn hours_are_short() {
        for (value, text) in [
            (4.0, "4h"),
            (1.5, "1.5h"),
            (0.0, "0h"),
            (0.022, "0.02h"),
            (0.5, "0.5h"),
            (10.0, "10h"),
            (47.96, "48h"),
            (-1.0, "0h"),
        ] {
            assert_eq!(hours(value), text);
        }
    }

    #[test]
    fn seconds_are_short() {
        for (value, text) in [(0.04, "0.0s"), (1.26, "1.3s"), (59.97, "0m 59s"), (65.0, "1m 5s")] {
            assert_eq!(seconds(value), text);
        }
    }

    #[test]
    fn colour_is_for_terminals_unless_told_otherwise() {
        for (terminal, set, expected) in [
            (true, &[][..], true),
            (false, &[], false),
            (true, &["NO_COLOR"], false),
            (false, &["CLICOLOR_FORCE"], true),
            (true, &["NO_COLOR", "CLICOLOR_FORCE"], false),
        ] {
            assert_eq!(colour(terminal, |name| set.contains(&name)), expected, "{terminal} {set:?}");
        }
    }
}
