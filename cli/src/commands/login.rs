//! `loom login`: the device authorization grant (RFC 8628), or a token that the user already has.

use std::{
    env, fs,
    io::{IsTerminal as _, Read as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use loom_api::{
    ErrorCode, Secret,
    client::Client,
    login::{CreateToken, DeviceLogin, Me, NewToken, PollDeviceLogin, StartDeviceLogin},
};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::{
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    output,
    progress::Progress,
};

/// In bytes; no token is longer.
const MAX_TOKEN: u64 = 16 << 10;
/// In bytes; a system's whole CA bundle is a quarter of a megabyte.
const MAX_AUTHORITIES: u64 = 512 << 10;
/// Added to the polling interval when the server answers `slow_down` (RFC 8628 §3.5).
const SLOW_DOWN: Duration = Duration::from_secs(5);
/// Between polls of a server that does not answer, unless it asked for a longer interval.
const MAX_PAUSE: Duration = Duration::from_secs(10);
const WAITING: &str = "waiting for your approval";

/// Logs in to a server.
///
/// Shows a URL and a code; approve the login there, in any browser. The token is stored in a file that only you can
/// read, and the server becomes the default for all commands.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom login --server-url https://loom.example
  loom login                                   again, at the same server
  loom login --token - < token-file            with a token: for CI and scripts
  loom login --ca authority.pem                at a server whose certificate is of an authority of your own

Programs can do without a login: set LOOM_SERVER_URL and LOOM_TOKEN.")]
pub(crate) struct Args {
    /// Log in with a token instead of a browser; `-` reads it from standard input
    #[arg(long, value_name = "TOKEN|-")]
    token: Option<String>,
    /// Trust the CA certificates in this PEM file for this server, from now on
    ///
    /// They are stored with the login, so the file is not needed again. Another `--ca` replaces them.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Do not open a browser
    #[arg(long)]
    no_browser: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let url = context.server_url()?;
    let authorities = match &args.ca {
        Some(file) => read_authorities(file)?,
        None => context.authorities()?,
    };
    let anonymous = Client::with_ca_certificates(&url, None, &authorities)?;
    let token = match &args.token {
        Some(given) => exchange(&anonymous, given).await?,
        None => tokio::select! {
            token = approve(&anonymous, args) => token?,
            _ = tokio::signal::ctrl_c() => {
                output::note("\nLogin cancelled; nothing has changed.");
                return Ok(Exit::INTERRUPTED);
            }
        },
    };
    let me: Me =
        anonymous.with_token(token.clone()).get("/api/me").await.doing(format_args!("cannot log in to {url}"))?;
    let mut credentials = context.credentials()?;
    credentials.remember(&url, token);
    credentials.trust(&url, &authorities);
    credentials.write(context.directory()?)?;
    output::note(&format!("Logged in to {url} as {}.", me.user.name));
    if context.token_is_from_environment() {
        output::warning("LOOM_TOKEN is set and takes precedence over this login; unset it to use the login");
    }
    Ok(Exit::OK)
}

/// Exchanges the given token for one of this machine's own, so that logging out here affects no other use of it.
async fn exchange(client: &Client, given: &str) -> Result<Secret> {
    let given = if given == "-" {
        read_token()?
    } else {
        output::warning(
            "the token is on the command line, visible to other programs and in the shell's history; use: --token -",
        );
        Secret::from(given.to_owned())
    };
    if given.expose().is_empty() {
        return Err(CliError::usage("cannot log in: the token is empty"));
    }
    let request = CreateToken { name: client_name(), ttl_hours: None, login: true };
    match client.with_token(given.clone()).post::<NewToken>("/api/tokens", &request).await {
        Ok(new) => Ok(new.token),
        // The token may not create tokens, so it is used itself.
        Err(error) if error.code() == Some(ErrorCode::Forbidden) => Ok(given),
        Err(error) => {
            let refused = error.code() == Some(ErrorCode::Unauthorized);
            let error = CliError::from(error).doing(format_args!("cannot log in to {}", client.base()));
            let hint = "check the token; log in through the browser with: loom login";
            Err(if refused { error.hint(hint) } else { error })
        }
    }
}

/// The certificates in a PEM file. Anything else in it, such as a private key, is not stored.
fn read_authorities(file: &Path) -> Result<String> {
    let cannot = |why: String| CliError::usage(format!("cannot use --ca {}: {why}", file.display()));
    let mut text = String::new();
    fs::File::open(file)
        .and_then(|opened| opened.take(MAX_AUTHORITIES + 1).read_to_string(&mut text))
        .map_err(|error| cannot(error.to_string()))?;
    if text.len() as u64 > MAX_AUTHORITIES {
        return Err(cannot(format!("it is longer than {} KiB", MAX_AUTHORITIES >> 10)));
    }
    let certificates = certificates(&text);
    if certificates.is_empty() {
        return Err(cannot("it has no certificate".to_owned())
            .hint("it must contain the CA certificate in PEM: -----BEGIN CERTIFICATE-----"));
    }
    Ok(certificates)
}

/// The certificates in a PEM text (RFC 7468 §2).
fn certificates(text: &str) -> String {
    let mut inside = false;
    let mut kept = String::new();
    for line in text.lines().map(str::trim) {
        inside |= line == "-----BEGIN CERTIFICATE-----";
        if inside {
            kept.push_str(line);
            kept.push('\n');
        }
        inside &= line != "-----END CERTIFICATE-----";
    }
    kept
}

fn read_token() -> Result<Secret> {
    if std::io::stdin().is_terminal() {
        output::note("Type the token, then Enter and Ctrl+D:");
    }
    let mut text = zeroize::Zeroizing::new(String::new());
    std::io::stdin()
        .take(MAX_TOKEN)
        .read_to_string(&mut text)
        .map_err(|error| CliError::failure(format!("cannot read the token from standard input: {error}")))?;
    Ok(Secret::from(text.trim().to_owned()))
}

/// Shows the code, and waits until the login is approved.
async fn approve(client: &Client, args: &Args) -> Result<Secret> {
    let request = StartDeviceLogin { client_name: client_name() };
    let login: DeviceLogin = client
        .post("/api/login/device", &request)
        .await
        .doing(format_args!("cannot start a login at {}", client.base()))?;
    let opened = !args.no_browser && open_browser(&login.verification_uri_complete);
    output::note(&instructions(&login, opened));
    let progress = Progress::start(WAITING);
    let token = poll(client, &login, &progress).await;
    progress.finish();
    token
}

fn instructions(login: &DeviceLogin, opened: bool) -> String {
    let verb =
        if opened { "Approve the login in your browser, which should open now, or at" } else { "To log in, open" };
    format!(
        "{verb}\n\n  {}\n\nand check that it shows the code\n\n  {}\n",
        login.verification_uri_complete, login.user_code
    )
}

/// Polls until the login is decided, as often as the server allows. A server that is unreachable or overloaded is polled
/// until the code expires: it may be restarting while the user approves.
async fn poll(client: &Client, login: &DeviceLogin, progress: &Progress) -> Result<Secret> {
    let deadline = Instant::now() + Duration::from_secs(login.expires_in);
    let mut pace = PollInterval::new(Duration::from_secs(login.interval));
    let request = PollDeviceLogin { device_code: login.device_code.clone() };
    let mut problem: Option<String> = None;
    loop {
        if Instant::now() + pace.pause() >= deadline {
            sleep_until(deadline).await;
            return Err(expired(problem));
        }
        sleep(pace.pause()).await;
        let asked = timeout_at(deadline, client.post::<NewToken>("/api/login/token", &request)).await;
        let Ok(answer) = asked else { return Err(expired(problem)) };
        let error = match answer {
            Ok(new) => return Ok(new.token),
            Err(error) => error,
        };
        match error.code() {
            Some(ErrorCode::AuthorizationPending) => {
                pace.answered();
                if problem.take().is_some() {
                    progress.waiting_for(WAITING);
                }
            }
            Some(ErrorCode::SlowDown) => pace.slow_down(),
            Some(ErrorCode::ExpiredToken) => return Err(expired(None)),
            Some(ErrorCode::AccessDenied) => {
                return Err(CliError::new(Exit::NOT_LOGGED_IN, "cannot log in: the login was refused in the browser"));
            }
            _ if error.is_transient() => {
                pace.failed();
                progress.waiting_for(&format!("{error}; trying again"));
                problem = Some(error.to_string());
            }
            _ => return Err(CliError::from(error).doing("cannot log in")),
        }
    }
}

fn expired(problem: Option<String>) -> CliError {
    let why = match problem {
        Some(problem) => format!("the server did not answer before the code expired: {problem}"),
        None => "the code expired before it was approved".to_owned(),
    };
    CliError::new(Exit::TIMED_OUT, format!("cannot log in: {why}")).hint("try again with: loom login")
}

/// The wait before the next poll (RFC 8628 §3.5): the interval, which each `slow_down` lengthens for good and each
/// failure in a row doubles.
#[derive(Debug)]
struct PollInterval {
    interval: Duration,
    failures: u32,
}

impl PollInterval {
    fn new(interval: Duration) -> Self {
        Self { interval: interval.max(Duration::from_secs(1)), failures: 0 }
    }

    fn pause(&self) -> Duration {
        let longest = MAX_PAUSE.max(self.interval);
        self.interval.saturating_mul(1 << self.failures.min(8)).min(longest)
    }

    fn answered(&mut self) {
        self.failures = 0;
    }

    fn slow_down(&mut self) {
        self.failures = 0;
        self.interval += SLOW_DOWN;
    }

    fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }
}

/// Where the login comes from, shown to the user who approves it: `user@host`.
fn client_name() -> String {
    let user = env::var("USER").or_else(|_| env::var("LOGNAME")).unwrap_or_else(|_| "somebody".to_owned());
    let host = rustix::system::uname();
    format!("{user}@{}", host.nodename().to_string_lossy())
}

/// Opens a page in the desktop's browser; returns whether one was started.
fn open_browser(url: &str) -> bool {
    // Only web pages: other schemes start other programs.
    if !(url.starts_with("https://") || url.starts_with("http://")) || !std::io::stderr().is_terminal() {
        return false;
    }
    let set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
    let remote = set("SSH_CONNECTION") || set("SSH_TTY");
    let opener = if cfg!(target_os = "macos") {
        (!remote).then_some("open")
    } else {
        (!remote && (set("DISPLAY") || set("WAYLAND_DISPLAY"))).then_some("xdg-open")
    };
    let Some(opener) = opener else { return false };
    // Not waited for: some openers run as long as the browser does.
    Command::new(opener).arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_name_the_address_and_the_code() {
        let login = DeviceLogin {
            device_code: "secret".to_owned().into(),
            user_code: "BCDF-GHJK".into(),
            verification_uri: "https://loom.example/login/device".into(),
            verification_uri_complete: "https://loom.example/login/device?user_code=BCDF-GHJK".into(),
            expires_in: 600,
            interval: 1,
        };
        assert_eq!(
            instructions(&login, false),
            "To log in, open\n\n  https://loom.example/login/device?user_code=BCDF-GHJK\n\n\
             and check that it shows the code\n\n  BCDF-GHJK\n"
        );
        assert!(instructions(&login, true).contains("browser"));
    }

    #[test]
    fn only_certificates_of_a_ca_file_are_stored() {
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nMIIC\n-----END PRIVATE KEY-----\n";
        assert_eq!(certificates(&format!("a note\r\n{certificate}{key}{certificate}")), certificate.repeat(2));
        assert_eq!(certificates(key), "");
    }

    #[test]
    fn polls_slow_down_for_good_when_asked_and_for_a_while_after_failures() {
        let mut pace = PollInterval::new(Duration::from_secs(1));
        let mut pauses = Vec::new();
        for _ in 0..6 {
            pauses.push(pace.pause().as_secs());
            pace.failed();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 10, 10]);
        pace.answered();
        assert_eq!(pace.pause().as_secs(), 1);
        pace.slow_down();
        pace.slow_down();
        pace.answered();
        assert_eq!(pace.pause().as_secs(), 11);
        pace.failed();
        assert_eq!(pace.pause().as_secs(), 11, "no wait is longer than it was");
    }

    #[test]
    fn only_pages_are_opened() {
        for url in ["file:///etc/passwd", "javascript:alert(1)", "ssh://host", ""] {
            assert!(!open_browser(url), "{url}");
        }
    }

    #[test]
    fn a_login_says_from_where_it_comes() {
        assert!(client_name().contains('@'));
    }
}
