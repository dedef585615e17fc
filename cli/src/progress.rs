//! Progress on standard error: a line for each finished stage, and on a terminal a spinner for the current one.

use std::{
    io::{self, IsTerminal as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// The width of the column of stage names.
const NAME_WIDTH: usize = 22;
/// Between frames of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// The progress of a command. Removes the spinner when dropped.
pub(crate) struct Progress {
    spinner: Option<ProgressBar>,
    colour: bool,
}

impl Progress {
    /// Starts the spinner.
    pub(crate) fn start(waiting_for: &str) -> Self {
        let spinner = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style);
            spinner.set_message(output::printable(waiting_for).into_owned());
            spinner.enable_steady_tick(TICK);
            spinner
        });
        Self { spinner, colour: output::colour_on_stderr() }
    }

    /// Sets the spinner's text.
    pub(crate) fn waiting_for(&self, what: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.reset_elapsed();
            spinner.set_message(output::printable(what).into_owned());
        }
    }

    /// Prints a finished stage with its duration.
    pub(crate) fn done(&self, stage: &str, seconds: f64) {
        self.print_line(&stage_line(stage, seconds, self.colour));
    }

    /// Prints a line above the spinner.
    pub(crate) fn print_line(&self, line: &str) {
        match &self.spinner {
            Some(spinner) => spinner.suspend(|| eprint_line(line)),
            None => eprint_line(line),
        }
    }

    /// Removes the spinner.
    pub(crate) fn finish(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn eprint_line(line: &str) {
    use std::io::Write as _;
    // There is no way to report that standard error is closed.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn stage_line(stage: &str, seconds: f64, colour: bool) -> String {
    let (green, end) = if colour { ("\x1b[32m", "\x1b[0m") } else { ("", "") };
    format!("{green}✓{end} {stage:<NAME_WIDTH$} {}", output::seconds(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_stand_in_a_column_with_their_times() {
        assert_eq!(stage_line("placed", 0.24, false), "✓ placed                 0.2s");
        assert_eq!(stage_line("repository cloned", 75.0, false), "✓ repository cloned      1m 15s");
        assert!(stage_line("placed", 0.0, true).starts_with("\u{1b}[32m✓\u{1b}[0m "));
    }
}
