//! The device authorization grant (RFC 8628), and the page on which a person approves it.
//!
//! The page takes two steps. The first asks for the code and a token; the second shows who asks to be let in, and takes
//! the decision. Between them the page carries a ticket that only this server can read, and no cookie, so there is no
//! session that another site could ride on. Codes are kept as hashes.

use std::time::Duration;

use axum::{
    Form,
    extract::{
        Query, State,
        rejection::{FormRejection, QueryRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    ErrorCode, Secret,
    login::{DeviceLogin, NewToken, PollDeviceLogin, StartDeviceLogin, TokenKind, User},
};
use serde::{Deserialize, Serialize};

use super::body::Body;
use crate::{
    listener::ClientAddress,
    problem::{Answer, Problem},
    secrets::{hash, random},
    sign_in,
    state::AppState,
    store::{Approval, Decision, DeviceLoginError, DevicePoll, LoginClient, PendingLogin, Token, TokenOwner},
};

/// How long a login may wait for its approval.
const LIFETIME: SignedDuration = SignedDuration::from_mins(10);
/// Between two polls.
const INTERVAL: SignedDuration = SignedDuration::from_secs(1);
/// How long a user may look at who asks before deciding.
const TICKET_LIFETIME: SignedDuration = SignedDuration::from_mins(2);
/// What tickets are sealed for.
const TICKET: &str = "device login approval v1";
/// Letters of user codes: no vowels, so no words; nothing that looks like a digit (RFC 8628 §6.1).
const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
/// The longest name of a client that is kept.
const MAX_NAME: usize = 100;

/// Begins a login.
#[utoipa::path(post, path = "/api/login/device", tag = "login", request_body = StartDeviceLogin,
    responses((status = 200, body = DeviceLogin), (status = 429, body = loom_api::ErrorBody)))]
pub async fn start(
    State(app): State<AppState>,
    address: ClientAddress,
    Body(request): Body<StartDeviceLogin>,
) -> Answer<axum::Json<DeviceLogin>> {
    let too_many = |message: &str, hint: String| Problem::new(ErrorCode::TooManyRequests, message).hint(hint);
    app.device_limits.start(address.network()).map_err(|wait| {
        too_many("too many logins were begun from your address", format!("try again in {}", seconds(wait)))
    })?;
    let device_code = URL_SAFE_NO_PAD.encode(random::<32>());
    let user_code = new_user_code();
    let name: String = request.client_name.chars().filter(|letter| !letter.is_control()).take(MAX_NAME).collect();
    let client = LoginClient { name, address: address.0, network: address.network() };
    let until = Timestamp::now() + LIFETIME;
    app.store.add_device_login(&device_code, &user_code, &client, until).await.map_err(|error| match error {
        DeviceLoginError::TooMany => too_many(
            "too many logins wait for their approval",
            "approve or deny those that wait, or try again in ten minutes".to_owned(),
        ),
        DeviceLoginError::Database(error) => error.into(),
    })?;
    let verification_uri = format!("{}/login/device", app.url);
    Ok(axum::Json(DeviceLogin {
        device_code: Secret::from(device_code),
        verification_uri_complete: format!("{verification_uri}?user_code={user_code}"),
        verification_uri,
        user_code,
        expires_in: LIFETIME.as_secs().unsigned_abs(),
        interval: INTERVAL.as_secs().unsigned_abs(),
    }))
}

/// Asks whether a login was approved.
#[utoipa::path(post, path = "/api/login/token", tag = "login", request_body = PollDeviceLogin,
    responses((status = 200, body = NewToken), (status = 400, body = loom_api::ErrorBody)))]
