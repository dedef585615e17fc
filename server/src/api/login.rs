//! The caller's identity and tokens.

use axum::{Json, extract::State, http::StatusCode};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    ErrorCode,
    login::{CreateToken, Me, NewToken, TokenInfo, TokenKind},
};

use super::{
    auth::{EndingToken, SignInCaller, UserCaller},
    body::Body,
    extract::Path,
};
use crate::{
    problem::{Answer, Problem},
    sign_in,
    state::AppState,
};

/// The longest name of a token.
const MAX_NAME: usize = 100;
/// The longest life of a token with an end, in hours: ten years.
const MAX_LIFE: f64 = 87_600.0;

/// Who the caller is.
#[utoipa::path(get, path = "/api/me", tag = "login", responses((status = 200, body = Me)), security(("bearer" = [])))]
pub async fn me(caller: UserCaller) -> Json<Me> {
    Json(Me { user: caller.user, organisations: caller.organisations })
}

/// Revokes the token that the request came with.
#[utoipa::path(delete, path = "/api/login", tag = "login", responses((status = 204)), security(("bearer" = [])))]
pub async fn log_out(State(app): State<AppState>, EndingToken(user, token): EndingToken) -> Answer<StatusCode> {
    app.store.remove_token(user, token).await?;
    sign_in::remove_spent_file(&app.store, &app.config.data_dir).await;
    Ok(StatusCode::NO_CONTENT)
}

/// The caller's tokens.
#[utoipa::path(get, path = "/api/tokens", tag = "login", responses((status = 200, body = Vec<TokenInfo>)), security(("bearer" = [])))]
pub async fn list_tokens(State(app): State<AppState>, caller: UserCaller) -> Answer<Json<Vec<TokenInfo>>> {
    Ok(Json(app.store.tokens(caller.user.id).await?))
}

/// Makes a token: for a program, such as CI, or in exchange for one that only signs in.
#[utoipa::path(post, path = "/api/tokens", tag = "login", request_body = CreateToken,
    responses((status = 201, body = NewToken), (status = "4XX", body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn create_token(
    State(app): State<AppState>,
    SignInCaller(caller): SignInCaller,
    Body(request): Body<CreateToken>,
) -> Answer<(StatusCode, Json<NewToken>)> {
    let invalid = |message: String| Problem::new(ErrorCode::InvalidRequest, message);
    let name = request.name;
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(invalid(format!("a token's name has 1 to {MAX_NAME} bytes")));
    }
    let requested = match request.ttl_hours {
        None => None,
        Some(hours) if hours.is_finite() && hours > 0.0 && hours <= MAX_LIFE => {
            Some(Timestamp::now() + SignedDuration::from_secs_f64(hours * 3600.0))
        }
        Some(hours) => return Err(invalid(format!("a token cannot live {hours} hours"))),
    };
    let login_end = Timestamp::now() + app.config.login_life;
    let user = caller.user.id;
    let (token, expires_at) = match caller.token.kind {
        TokenKind::SignIn => {
            let token = app.store.exchange_sign_in(user, caller.token.id, &name, login_end).await?;
            sign_in::remove_spent_file(&app.store, &app.config.data_dir).await;
            (token, Some(login_end))
        }
        kind => {
            // Nobody gets more time out of a program's token than it has.
            let limit = caller.token.expires_at.filter(|_| kind != TokenKind::Login);
            let (kind, expires_at) = match (request.login, limit) {
                (true, None) => (TokenKind::Login, Some(login_end)),
                _ => (TokenKind::Api, requested.into_iter().chain(limit).min()),
            };
            (app.store.add_user_token(user, &name, kind, expires_at).await?, expires_at)
        }
    };
    Ok((StatusCode::CREATED, Json(NewToken { token, name, expires_at })))
}

/// Ends one of the caller's tokens.
#[utoipa::path(delete, path = "/api/tokens/{id}", tag = "login", params(("id" = i64, Path)),
    responses((status = 204), (status = 404, body = loom_api::ErrorBody)), security(("bearer" = [])))]
pub async fn delete_token(
    State(app): State<AppState>,
    caller: UserCaller,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    let unknown = || Problem::new(ErrorCode::NotFound, "you have no such token");
    let id = id.parse().map_err(|_| unknown())?;
    if app.store.remove_token(caller.user.id, id).await? { Ok(StatusCode::NO_CONTENT) } else { Err(unknown()) }
}
