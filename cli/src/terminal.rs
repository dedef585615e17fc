//! The user's terminal: raw while a weaver's terminal is shown on it, and as it was before whatever happens.
//!
//! A [`RawMode`] restores when dropped. The panic hook of [`install_panic_hook`] restores before a panic is told, and
//! `main` drops the running command (and with it the guard) when SIGTERM or SIGHUP comes ([`ended_from_outside`]).

use std::io::{self, IsTerminal as _, Write as _};

use parking_lot::Mutex;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::Exit;

/// What programs may have switched on and a shell does not expect, switched off: text attributes, character sets,
/// insert and origin mode, scroll region (which moves the cursor, hence saved around it), application keys, mouse
/// reports, focus reports, bracketed paste, synchronised output, the enhanced keyboard; and the cursor shown in its
/// usual form.
const RESET: &[u8] = b"\x1b[m\x1b(B\x0f\x1b[4l\x1b7\x1b[?6l\x1b[r\x1b8\x1b[?7h\x1b[?1l\x1b>\
\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1005l\x1b[?1006l\x1b[?1015l\x1b[?2004l\x1b[?2026l\
\x1b[>4m\x1b[=0;1u\x1b[?25h\x1b[0 q";
/// Back from the alternate screen. Only when it is shown: elsewhere it would move the cursor.
const LEAVE_ALTERNATE: &[u8] = b"\x1b[?1049l";

/// What a guard has to put back.
struct Saved {
    modes: Termios,
    alternate: bool,
}

/// There is one terminal, and the panic hook must find it.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

/// The terminal in raw mode, until dropped.
#[must_use]
pub(crate) struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw: every key as it comes, nothing echoed, no signals.
    ///
    /// # Errors
    ///
    /// When standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        let modes = tcgetattr(io::stdin())?;
        let mut raw = modes.clone();
        raw.make_raw();
        *SAVED.lock() = Some(Saved { modes, alternate: false });
        let guard = Self(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(guard)
    }

    /// Makes it raw again, after the process was stopped and went on.
    pub(crate) fn again(&self) -> io::Result<()> {
        let mut raw = tcgetattr(io::stdin())?;
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(())
    }

    /// Notes whether what is shown is on the alternate screen.
    pub(crate) fn alternate_screen(&self, shown: bool) {
        if let Some(saved) = &mut *SAVED.lock() {
            saved.alternate = shown;
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back, if it is raw.
fn restore() {
    let Some(saved) = SAVED.lock().take() else { return };
    // A terminal that has gone cannot be put back, and need not be.
    if io::stdout().is_terminal() {
        let mut out = io::stdout().lock();
        let alternate = if saved.alternate { LEAVE_ALTERNATE } else { b"" };
        let _ = out.write_all(alternate).and_then(|()| out.write_all(RESET)).and_then(|()| out.flush());
    }
    let _ = tcsetattr(io::stdin(), OptionalActions::Now, &saved.modes);
}

/// From now on a panic is told on a terminal that can show it.
pub(crate) fn install_panic_hook() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        tell(panic);
    }));
}

/// Waits for SIGTERM or SIGHUP; what the process then ends with.
pub(crate) async fn ended_from_outside() -> Exit {
    let (Ok(mut terminated), Ok(mut hung_up)) = (signal(SignalKind::terminate()), signal(SignalKind::hangup())) else {
        return std::future::pending().await; // the signals end the process as they do by default
    };
    tokio::select! {
        _ = terminated.recv() => Exit(143),
        _ = hung_up.recv() => Exit(129),
    }
}

/// Rows and columns of the terminal on standard output, or else on standard input.
pub(crate) fn window_size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Whether a person sits at both ends: keys come from a terminal, and output goes to one.
pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether a question on standard error can be answered on standard input.
pub(crate) fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}