pub async fn poll(State(app): State<AppState>, Body(request): Body<PollDeviceLogin>) -> Answer<axum::Json<NewToken>> {
    let problem = |code, message| Err(Problem::new(code, message));
    let name = "loom login".to_owned();
    let end = Timestamp::now() + app.config.login_life;
    match app.store.poll_device_login(request.device_code.expose(), INTERVAL, &name, end).await? {
        DevicePoll::Pending => problem(ErrorCode::AuthorizationPending, "the login is not approved yet"),
        DevicePoll::TooSoon => problem(ErrorCode::SlowDown, "polling too often"),
        DevicePoll::Expired => {
            Err(Problem::new(ErrorCode::ExpiredToken, "the code has expired").hint("begin again: loom login"))
        }
        DevicePoll::Denied => problem(ErrorCode::AccessDenied, "the login was denied"),
        DevicePoll::Approved(token) => Ok(axum::Json(NewToken { token, name, expires_at: Some(end) })),
    }
}

/// What the page is opened with.
#[derive(Deserialize)]
pub struct PageQuery {
    /// The code, filled in.
    #[serde(default)]
    user_code: String,
}

/// What the page sends: first the code and a token, then the ticket and the decision.
#[derive(Deserialize)]
pub struct Submission {
    #[serde(default)]
    user_code: String,
    token: Option<Secret>,
    ticket: Option<String>,
    #[serde(default)]
    action: String,
}

/// Who may decide which login, and until when.
#[derive(Serialize, Deserialize)]
struct Ticket {
    user_code: String,
    token_hash: String,
    until: Timestamp,
}

/// The approval page.
#[utoipa::path(get, path = "/login/device", tag = "login", responses((status = 200, content_type = "text/html", body = String)))]
pub async fn page(query: Result<Query<PageQuery>, QueryRejection>) -> Response {
    match query {
        Ok(Query(query)) => respond(StatusCode::OK, &form(&query.user_code, "")),
        Err(_) => respond(StatusCode::BAD_REQUEST, &form("", "The address was not complete. Type the code in.")),
    }
}

/// A step of the approval, from the page.
#[utoipa::path(post, path = "/login/device", tag = "login", responses((status = 200, content_type = "text/html", body = String)))]
pub async fn submit(
    State(app): State<AppState>,
    address: ClientAddress,
    submission: Result<Form<Submission>, FormRejection>,
) -> Answer<Response> {
    match submission {
        Ok(Form(Submission { ticket: Some(ticket), action, .. })) => decide(&app, &ticket, &action).await,
        Ok(Form(Submission { user_code, token: Some(token), .. })) => {
            let code = normalise(&user_code);
            if let Err(wait) = app.device_limits.attempt(address.network()) {
                let why = format!("Too many wrong codes or tokens from your address. Try again in {}.", seconds(wait));
                return Ok(respond(StatusCode::TOO_MANY_REQUESTS, &form(&code, &why)));
            }
            let (right, response) = ask(&app, &code, &token).await?;
            if right {
                app.device_limits.succeeded(address.network());
            }
            Ok(response)
        }
        _ => Ok(respond(StatusCode::BAD_REQUEST, &form("", "The form was not complete."))),
    }
}

/// The first step: shows who asks, if code and token are right, and whether they are.
async fn ask(app: &AppState, code: &str, token: &Secret) -> Answer<(bool, Response)> {
    let again = |status, why| Ok((false, respond(status, &form(code, why))));
    let token_hash = hash(token.expose().trim());
    let user = match approver(app.store.token_with_hash(&token_hash).await?) {
        Ok((user, ..)) => user,
        Err(why) => return again(StatusCode::FORBIDDEN, why),
    };
    let Some(login) = app.store.pending_device_login(code).await? else {
        return again(StatusCode::NOT_FOUND, NO_LOGIN);
    };
    let now = Timestamp::now();
    let ticket = Ticket { user_code: code.to_owned(), token_hash, until: now + TICKET_LIFETIME };
    let sealed = app.secrets.seal(TICKET, &serde_json::to_vec(&ticket).map_err(anyhow::Error::from)?);
    let page = question(&login, &user.name, now, &URL_SAFE_NO_PAD.encode(sealed));
    Ok((true, respond(StatusCode::OK, &page)))
}

