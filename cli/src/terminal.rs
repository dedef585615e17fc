//! The user's terminal: in raw mode while it shows a weaver's terminal, and restored whatever happens.
//!
//! [`RawMode`] restores it when dropped. The panic hook of [`install_panic_hook`] restores it before the panic is
//! printed, and on SIGTERM or SIGHUP ([`termination_signal`]) `main` drops the running command, and the guard with it.

use std::io::{self, IsTerminal as _, Write as _};

use parking_lot::Mutex;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::Exit;

/// Turns off what programs may have turned on and a shell does not expect: text attributes, character sets, insert and
/// origin mode, scroll region (which moves the cursor, so it is saved around that), application keys, mouse reports,
/// focus reports, bracketed paste, synchronised output, the enhanced keyboard. Shows the cursor in its default shape.
const RESET: &[u8] = b"\x1b[m\x1b(B\x0f\x1b[4l\x1b7\x1b[?6l\x1b[r\x1b8\x1b[?7h\x1b[?1l\x1b>\
\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1005l\x1b[?1006l\x1b[?1015l\x1b[?2004l\x1b[?2026l\
\x1b[>4m\x1b[=0;1u\x1b[?25h\x1b[0 q";
/// Leaves the alternate screen. Sent only if that is shown: otherwise it would move the cursor.
const LEAVE_ALTERNATE: &[u8] = b"\x1b[?1049l";

/// What to restore.
struct Saved {
    modes: Termios,
    alternate: bool,
}

/// Global, because there is one terminal and the panic hook must find it.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

/// The terminal in raw mode, until dropped.
#[must_use]
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts the terminal on standard input in raw mode: keys arrive one by one, without echo or signals.
    ///
    /// # Errors
    ///
    /// When standard input is not a terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        let modes = tcgetattr(io::stdin())?;
        let mut raw = modes.clone();
        raw.make_raw();
        *SAVED.lock() = Some(Saved { modes, alternate: false });
        let guard = Self(());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(guard)
    }

    /// Enters raw mode again, after the process was stopped and continued.
    pub(crate) fn reenter(&self) -> io::Result<()> {
        let mut raw = tcgetattr(io::stdin())?;
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(())
    }

    /// Records whether the alternate screen is shown.
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

/// Restores the terminal if it is in raw mode.
fn restore() {
    let Some(saved) = SAVED.lock().take() else { return };
    // A terminal that is gone need not be restored.
    if io::stdout().is_terminal() {
        let mut out = io::stdout().lock();
        let alternate = if saved.alternate { LEAVE_ALTERNATE } else { b"" };
        let _ = out.write_all(alternate).and_then(|()| out.write_all(RESET)).and_then(|()| out.flush());
    }
    let _ = tcsetattr(io::stdin(), OptionalActions::Now, &saved.modes);
}

/// Restores the terminal before a panic is printed.
pub(crate) fn install_panic_hook() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        print(panic);
    }));
}

/// Waits for SIGTERM or SIGHUP; returns the exit code for it.
pub(crate) async fn termination_signal() -> Exit {
    let (Ok(mut terminated), Ok(mut hung_up)) = (signal(SignalKind::terminate()), signal(SignalKind::hangup())) else {
        return std::future::pending().await; // the signals have their default effect
    };
    tokio::select! {
        _ = terminated.recv() => Exit(143),
        _ = hung_up.recv() => Exit(129),
    }
}

/// Rows and columns of the terminal on standard output, else on standard input.
pub(crate) fn window_size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Whether standard input and standard output are terminals.
pub(crate) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether the user can be asked: standard input and standard error are terminals.
pub(crate) fn can_prompt() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}
