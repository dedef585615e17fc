//! The process host: PID 1 of the user's container.
//!
//! It listens on the socket of [`crate::protocol`], waits until the sidecar says what to start, and then runs
//! the main program on a terminal of its own, until that ends. Meanwhile it runs whatever else is asked for.
//!
//! - [`init`]: the life of the host: signals, the main program's end, the last words.
//! - [`children`]: the table of processes and the one reaper; [`process`]: from a request to a running process;
//!   [`account`], [`detach`], [`stream`]: the user's entry, what happens between fork and exec, descriptors.
//! - [`terminal`]: the main program's terminal, shared by everybody who attaches.
//! - [`session`]: one exec: a program and a connection.
//! - [`socket`]: connections and what they ask for; [`ports`] and [`dial`]: what listens in the weaver, and reaching
//!   it.
//!
//! It is one thread: everything here waits most of the time, and what is done in between is short.

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
    process::{OnTerminal, Surroundings},
    terminal::Terminal,
};
use crate::protocol::{Failure, HostState, Program, StartRequest};

/// The run directory when the environment names none.
const DEFAULT_RUN_DIR: &str = "/loom/run";

/// Runs the host until the main program has ended; its exit code is the host's.
///
/// # Errors
///
/// When the host cannot listen.
pub(crate) fn run() -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_target(false).compact().init();
    let run_dir = std::env::var_os("LOOM_RUN_DIR").map_or_else(|| DEFAULT_RUN_DIR.into(), PathBuf::from);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    let code = runtime.block_on(init::live(&run_dir, std::env::vars_os().collect()))?;
    // What has not ended by now is of no consequence any more.
    runtime.shutdown_background();
    Ok(ExitCode::from(code))
}

/// The exit code of a program that SIGKILL ended.
const KILLED: i32 = 128 + 9;

/// What all parts of the host share.
struct Host {
    children: Children,
    /// The environment that the host was started with: the image's.
    image: Vec<(OsString, OsString)>,
    /// Where the main program is handed over when it is started; empty afterwards.
    starting: Mutex<Option<oneshot::Sender<terminal::Program>>>,
    main: watch::Sender<Option<Arc<Main>>>,
    state: watch::Sender<HostState>,
    /// Processes that were out of memory before there were any of ours.
    oom_kills: u64,
    /// The main program has ended: the others are to end too.
    ending: CancellationToken,
    /// Somebody was told how the main program ended.
    reported: CancellationToken,
}

/// The main program, once it is started.
struct Main {
    terminal: Terminal,
    surroundings: Surroundings,
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

    /// Starts the main program, unless it was started before. After a failure it may be tried again.
    ///
    /// # Errors
    ///
    /// When it cannot be run.
    fn start(&self, request: &StartRequest) -> Result<(), Failure> {
        let mut starting = self.starting.lock();
        if starting.is_none() {
            return Ok(());
        }
        let surroundings = Surroundings::new(self.image.iter().cloned(), request);
        let program = request.command.as_ref().map_or(Program::LoginShell, |words| Program::Argv(words.clone()));
        let command = surroundings.command(&program, &BTreeMap::new(), None, Some(""))?;
        let size = Terminal::initial_size();
        let OnTerminal { child, terminal } = process::spawn_on_terminal(&self.children, command, size.rows, size.cols)?;
        tracing::info!(pid = child.pid.as_raw_pid(), "the main program runs");
        let (terminal, program) = Terminal::new(child, terminal, request.command.is_none());
        self.main.send_replace(Some(Arc::new(Main { terminal, surroundings })));
        self.state.send_modify(|state| state.main = MainState::Running);
        if let Some(starting) = starting.take() {
            // The receiver waits as long as the host lives.
            let _ = starting.send(program);
        }
        Ok(())
    }

    /// Takes down how the main program ended, and tells everybody.
    fn finish(&self, code: i32, output: &[u8]) {
        // Others may have been killed so before, and the main program by somebody else.
        let out_of_memory = code == KILLED && oom::kills() > self.oom_kills;
        let tail = STANDARD.encode(output);
        self.state.send_modify(|state| state.main = MainState::Exited { code, tail, out_of_memory });
        self.ending.cancel();
    }

    /// Looks which ports are listened on, and tells those who watch when they have changed.
    fn refresh_ports(&self) {
        let ports = ports::ports();
        self.state.send_if_modified(|state| {
            let changed = state.ports != ports;
            state.ports = ports;
            changed
        });
    }
}