/// The second step: does what the user said, if the token is still good.
async fn decide(app: &AppState, ticket: &str, action: &str) -> Answer<Response> {
    let opened = URL_SAFE_NO_PAD.decode(ticket).ok().and_then(|sealed| app.secrets.open(TICKET, &sealed).ok());
    let ticket: Option<Ticket> = opened.and_then(|plain| serde_json::from_slice(&plain).ok());
    let approval = match action {
        "approve" => Some(Approval::Approve),
        "deny" => Some(Approval::Deny),
        _ => None,
    };
    let (Some(ticket), Some(approval)) = (ticket.filter(|ticket| Timestamp::now() < ticket.until), approval) else {
        return Ok(respond(StatusCode::BAD_REQUEST, &form("", "That took too long. Please begin again.")));
    };
    let code = &ticket.user_code;
    let again = |status, why| Ok(respond(status, &form(code, why)));
    let (user, token, kind) = match approver(app.store.token_with_hash(&ticket.token_hash).await?) {
        Ok(approver) => approver,
        Err(why) => return again(StatusCode::FORBIDDEN, why),
    };
    let Some(login) = app.store.pending_device_login(code).await? else {
        return again(StatusCode::NOT_FOUND, NO_LOGIN);
    };
    match app.store.decide_device_login(code, user.id, token, approval).await? {
        Decision::Made => {}
        Decision::NoLogin => return again(StatusCode::CONFLICT, "This login was decided meanwhile."),
        Decision::NoToken => return again(StatusCode::FORBIDDEN, NOT_A_TOKEN),
    }
    if kind == TokenKind::SignIn && approval == Approval::Approve {
        sign_in::remove_spent_file(&app.store, &app.config.data_dir).await;
    }
    let (heading, text) = match approval {
        Approval::Approve => ("Logged in", "is logged in as"),
        Approval::Deny => ("Denied", "was not logged in as"),
    };
    let (client, name) = (escape(&login.client_name), escape(&user.name));
    let body = format!("<h1>{heading}</h1><p><b>{client}</b> {text} <b>{name}</b>. You can close this page.</p>");
    Ok(respond(StatusCode::OK, &body))
}

/// Who decides with a token, the token's number and what it is for; or why it decides nothing.
fn approver(token: Option<Token>) -> Result<(User, i64, TokenKind), &'static str> {
    match token {
        Some(Token { owner: TokenOwner::Suspended(_), .. }) => Err(SUSPENDED),
        Some(Token { owner: TokenOwner::User(user, _), kind, id, expires_at, .. }) => match kind {
            Some(kind @ (TokenKind::Login | TokenKind::SignIn)) => Ok((user, id, kind)),
            // Nobody gets more time out of a program's token than it has.
            _ if expires_at.is_some() => Err(ENDS),
            _ => Ok((user, id, TokenKind::Api)),
        },
        Some(Token { owner: TokenOwner::Agent(_), .. }) | None => Err(NOT_A_TOKEN),
    }
}

/// A wait, in whole seconds.
fn seconds(wait: Duration) -> String {
    format!("{} s", wait.as_secs() + 1)
}

fn new_user_code() -> String {
    // 256 is no multiple of 20; bytes from 240 on are drawn again, so that every letter is as likely.
    let mut letters = std::iter::repeat_with(|| random::<1>()[0])
        .filter(|byte| *byte < 240)
        .map(|byte| char::from(LETTERS[usize::from(byte % 20)]));
    let mut four = || -> String { letters.by_ref().take(4).collect() };
    format!("{}-{}", four(), four())
}

