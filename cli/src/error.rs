//! How a command fails: with one message (what, why, what to do next) and an exit code that programs can rely on.

use std::{fmt, io};

use loom_api::{
    ApiError, ErrorCode,
    client::{ClientError, ConnectionFailure},
};

/// The exit code of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) u8);

impl Exit {
    pub(crate) const OK: Self = Self(0);
    /// Any failure without a code of its own.
    pub(crate) const FAILURE: Self = Self(1);
    /// The command line or a setting is wrong.
    pub(crate) const USAGE: Self = Self(2);
    /// There is no token, or the server does not accept it.
    pub(crate) const NOT_LOGGED_IN: Self = Self(4);
    /// There is no weaver with that id or name.
    pub(crate) const NO_SUCH_WEAVER: Self = Self(5);
    /// The weaver has ended.
    pub(crate) const GONE: Self = Self(6);
    /// The server, the weaver or the daemon did not answer in time.
    pub(crate) const TIMED_OUT: Self = Self(7);
    /// A limit is reached: weavers, tokens or connections.
    pub(crate) const OVER_LIMIT: Self = Self(8);
    /// Interrupted by Ctrl+C: 128 + SIGINT.
    pub(crate) const INTERRUPTED: Self = Self(130);
    /// Nobody reads our output any more: 128 + SIGPIPE.
    pub(crate) const OUTPUT_CLOSED: Self = Self(141);
    /// `ssh` or `exec` failed before there was a remote exit code to return.
    pub(crate) const CONNECTION: Self = Self(255);

    /// The exit code for an error of the API.
    pub(crate) const fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Unauthorized => Self::NOT_LOGGED_IN,
            ErrorCode::WeaverNotFound => Self::NO_SUCH_WEAVER,
            ErrorCode::WeaverGone => Self::GONE,
            ErrorCode::AgentUnreachable | ErrorCode::ExpiredToken => Self::TIMED_OUT,
            ErrorCode::TooManyWeavers
            | ErrorCode::TooManyTokens
            | ErrorCode::TooManyDevices
            | ErrorCode::TooManyConnections => Self::OVER_LIMIT,
            _ => Self::FAILURE,
        }
    }

    /// The exit code of a program in a weaver; the operating system keeps eight bits of it.
    pub(crate) const fn of_program(code: i32) -> Self {
        Self((code & 0xff) as u8)
    }
}

impl From<Exit> for std::process::ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

/// Why a command failed. `main` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    exit: Exit,
    message: String,
    hint: Option<String>,
    /// Nothing is printed: the user knows already, or nobody reads it.
    silent: bool,
}

impl CliError {
    /// `message` says what failed and why, as `what: why` without a full stop.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None, silent: false }
    }

    pub(crate) fn failure(message: impl Into<String>) -> Self {
        Self::new(Exit::FAILURE, message)
    }

    /// A wrong command line or setting.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::USAGE, message)
    }

    /// Standard output cannot be written. A closed pipe (`loom ps | head -1`) is not worth a message.
    pub(crate) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::silent(Exit::OUTPUT_CLOSED)
        } else {
            Self::failure(format!("cannot write the output: {error}"))
        }
    }

    /// Ends with an exit code and prints nothing.
    pub(crate) const fn silent(exit: Exit) -> Self {
        Self { exit, message: String::new(), hint: None, silent: true }
    }

    /// Adds what to do next.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Prepends what was being done: `what: why`.
    #[must_use]
    pub(crate) fn doing(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    #[must_use]
    pub(crate) const fn with_exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    pub(crate) const fn exit(&self) -> Exit {
        self.exit
    }

    /// What to do next.
    pub(crate) fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The lines for standard error; empty for a silent error.
    pub(crate) fn lines(&self, colour: bool) -> String {
        if self.silent {
            return String::new();
        }
        let (error, hint, end) = if colour { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
        let mut lines = format!("{error}error:{end} {}\n", crate::output::printable(&self.message));
        if let Some(text) = &self.hint {
            lines.push_str(&format!("{hint}hint:{end} {}\n", crate::output::printable(text)));
        }
        lines
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        let hint = error.hint.or_else(|| hint_for(error.code).map(str::to_owned));
        Self { exit: Exit::of(error.code), message: error.message, hint, silent: false }
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Api(error) => error.into(),
            ClientError::BadUrl { .. } => Self::usage(error.to_string())
                .hint("set it with --server-url, LOOM_SERVER_URL or server_url in config.toml"),
            ClientError::Unreachable { failure, .. } => {
                let exit = if failure == ConnectionFailure::TimedOut { Exit::TIMED_OUT } else { Exit::FAILURE };
                Self::new(exit, error.to_string()).hint(connection_hint(failure))
            }
            ClientError::Protocol { .. } => {
                Self::failure(error.to_string()).hint("check that --server-url is a Loom server's; see: loom version")
            }
        }
    }
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> Self {
        Self::failure(error.to_string())
    }
}

