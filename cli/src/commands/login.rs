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

/// No token is longer, in bytes.
const MAX_TOKEN: u64 = 16 << 10;
/// No file of authorities is longer, in bytes: a system's whole bundle is a quarter of a megabyte.
const MAX_AUTHORITIES: u64 = 512 << 10;
/// What is added to the interval when the server asks for patience (RFC 8628 §3.5).
const SLOW_DOWN: Duration = Duration::from_secs(5);
/// The longest wait between two polls of a server that does not answer, unless it asked for a longer one.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// What the user is told meanwhile.
const WAITING: &str = "waiting for your approval";

/// Logs in to a server.
///
/// Shows an address and a code; the login is approved there, in any browser. The token is kept in a file that only you
/// can read, and the server becomes the one that every command uses.
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
    /// Trust the authorities in this PEM file for this server, from now on
    ///
    /// The certificates are copied and kept with the login, for every later command; the file is not needed again.
    /// Another `--ca` replaces them.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Open no browser
    #[arg(long)]
    no_browser: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let url = context.server_url()?;
    let authorities = match &args.ca {
        Some(file) => read_authorities(file)?,
        None => context.authorities()?,
    };
    let anonymous = Client::trusting(&url, None, &authorities)?;
    let token = match &args.token {
        Some(given) => exchange(&anonymous, given).await?,
        None => tokio::select! {
            token = approve(&anonymous, args) => token?,
            _ = tokio::signal::ctrl_c() => {
                output::note("\nLogin given up; nothing has changed.");
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
        output::warning("LOOM_TOKEN is set and goes before this login; unset it to use the login");
    }
    Ok(Exit::OK)
}

/// Makes a token for this machine with the given one, so that logging out here revokes nothing that is used elsewhere.
async fn exchange(client: &Client, given: &str) -> Result<Secret> {
    let given = if given == "-" {
        read_token()?
    } else {
        output::warning(
            "the token stands in the command line, where other programs and the shell's history see it; use: --token -",
        );
        Secret::from(given.to_owned())
    };
    if given.expose().is_empty() {
        return Err(CliError::usage("cannot log in: the token is empty"));
    }
    let request = CreateToken { name: client_name(), ttl_hours: None, login: true };
    match client.with_token(given.clone()).post::<NewToken>("/api/tokens", &request).await {
        Ok(new) => Ok(new.token),
        // It may do other things, but not make tokens: then it is used itself.
        Err(error) if error.code() == Some(ErrorCode::Forbidden) => Ok(given),
        Err(error) => {
            let refused = error.code() == Some(ErrorCode::Unauthorized);
            let error = CliError::from(error).doing(format_args!("cannot log in to {}", client.base()));
            let hint = "check the token; log in through the browser with: loom login";
            Err(if refused { error.hint(hint) } else { error })
        }
    }
}

/// The certificates in a PEM file, and nothing else that it may hold: a key does not belong in what is kept.
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
        return Err(cannot("there is no certificate in it".to_owned())
            .hint("it must hold the authority's certificate in PEM: -----BEGIN CERTIFICATE-----"));
    }
    Ok(certificates)
}

/// The certificates in a text in PEM (RFC 7468 §2).
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

/// Shows the code, and waits until somebody approves it.
async fn approve(client: &Client, args: &Args) -> Result<Secret> {
    let request = StartDeviceLogin { client_name: client_name() };
    let login: DeviceLogin = client
        .post("/api/login/device", &request)
        .await
        .doing(format_args!("cannot begin a login at {}", client.base()))?;
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

/// Asks until there is an answer, as often as the server allows. A server that cannot be reached or is overloaded is
/// asked again until the code expires: it may be restarting while the user approves.
async fn poll(client: &Client, login: &DeviceLogin, progress: &Progress) -> Result<Secret> {
    let deadline = Instant::now() + Duration::from_secs(login.expires_in);
    let mut pace = Pace::new(Duration::from_secs(login.interval));
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
            _ if error.is_passing() => {
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
        None => "the code has expired before it was approved".to_owned(),
    };
    CliError::new(Exit::TIMED_OUT, format!("cannot log in: {why}")).hint("try again with: loom login")
}

/// How long to wait before the next poll (RFC 8628 §3.5): the interval, longer for good each time that the server asks
/// to slow down, and twice as long for each failure in a row.
#[derive(Debug)]
struct Pace {
    interval: Duration,
    failures: u32,
}

impl Pace {
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

/// Where the login comes from, for the person who approves it: `user@host`.
fn client_name() -> String {
    let user = env::var("USER").or_else(|_| env::var("LOGNAME")).unwrap_or_else(|_| "somebody".to_owned());
    let host = rustix::system::uname();
    format!("{user}@{}", host.nodename().to_string_lossy())
}

/// Shows a page in the desktop's browser, if there is a desktop; whether one was asked to.
fn open_browser(url: &str) -> bool {
    // Never anything but a page: other schemes start other programs.
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
    // Not waited for: some openers stay as long as the browser does.
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
    fn only_certificates_are_kept_of_a_file_of_authorities() {
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nMIIC\n-----END PRIVATE KEY-----\n";
        assert_eq!(certificates(&format!("a note\r\n{certificate}{key}{certificate}")), certificate.repeat(2));
        assert_eq!(certificates(key), "");
    }

    #[test]
    fn polls_slow_down_for_good_when_asked_and_for_a_while_after_failures() {
        let mut pace = Pace::new(Duration::from_secs(1));
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