/// A code as people type it: small letters, spaces, without the dash.
fn normalise(typed: &str) -> String {
    let letters: String =
        typed.chars().filter(char::is_ascii_alphabetic).map(|letter| letter.to_ascii_uppercase()).take(8).collect();
    match letters.split_at_checked(4) {
        Some((first, second)) => format!("{first}-{second}"),
        None => letters,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

fn form(code: &str, complaint: &str) -> String {
    let complaint =
        if complaint.is_empty() { String::new() } else { format!("<p role=\"alert\">{}</p>", escape(complaint)) };
    format!(
        "<h1>Log in to Loom</h1>{complaint}\
         <p>Continue only if the code is the one that your own <code>loom login</code> shows. You will see who asks before you decide.</p>\
         <form method=\"post\" action=\"/login/device\">\
         <label>Code<input name=\"user_code\" value=\"{}\" required maxlength=\"16\" autocomplete=\"off\" autocapitalize=\"characters\" spellcheck=\"false\"></label>\
         <label>Your sign-in token<input name=\"token\" type=\"password\" required autocomplete=\"current-password\"></label>\
         <div><button>Continue</button></div></form>",
        escape(code)
    )
}

/// Who asks to be let in, and as whom.
fn question(login: &PendingLogin, user: &str, now: Timestamp, ticket: &str) -> String {
    let (client, address, user) = (escape(&login.client_name), escape(&login.client_address), escape(user));
    let minutes = now.duration_since(login.created_at).as_mins();
    let ago = if minutes == 0 { "less than a minute ago".to_owned() } else { format!("{minutes} min ago") };
    let when = login.created_at.strftime("%Y-%m-%d %H:%M UTC");
    format!(
        "<h1>Let this client in?</h1><dl><dt>Client</dt><dd>{client}</dd><dt>Address</dt><dd>{address}</dd>\
         <dt>Asked</dt><dd>{when}, {ago}</dd><dt>Will be logged in as</dt><dd>{user}</dd></dl>\
         <p>Approve only if you ran <code>loom login</code> there yourself just now. The name is what the client says \
         of itself.</p><form method=\"post\" action=\"/login/device\">\
         <input type=\"hidden\" name=\"ticket\" value=\"{ticket}\">\
         <div><button name=\"action\" value=\"approve\">Approve</button>\
         <button name=\"action\" value=\"deny\" class=\"quiet\">Deny</button></div></form>"
    )
}

const NOT_A_TOKEN: &str = "This is not a sign-in token of this server.";
const SUSPENDED: &str = "The user of this token is suspended. Ask whoever runs the server.";
const ENDS: &str = "This is a program's token, which ends before a login does. Use the token of a login.";
const NO_LOGIN: &str = "No login waits with this code. It may have expired: run loom login again.";

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;background:#f4f4f1;color:#1d1d1b;display:grid;place-items:center;min-height:100vh;margin:0}\
main{background:#fff;padding:2rem 2.5rem;border-radius:12px;max-width:26rem;box-shadow:0 1px 8px #0002}h1{font-size:1.4rem;margin-top:0}dt{font-size:.85rem;opacity:.7}dd{margin:0 0 .6rem;font-weight:600;overflow-wrap:anywhere}\
label{display:block;margin:1rem 0}input{display:block;width:100%;box-sizing:border-box;font:inherit;padding:.6rem;border:1px solid #888;border-radius:6px}\
button{font:inherit;padding:.6rem 1.4rem;border:0;border-radius:6px;background:#245c3d;color:#fff;margin-right:.5rem}button.quiet{background:#e4e4de;color:#1d1d1b}\
[role=alert]{background:#fbe9e7;padding:.6rem;border-radius:6px}@media(prefers-color-scheme:dark){body{background:#1d1d1b;color:#eee}main{background:#2a2a28}\
input{background:#1d1d1b;color:#eee}[role=alert]{background:#5a2a25}}";

fn respond(status: StatusCode, body: &str) -> Response {
    let html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Loom</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>"
    );
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
        ),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    (status, headers, Html(html)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_as_people_type_it() {
        let code = new_user_code();
        assert_eq!(code.len(), 9);
        assert_eq!(normalise(&code), code);
        assert_eq!(normalise(&code.to_lowercase().replace('-', " ")), code);
        assert_eq!(normalise("é<script>"), "SCRI-PT");
    }

    #[test]
    fn what_a_stranger_sends_stands_on_the_page_as_text() {
        assert!(!form("\"><script>", "").contains("<script>"));
        let now = Timestamp::now();
        let address = "192.0.2.7".to_owned();
        let login = PendingLogin { client_name: "<script>".into(), client_address: address, created_at: now };
        let page = question(&login, "ada", now, "ticket");
        assert!(!page.contains("<script>"), "{page}");
        assert!(["192.0.2.7", "ada", "less than a minute ago"].iter().all(|shown| page.contains(shown)), "{page}");
    }
}
