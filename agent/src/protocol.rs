//! Between the sidecar and the host: one unix socket, one connection per operation.
//!
//! The host listens on `<run dir>/host.sock` ([`socket_path`]); the sidecar connects. A connection carries one
//! operation, so each has its own back-pressure, and a sidecar that dies takes nothing with it but its open sessions.
//!
//! ```text
//! client → host   u32 BE length | JSON Request           (≤ 1 MiB)
//! host → client   u32 BE length | JSON Reply             (≤ 1 MiB)
//! then, where the operation has a stream, both ways
//!                 u8 kind | u32 BE length | payload      (≤ 64 KiB; ≤ 1 MiB on attach and watch)
//! ```
//!
//! | operation | client's frames | host's frames, and its end |
//! | --- | --- | --- |
//! | [`Request::Start`] | – | – |
//! | [`Request::Watch`] | – | [`FrameKind::State`], the first at once; ends with the host |
//! | [`Request::Exec`] | `Stdin`, `StdinEof`, `Resize`, `Signal` | `Stdout`, `Stderr`, `Window`; `Exit` is the last |
//! | [`Request::Attach`] | `Binary`, `Text` as in [`loom_api::attach`] | the same; ends after `exit` or `error` |
//! | [`Request::Logs`] | – | `Stdout`; the connection closes when all was sent |
//! | [`Request::Dial`] | – | the reply carries the connected socket by `SCM_RIGHTS` |
//! | [`Request::Expiring`] | – | – |
//!
//! `Stdin` is bounded by a window, so that resizes, signals and the end of the connection are always read, even when
//! the program does not read its input: the client may have [`STDIN_WINDOW`] bytes under way, and each `Window` frame
//! gives back what the program took. When the connection of an exec closes before its exit, the program is hung up on.
//!
//! When the main program has ended, everybody who watches is told, with the end of its output. The host then stays
//! until they have closed their connections (to them that is: "reported"), and at most for [`LINGER`].
//!
//! [`HostClient`] is the client's side in full; [`FrameCodec`] and the types here are what both sides share.

mod client;
mod connect;
mod frame;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use loom_api::{
    Secret,
    agent::MainState,
    attach::{self, AttachQuery},
};
use serde::{Deserialize, Serialize};

pub use self::{
    client::{
        AttachFrame, AttachInput, AttachOutput, AttachSession, ExecEvent, ExecInput, ExecOutput, ExecSession,
        HostClient, HostError, LogStream, StateStream,
    },
    frame::{Frame, FrameCodec, FrameKind, encode_message, read_message, write_message},
};

/// The largest request or reply, in bytes: an environment is the largest thing in them.
pub const MAX_MESSAGE: usize = 1 << 20;
/// The largest payload of a stream's frame, in bytes.
pub const MAX_FRAME: usize = 64 << 10;
/// The largest payload of an attach or watch frame, in bytes: a snapshot is one frame, and so is a last state.
pub const MAX_LARGE_FRAME: usize = attach::MAX_FRAME;
/// How many bytes of standard input a client may send ahead of the program, in bytes.
pub const STDIN_WINDOW: usize = 256 << 10;

/// How long the host outlives the main program, at most: the time a sidecar has to take its last words.
pub const LINGER: Duration = Duration::from_secs(3);

/// The socket's name in the run directory.
const SOCKET: &str = "host.sock";

/// Where the host listens.
#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET)
}

/// The first message on a connection: what the client wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Starts the main program. The second and later ones change nothing, so that a new sidecar may repeat it.
    Start(StartRequest),
    /// The main program's state and the listening ports, now and at every change.
    Watch,
    /// Runs one more program.
    Exec(ExecRequest),
    /// Joins the main terminal.
    Attach(AttachQuery),
    /// The main program's output, from the oldest byte kept.
    Logs {
        /// Goes on with what comes, until the program ends.
        follow: bool,
    },
    /// Connects to a TCP port of the weaver.
    Dial {
        /// The port.
        port: u16,
    },
    /// Tells everybody who is attached that the weaver ends soon.
    Expiring {
        /// In so many seconds.
        seconds: u64,
    },
}

/// [`Request::Start`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRequest {
    /// The program and its arguments; a login shell when there is none.
    pub command: Option<Vec<String>>,
    /// Environment for the main program and every later exec, on top of the image's own.
    pub env: BTreeMap<String, Secret>,
    /// The working directory, also the default of every later exec. The home directory when it is left out or missing.
    pub cwd: Option<String>,
}

/// [`Request::Exec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// What to run.
    pub program: Program,
    /// Environment on top of the weaver's.
    #[serde(default)]
    pub env: BTreeMap<String, Secret>,
    /// The working directory; that of [`StartRequest`] when it is left out.
    #[serde(default)]
    pub cwd: Option<String>,
    /// The terminal, if the program is to have one. Standard error then comes as standard output.
    #[serde(default)]
    pub pty: Option<Pty>,
}

/// What an exec runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// The user's shell as a login shell (SSH's `shell` request).
    LoginShell,
    /// A line for the user's shell, run with `-c` (SSH's `exec` request).
    Shell(String),
    /// A program and its arguments, without a shell.
    Argv(Vec<String>),
    /// The built-in SFTP server (SSH's `sftp` subsystem).
    Sftp,
}

/// A terminal to be made for an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// `TERM`; `xterm-256color` when it is empty.
    pub term: String,
    /// Rows; 24 when it is 0.
    pub rows: u16,
    /// Columns; 80 when it is 0.
    pub cols: u16,
}

/// A terminal's new size: the payload of [`FrameKind::Resize`], as JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How a program ended: the payload of [`FrameKind::Exit`], as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatus {
    /// The exit code, or 128 plus the signal's number.
    pub code: i32,
    /// The signal that ended it, as SSH names it (RFC 4254 §6.10): `TERM`, `KILL`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Whether it left a core.
    #[serde(default)]
    pub core_dumped: bool,
}

/// What [`Request::Watch`] tells: the payload of [`FrameKind::State`], as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The main program. Its `tail`, once it has ended, is what the control link wants.
    pub main: MainState,
    /// TCP ports that processes in the weaver listen on, ascending, each once.
    pub ports: Vec<u16>,
}

/// The host's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is done, or the stream begins.
    Ok,
    /// It is not done; the connection closes.
    Failed(Failure),
}

/// Why the host did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind, for programs.
    pub kind: FailureKind,
    /// What failed and why, in a sentence without a full stop, for people.
    pub message: String,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The exit code that a shell would give for this failure: 127 not found, 126 not executable, else 255.
    #[must_use]
    pub const fn exit_code(&self) -> i32 {
        match self.kind {
            FailureKind::CommandNotFound | FailureKind::NoShell => 127,
            FailureKind::CommandNotExecutable => 126,
            _ => 255,
        }
    }
}

/// The kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The request cannot be read, or names what cannot be.
    InvalidRequest,
    /// The main program was not started within the time that the host waits for it.
    NotStarted,
    /// The image has no shell.
    NoShell,
    /// The program does not exist.
    CommandNotFound,
    /// The program exists and cannot be executed.
    CommandNotExecutable,
    /// Nothing listens on the port.
    PortRefused,
    /// The host has as many connections as it serves at once.
    TooMany,
    /// The host is going down.
    ShuttingDown,
    /// Anything else: no memory, no process, no pseudo-terminal.
    Internal,
    /// A kind that this build does not know.
    #[serde(other)]
    Unknown,
}