/// What to do when connecting failed.
const fn connection_hint(failure: ConnectionFailure) -> &'static str {
    match failure {
        ConnectionFailure::Refused => "check that the server runs, and the port in its address",
        ConnectionFailure::UnknownHost => "check the spelling of the server's name, and that you are online",
        ConnectionFailure::UnknownIssuer => {
            "if you trust the CA of this server, give its certificate once: loom login --ca FILE \
             (programs: SSL_CERT_FILE=FILE)"
        }
        ConnectionFailure::WrongName => {
            "use a name that the certificate is for in --server-url, or ask for a certificate for this one"
        }
        ConnectionFailure::Expired => "ask the server's operator to renew it, or correct this machine's clock",
        ConnectionFailure::NotYetValid => "correct this machine's clock, or ask the server's operator",
        ConnectionFailure::BadCertificate => "ask the server's operator for another certificate",
        ConnectionFailure::PlainHttp => {
            "check the port; plain HTTP is for a server on this machine: --server-url http://127.0.0.1:PORT"
        }
        ConnectionFailure::Https => "check the port, or use https:// in --server-url",
        _ => "check the server's address and your network, then try again",
    }
}

/// What to do if the server's answer has no hint.
const fn hint_for(code: ErrorCode) -> Option<&'static str> {
    match code {
        ErrorCode::Unauthorized => Some("log in with: loom login"),
        ErrorCode::WeaverNotFound => Some("list your weavers with: loom ps --all"),
        ErrorCode::WeaverAmbiguous => Some("give more of the id; list your weavers with: loom ps"),
        ErrorCode::WeaverGone => Some("make another with: loom new"),
        ErrorCode::WeaverNotReady => Some("see what it waits for with: loom events ID"),
        ErrorCode::AgentUnreachable => Some("try again in a moment; see: loom events ID"),
        ErrorCode::TooManyWeavers => Some("delete one with: loom delete ID"),
        ErrorCode::TooManyRequests => Some("wait a minute, then try again"),
        ErrorCode::NameTaken => Some("choose another --name, or delete the other weaver"),
        _ => None,
    }
}

/// Adds context to an error.
pub(crate) trait Doing<T> {
    /// Prepends what was being done: `what: why`.
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<CliError>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.into().doing(what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_exit_code_has_its_error() {
        for (code, exit) in [
            (ErrorCode::Internal, 1),
            (ErrorCode::InvalidLifetime, 1),
            (ErrorCode::ImageUnavailable, 1),
            (ErrorCode::Forbidden, 1),
            (ErrorCode::Unauthorized, 4),
            (ErrorCode::WeaverNotFound, 5),
            (ErrorCode::WeaverGone, 6),
            (ErrorCode::AgentUnreachable, 7),
            (ErrorCode::TooManyWeavers, 8),
        ] {
            assert_eq!(CliError::from(ApiError::new(code, "no")).exit(), Exit(exit), "{code:?}");
        }
        let unreachable =
            |failure| ClientError::Unreachable { server: "https://loom.example/".into(), failure, reason: "no".into() };
        assert_eq!(CliError::from(unreachable(ConnectionFailure::TimedOut)).exit(), Exit::TIMED_OUT);
        assert_eq!(CliError::from(unreachable(ConnectionFailure::Refused)).exit(), Exit::FAILURE);
        assert_eq!(CliError::from(ClientError::BadUrl { url: "x".into(), reason: "no" }).exit(), Exit::USAGE);
    }

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let error = ApiError::new(ErrorCode::WeaverNotFound, "no weaver \"nobody\"");
        let error = Err::<(), _>(error).doing("cannot attach").expect_err("an error");
        assert_eq!(
            error.lines(false),
            "error: cannot attach: no weaver \"nobody\"\nhint: list your weavers with: loom ps --all\n"
        );
        assert!(error.lines(true).contains("\u{1b}[1;31merror:\u{1b}[0m"));
    }

    #[test]
    fn the_servers_own_hint_is_preferred() {
        let error = ApiError::new(ErrorCode::Unauthorized, "no").hint("ask your administrator");
        assert!(CliError::from(error).lines(false).ends_with("hint: ask your administrator\n"));
    }

    #[test]
    fn a_broken_pipe_is_silent() {
        let error = CliError::output(&io::ErrorKind::BrokenPipe.into());
        assert_eq!((error.exit(), error.lines(false).as_str()), (Exit::OUTPUT_CLOSED, ""));
    }

    #[test]
    fn control_characters_from_elsewhere_do_not_reach_the_terminal() {
        let error = CliError::failure("bad\x1b]0;owned\x07 name");
        assert!(!error.lines(false).contains(['\x1b', '\x07']), "{}", error.lines(false));
    }
}
