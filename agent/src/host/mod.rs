//! The process host: PID 1 of the user's container.
//!
//! It listens on the socket of [`crate::protocol`], waits for the sidecar to say what to start, and runs the main
//! program on a terminal until it ends. Meanwhile it runs other programs on request.
//!
//! - [`init`]: the host's lifecycle: signals, the main program's end, reporting it.
//! - [`children`]: the table of processes and the only reaper; [`process`]: from a request to a running process;
//!   [`account`], [`detach`], [`stream`]: the user's passwd entry, the steps between fork and exec, descriptors.
//! - [`terminal`]: the main program's terminal, shared by all attached clients.
//! - [`session`]: one exec: a program and a connection.
//! - [`socket`]: connections and their requests; [`ports`] and [`dial`]: finding listening ports, and connecting to
//!   them.
//!
//! It runs on one thread: everything here mostly waits, and the work in between is short.

mod account;
mod children;
mod detach;
mod dial;
mod init;
mod oom;
mod ports;
mod process;
mod session;
mod socket;
mod stream;
mod terminal;
mod words;

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use loom_api::agent::MainState;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use self::{
    children::Children,
    process::{ProcessDefaults, TerminalProcess},
    terminal::Terminal,
};
use crate::protocol::{Failure, HostState, Program, StartRequest};

/// Used if `LOOM_RUN_DIR` is not set.
const DEFAULT_RUN_DIR: &str = "/loom/run";

/// Runs the host until the main program has ended, and exits with its code.
///
/// # Errors
///
/// When the host cannot listen.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).compact().init();
    let run_dir = std::env::var_os("LOOM_RUN_DIR").map_or_else(|| DEFAULT_RUN_DIR.into(), PathBuf::from);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let code = runtime.block_on(init::run(&run_dir, std::env::vars_os().collect()))?;
    // Tasks that are still running no longer matter.
    runtime.shutdown_background();
    Ok(ExitCode::from(code))
}

/// The exit code of a program ended by SIGKILL.
const KILLED: i32 = 128 + 9;

/// The state that all parts of the host share.
struct Host {
    children: Children,
    /// The environment that the host was started with, which is the image's.
    image: Vec<(OsString, OsString)>,
    /// Hands the main program over to [`init::run`]; `None` once it is started.
    starting: Mutex<Option<oneshot::Sender<terminal::Program>>>,
    main: watch::Sender<Option<Arc<Main>>>,
    state: watch::Sender<HostState>,
    /// The kernel's count of out-of-memory kills when the host started.
    oom_kills: u64,
    /// The main program has ended, so everything else is to end too.
    ending: CancellationToken,
    /// A client has received the main program's exit status.
    reported: CancellationToken,
}

/// The running main program.
struct Main {
    terminal: Terminal,
    defaults: ProcessDefaults,
}

impl Host {
    fn new(image: Vec<(OsString, OsString)>) -> (Self, oneshot::Receiver<terminal::Program>) {
        let (starting, started) = oneshot::channel();
        let host = Self {
            children: Children::default(),
            image,
            starting: Mutex::new(Some(starting)),
            main: watch::Sender::new(None),
            state: watch::Sender::new(HostState::default()),
            oom_kills: oom::kills(),
            ending: CancellationToken::new(),
            reported: CancellationToken::new(),
        };
        (host, started)
    }

    /// Starts the main program, unless it was started before. May be retried after a failure.
    fn start(&self, request: &StartRequest) -> Result<(), Failure> {
        let mut starting = self.starting.lock();
        if starting.is_none() {
            return Ok(());
        }
        let defaults = ProcessDefaults::new(self.image.iter().cloned(), request);
        let program = request.command.as_ref().map_or(Program::LoginShell, |words| Program::Argv(words.clone()));
        let command = defaults.command(&program, &BTreeMap::new(), None, Some(""))?;
        let size = Terminal::initial_size();
        let TerminalProcess { child, terminal } =
            process::spawn_on_terminal(&self.children, command, size.rows, size.cols)?;
        tracing::info!(pid = child.pid.as_raw_pid(), "the main program is running");
        let (terminal, program) = Terminal::new(child, terminal, request.command.is_none());
        self.main.send_replace(Some(Arc::new(Main { terminal, defaults })));
        self.state.send_modify(|state| state.main = MainState::Running);
        if let Some(starting) = starting.take() {
            // The receiver exists as long as the host runs.
            let _ = starting.send(program);
        }
        Ok(())
    }

    /// Records how the main program ended, and tells all clients.
    fn finish(&self, code: i32, output: &[u8]) {
        // Both are needed: the kernel may have killed other processes, and others may send SIGKILL.
        let out_of_memory = code == KILLED && oom::kills() > self.oom_kills;
        let tail = STANDARD.encode(output);
        self.state.send_modify(|state| state.main = MainState::Exited { code, tail, out_of_memory });
        self.ending.cancel();
    }

    /// Updates the list of listening ports, and tells watching clients if it has changed.
    fn refresh_ports(&self) {
        let ports = ports::ports();
        self.state.send_if_modified(|state| {
            let changed = state.ports != ports;
            state.ports = ports;
            changed
        });
    }
}
