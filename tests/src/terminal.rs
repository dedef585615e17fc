//! A program on a pseudo-terminal, with a screen that a test can read.

use std::{
    io::{Read as _, Write as _},
    process::{Child, ExitStatus},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use parking_lot::Mutex;

use crate::wait::eventually;

/// The initial window size of a [`Terminal`].
pub const ROWS: u16 = 24;
pub const COLS: u16 = 80;

/// A running program and what it has drawn.
pub struct Terminal {
    child: Child,
    pty: Arc<pty_process::blocking::Pty>,
    screen: Arc<Mutex<Drawn>>,
}

struct Drawn {
    parser: vt100::Parser,
    raw: Vec<u8>,
}

impl Terminal {
    /// Starts `command` on a new terminal of 24 rows and 80 columns.
    pub fn spawn(command: &std::process::Command) -> Result<Self> {
        let (pty, pts) = pty_process::blocking::open().context("opening a pseudo-terminal")?;
        pty.resize(pty_process::Size::new(ROWS, COLS))?;
        let mut on_pty = pty_process::blocking::Command::new(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            on_pty = match value {
                Some(value) => on_pty.env(name, value),
                None => on_pty.env_remove(name),
            };
        }
        let child = on_pty.spawn(pts).context("starting a program on a terminal")?;
        let pty = Arc::new(pty);
        let screen = Arc::new(Mutex::new(Drawn { parser: new_parser(), raw: Vec::new() }));
        let (reader, drawn) = (Arc::clone(&pty), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            // The read fails once the program and its children have closed the terminal.
            while let Ok(count @ 1..) = (&*reader).read(&mut buffer) {
                let mut drawn = drawn.lock();
                drawn.parser.process(&buffer[..count]);
                drawn.raw.extend_from_slice(&buffer[..count]);
            }
        });
        Ok(Self { child, pty, screen })
    }

    /// Types.
    pub fn send(&mut self, keys: &str) -> Result<()> {
        (&*self.pty).write_all(keys.as_bytes()).context("typing into a terminal")
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<()> {
        self.pty.resize(pty_process::Size::new(rows, cols)).context("resizing a terminal")
    }

    /// The screen's current text.
    #[must_use]
    pub fn screen(&self) -> String {
        self.screen.lock().parser.screen().contents()
    }

    /// All output since the start.
    #[must_use]
    pub fn raw(&self) -> Vec<u8> {
        self.screen.lock().raw.clone()
    }

    /// Waits until the screen shows `text`.
    pub fn expect(&self, text: &str, limit: Duration) -> Result<()> {
        eventually(&format!("{text:?} on the screen"), limit, || Ok(self.screen().contains(text).then_some(())))
            .with_context(|| format!("the screen is:\n{}", self.screen()))
    }

    /// Waits until the program has ended.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        eventually("a program on a terminal to end", limit, || Ok(self.child.try_wait()?))
            .with_context(|| format!("the screen is:\n{}", self.screen()))
    }

    /// The program's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn new_parser() -> vt100::Parser {
    vt100::Parser::new(
        ROWS.try_into().expect("24 rows are not zero"),
        COLS.try_into().expect("80 columns are not zero"),
        0,
    )
}
