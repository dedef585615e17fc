//! The HTTP API as used by a program other than ours: with `curl`, and a WebSocket library for attach.

use std::{collections::BTreeMap, fmt::Write as _, net::TcpStream, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tungstenite::{ClientRequestBuilder, Message, WebSocket};

use crate::{System, Weaver, system::TIMEOUT, system::output_with_input};

/// The headers that ask for a WebSocket, for requests that are to be refused.
pub const UPGRADE: [&str; 4] = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
];

/// Requests that [`System::request_all`] has under way at the same time.
const PARALLEL: &str = "8";

/// A response of the API.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The body, if it is JSON.
    pub body: Value,
}

/// A page for a browser.
#[derive(Debug)]
pub struct Page {
    pub status: u16,
    /// The HTML.
    pub body: String,
}

impl Answer {
    /// The error code in the body, or nothing.
    #[must_use]
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }
}

impl System {
    /// Makes a request with a bearer token, or without one.
    pub fn request(&self, token: Option<&str>, method: &str, path: &str, body: Option<&str>) -> Result<Answer> {
        self.request_with(token, method, path, body, &[])
    }

    /// As [`System::request`], with more headers.
    pub fn request_with(
        &self,
        token: Option<&str>,
        method: &str,
        path: &str,
        body: Option<&str>,
        headers: &[&str],
    ) -> Result<Answer> {
        let mut curl = Command::new("curl");
        curl.envs(self.environment());
        curl.args(["-sS", "--noproxy", "*", "--max-time", "30", "--write-out", "\n%{http_code}", "--config", "-"]);
        curl.args(["--request", method, &format!("{}{path}", self.url())]);
        for header in headers {
            curl.args(["--header", header]);
        }
        if let Some(body) = body {
            curl.args(["--header", "Content-Type: application/json", "--data-raw", body]);
        }
        // Through standard input, so that the token is in no process list.
        let config = token.map(|token| format!("header = \"Authorization: Bearer {token}\"\n")).unwrap_or_default();
        let output = output_with_input(curl, config.as_bytes())?;
        ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').context("curl's status line")?;
        Ok(Answer { status: status.parse()?, body: serde_json::from_str(body).unwrap_or_default() })
    }

    /// Makes many requests, several at a time, each with a token, a method, a path and a body; how many answers there
    /// were of each HTTP status.
    pub fn request_all(&self, requests: &[(&str, &str, String, String)]) -> Result<BTreeMap<u16, usize>> {
        let mut config = String::new();
        for (token, method, path, body) in requests {
            if !config.is_empty() {
                config.push_str("next\n");
            }
            writeln!(config, "url = {}", quoted(&format!("{}{path}", self.url())))?;
            writeln!(config, "request = {method}\nheader = \"Authorization: Bearer {token}\"")?;
            if !body.is_empty() {
                writeln!(config, "header = \"Content-Type: application/json\"\ndata-raw = {}", quoted(body))?;
            }
            config.push_str("output = /dev/null\nwrite-out = \"%{http_code}\\n\"\n");
        }
        let mut curl = Command::new("curl");
        curl.envs(self.environment());
        curl.args(["-sS", "--noproxy", "*", "--parallel", "--parallel-max", PARALLEL, "--config", "-"]);
        let output = output_with_input(curl, config.as_bytes())?;
        ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
        let mut answers = BTreeMap::new();
        for line in String::from_utf8(output.stdout)?.lines() {
            *answers.entry(line.parse()?).or_default() += 1;
        }
        Ok(answers)
    }

