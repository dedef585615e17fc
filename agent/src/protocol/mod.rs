//! The protocol between the sidecar and the host: one unix socket, one connection per operation.
//!
//! The host listens on `<run dir>/host.sock` ([`socket_path`]); the sidecar connects. A connection carries one
//! operation, so each has its own back-pressure, and a dying sidecar ends nothing but its open sessions.
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
//! `Stdin` is limited by a window, so that resizes, signals and the end of the connection are always read, even when the
//! program does not read its input: the client may have [`STDIN_WINDOW`] bytes in flight, and each `Window` frame returns
//! as much as the program has read. When an exec's connection closes before the exit, the program gets `SIGHUP`.
//!
//! When the main program has ended, all watching clients receive its exit status and last output. The host then stays
//! until they have closed their connections, by which they say that they have reported it, but at most for [`LINGER`].
//!
//! [`HostClient`] is the client's side; [`FrameCodec`] and the types here are shared by both sides.

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

/// In bytes, of a request or reply; the environment is the largest part.
pub const MAX_MESSAGE: usize = 1 << 20;
/// In bytes, of a stream frame's payload.
pub const MAX_FRAME: usize = 64 << 10;
/// In bytes, of an attach or watch frame's payload: a snapshot is one frame, and so is the final state.
pub const MAX_LARGE_FRAME: usize = attach::MAX_FRAME;
/// How far a client may send standard input ahead of the program, in bytes.
pub const STDIN_WINDOW: usize = 256 << 10;

/// How long the host outlives the main program at most, for the sidecar to collect the exit status.
pub const LINGER: Duration = Duration::from_secs(3);

const SOCKET: &str = "host.sock";

#[must_use]
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join(SOCKET)
}

/// The first message on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Starts the main program. Has no effect if it was started before, so that a new sidecar may repeat it.
    Start(StartRequest),
    /// Subscribes to the main program's state and the listening ports.
    Watch,
    /// Runs another program.
    Exec(ExecRequest),
    /// Attaches to the main terminal.
    Attach(AttachQuery),
    /// Reads the main program's output, from the oldest byte kept.
    Logs {
        /// Whether to continue with new output until the program ends.
        follow: bool,
    },
    /// Connects to a TCP port of the weaver.
    Dial { port: u16 },
    /// Tells all attached clients that the weaver ends in so many seconds.
    Expiring { seconds: u64 },
}

/// [`Request::Start`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartRequest {
    /// The program and its arguments; a login shell when absent.
    pub command: Option<Vec<String>>,
    /// Environment for the main program and every later exec, in addition to the image's.
    pub env: BTreeMap<String, Secret>,
    /// The working directory, also the default for every later exec. The home directory if absent or not there.
    pub cwd: Option<String>,
}

/// [`Request::Exec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    pub program: Program,
    /// Environment in addition to the weaver's.
    #[serde(default)]
    pub env: BTreeMap<String, Secret>,
    /// The working directory; by default that of [`StartRequest`].
    #[serde(default)]
    pub cwd: Option<String>,
    /// The terminal, if the program is to have one. Standard error is then part of standard output.
    #[serde(default)]
    pub pty: Option<Pty>,
}

/// What an exec runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// The user's shell as a login shell (SSH's `shell` request).
    LoginShell,
    /// A command line for the user's shell, run with `-c` (SSH's `exec` request).
    Shell(String),
    /// A program and its arguments, without a shell.
    Argv(Vec<String>),
    /// The built-in SFTP server (SSH's `sftp` subsystem).
    Sftp,
}

/// The terminal of an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pty {
    /// `TERM`; `xterm-256color` if empty.
    pub term: String,
    /// 24 if 0.
    pub rows: u16,
    /// 80 if 0.
    pub cols: u16,
}

/// A terminal's new size: the payload of [`FrameKind::Resize`], as JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    pub rows: u16,
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
    /// Whether the kernel wrote a core dump.
    #[serde(default)]
    pub core_dumped: bool,
}

/// The payload of [`FrameKind::State`], as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostState {
    /// The main program's state, in the form of the control link.
    pub main: MainState,
    /// TCP ports that processes in the weaver listen on, ascending, each once.
    pub ports: Vec<u16>,
}

/// The host's answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The request is done, or its stream begins.
    Ok,
    /// The connection closes after this.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people: what failed and why, without a full stop.
    pub message: String,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The exit code as a shell would give it: 127 if not found, 126 if not executable, else 255.
    #[must_use]
    pub const fn exit_code(&self) -> i32 {
        match self.kind {
            FailureKind::CommandNotFound | FailureKind::NoShell => 127,
            FailureKind::CommandNotExecutable => 126,
            _ => 255,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The request is malformed, or has an invalid value.
    InvalidRequest,
    /// The main program was not started within the time that the host waits for it.
    NotStarted,
    /// The image has no shell.
    NoShell,
    /// The program does not exist.
    CommandNotFound,
    /// The program exists but cannot be executed.
    CommandNotExecutable,
    /// Nothing listens on the port.
    PortRefused,
    /// The host has reached its limit of connections.
    TooMany,
    /// The main program has ended, and the host is shutting down.
    ShuttingDown,
    /// Any other failure, such as a lack of memory, processes or pseudo-terminals.
    Internal,
    /// Sent by a newer host, and unknown to this build.
    #[serde(other)]
    Unknown,
}
