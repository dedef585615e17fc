//! The device authorization grant (RFC 8628), and the page on which a person approves it.
//!
//! The page asks for a sign-in token with every decision, so there is no session that another site could ride on. The
//! codes are kept as hashes.

use axum::{
    Form,
    extract::{Query, State, rejection::FormRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    ErrorCode, Secret,
    login::{DeviceLogin, NewToken, PollDeviceLogin, StartDeviceLogin, TokenKind},
};
use serde::Deserialize;

use super::Body;
use crate::{
    problem::{Answer, Problem},
    secrets::random,
    sign_in,
    state::AppState,
    store::{Approval, DevicePoll, Token, TokenOwner},
};

/// How long a login may wait for its approval.
const LIFETIME: SignedDuration = SignedDuration::from_mins(10);
/// Between two polls.
const INTERVAL: SignedDuration = SignedDuration::from_secs(1);
/// Letters of user codes: no vowels, so no words; nothing that looks like a digit (RFC 8628 §6.1).
const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
/// The longest name of a client that is kept.
const LONGEST_NAME: usize = 100;

/// Begins a login.
#[utoipa::path(post, path = "/api/login/device", tag = "login", request_body = StartDeviceLogin,
    responses((status = 200, body = DeviceLogin)))]
pub async fn start(
    State(app): State<AppState>,
    Body(request): Body<StartDeviceLogin>,
) -> Answer<axum::Json<DeviceLogin>> {
    let device_code = URL_SAFE_NO_PAD.encode(random::<32>());
    let user_code = new_user_code();
    let name: String = request.client_name.chars().filter(|letter| !letter.is_control()).take(LONGEST_NAME).collect();
    app.store.add_device_login(&device_code, &user_code, &name, Timestamp::now() + LIFETIME).await?;
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
    match app.store.poll_device_login(request.device_code.expose(), INTERVAL).await? {
        DevicePoll::Pending => problem(ErrorCode::AuthorizationPending, "the login is not approved yet"),
        DevicePoll::TooSoon => problem(ErrorCode::SlowDown, "polling too often"),
        DevicePoll::Expired => {
            Err(Problem::new(ErrorCode::ExpiredToken, "the code has expired").hint("begin again: loom login"))
        }
        DevicePoll::Denied => problem(ErrorCode::AccessDenied, "the login was denied"),
        DevicePoll::Approved(user) => {
            let name = "loom login".to_owned();
            let expires_at = Some(Timestamp::now() + app.config.login_life);
            let token = app.store.add_user_token(user, &name, TokenKind::Login, expires_at).await?;
            Ok(axum::Json(NewToken { token, name, expires_at }))
        }
    }
}

/// What the page is opened with.
#[derive(Deserialize)]
pub struct PageQuery {
    /// The code, filled in.
    #[serde(default)]
    user_code: String,
}

/// What the page sends.
#[derive(Deserialize)]
pub struct Decision {
    user_code: String,
    token: Secret,
    action: String,
}

/// The approval page.
#[utoipa::path(get, path = "/login/device", tag = "login", responses((status = 200, content_type = "text/html", body = String)))]
pub async fn page(Query(query): Query<PageQuery>) -> Response {
    respond(StatusCode::OK, &form(&query.user_code, ""))
}

/// The user's decision, from the page.
#[utoipa::path(post, path = "/login/device", tag = "login", responses((status = 200, content_type = "text/html", body = String)))]
pub async fn decide(State(app): State<AppState>, decision: Result<Form<Decision>, FormRejection>) -> Answer<Response> {
    let Ok(Form(decision)) = decision else {
        return Ok(respond(StatusCode::BAD_REQUEST, &form("", "The form was not complete.")));
    };
    let code = normalise(&decision.user_code);
    let again = |status, why| Ok(respond(status, &form(&code, why)));
    let signed_in = app.store.token(decision.token.expose().trim()).await?;
    let Some(Token { id, kind, owner: TokenOwner::User(user, _), .. }) = signed_in else {
        return again(StatusCode::FORBIDDEN, "This is not a sign-in token of this server.");
    };
    let Some(client) = app.store.pending_device_login(&code).await? else {
        return again(
            StatusCode::NOT_FOUND,
            "No login waits with this code. It may have expired: run loom login again.",
        );
    };
    let approval = if decision.action == "approve" { Approval::Approve } else { Approval::Deny };
    if !app.store.decide_device_login(&code, user.id, approval).await? {
        return again(StatusCode::CONFLICT, "This login was decided meanwhile.");
    }
    if kind == Some(TokenKind::SignIn) && approval == Approval::Approve {
        app.store.remove_token(user.id, id).await?;
        sign_in::remove_spent_file(&app.store, &app.config.data_dir).await;
    }
    let (heading, text) = match approval {
        Approval::Approve => ("Logged in", "is logged in as"),
        Approval::Deny => ("Denied", "was not logged in as"),
    };
    let (client, name) = (escape(&client), escape(&user.name));
    let body = format!("<h1>{heading}</h1><p><b>{client}</b> {text} <b>{name}</b>. You can close this page.</p>");
    Ok(respond(StatusCode::OK, &body))
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
         <p>Approve only if the code is the one that your own <code>loom login</code> shows.</p>\
         <form method=\"post\" action=\"/login/device\">\
         <label>Code<input name=\"user_code\" value=\"{}\" required maxlength=\"16\" autocomplete=\"off\" autocapitalize=\"characters\" spellcheck=\"false\"></label>\
         <label>Your sign-in token<input name=\"token\" type=\"password\" required autocomplete=\"current-password\"></label>\
         <div><button name=\"action\" value=\"approve\">Approve</button>\
         <button name=\"action\" value=\"deny\" class=\"quiet\">Deny</button></div></form>",
        escape(code)
    )
}

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;background:#f4f4f1;color:#1d1d1b;display:grid;place-items:center;min-height:100vh;margin:0}\
main{background:#fff;padding:2rem 2.5rem;border-radius:12px;max-width:26rem;box-shadow:0 1px 8px #0002}h1{font-size:1.4rem;margin-top:0}\
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
    }
}