    /// Exchanges a one-time sign-in token for an API token.
    pub fn sign_in(&self, token: &str) -> Result<String> {
        let answer = self.request(Some(token), "POST", "/api/tokens", Some(r#"{"name":"tests"}"#))?;
        ensure!(answer.status == 201, "signing in: {answer:?}");
        Ok(answer.body["token"].as_str().context("a token")?.to_owned())
    }

    /// Approves a device login with a token, as a person does in a browser: fills in both forms at `/login/device`.
    pub fn approve_login(&self, code: &str, token: &str) -> Result<()> {
        let question = self.login_page(&[&format!("user_code={code}"), "token@-"], token)?;
        let ticket = question.body.split("name=\"ticket\" value=\"").nth(1).and_then(|rest| rest.split('"').next());
        let ticket = ticket.with_context(|| format!("no second step: {question:?}"))?;
        let done = self.login_page(&["action=approve", "ticket@-"], ticket)?;
        ensure!(done.status == 200 && done.body.contains("Logged in"), "approving: {done:?}");
        Ok(())
    }

    /// Sends a form to `/login/device`; `@-` in a field stands for `secret`.
    pub fn login_page(&self, fields: &[&str], secret: &str) -> Result<Page> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--noproxy", "*", "--max-time", "30", "--write-out", "\n%{http_code}"]);
        for field in fields {
            curl.args(["--data-urlencode", field]);
        }
        curl.arg(format!("{}/login/device", self.url()));
        let output = output_with_input(curl, secret.as_bytes())?;
        ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').context("curl's status line")?;
        Ok(Page { status: status.parse()?, body: body.to_owned() })
    }

    /// Adds a user; returns an API token of theirs.
    pub fn add_user(&self, name: &str) -> Result<String> {
        self.sign_in(self.manage(&["user", "add", name])?.trim())
    }

    /// Creates a weaver as the administrator, and does not wait for it.
    pub fn create_weaver(&self, body: &Value) -> Result<Weaver> {
        let answer = self.request(Some(&self.admin_token()?), "POST", "/api/weavers", Some(&body.to_string()))?;
        ensure!(answer.status == 201, "creating a weaver: {answer:?}");
        Ok(Weaver { id: answer.body["id"].as_str().context("an id")?.to_owned() })
    }

    /// Opens an attach WebSocket, with a subprotocol or without one.
    pub fn attach_socket(&self, weaver: &Weaver, subprotocol: Option<&str>) -> Result<WebSocket<TcpStream>> {
        self.attach_socket_as(&self.admin_token()?, weaver, subprotocol)
    }

    /// Opens an attach WebSocket with a given token.
    pub fn attach_socket_as(
        &self,
        token: &str,
        weaver: &Weaver,
        subprotocol: Option<&str>,
    ) -> Result<WebSocket<TcpStream>> {
        self.web_socket(token, &format!("/api/weavers/{}/attach?rows=24&cols=80", weaver.id), subprotocol)
    }

    /// Opens a WebSocket with a token.
    pub fn web_socket(&self, token: &str, path: &str, subprotocol: Option<&str>) -> Result<WebSocket<TcpStream>> {
        let authority = self.url().trim_start_matches("http://").to_owned();
        let uri = format!("ws://{authority}{path}").parse()?;
        let mut request = ClientRequestBuilder::new(uri).with_header("Authorization", format!("Bearer {token}"));
        if let Some(subprotocol) = subprotocol {
            request = request.with_sub_protocol(subprotocol);
        }
        let stream = TcpStream::connect(authority)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let (socket, _) =
            tungstenite::client(request, stream).map_err(|error| anyhow::anyhow!("opening {path}: {error}"))?;
        Ok(socket)
    }
}

/// A value in a configuration file of curl's.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The figures that a server shows at `address`.
pub fn metrics(address: &str) -> Result<String> {
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", "--noproxy", "*", "--max-time", "10", &format!("http://{address}/metrics")]);
    let output = output_with_input(curl, b"")?;
    ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Reads frames until the text of them contains `wanted`; all that was read.
pub fn read_until(socket: &mut WebSocket<TcpStream>, wanted: &str) -> Result<String> {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        match socket.read().with_context(|| format!("waiting for {wanted:?} after {seen:?}"))? {
            Message::Text(text) => seen.push_str(&text),
            Message::Binary(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
            _ => {}
        }
    }
    Ok(seen)
}
