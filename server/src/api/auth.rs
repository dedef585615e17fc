//! Who is asking: a bearer token names a user with its organisations, or one weaver's agent. [`super::device`] is
//! how people log in.

use axum::{
    extract::FromRequestParts,
    http::{header, request::Parts},
};
use jiff::Timestamp;
use loom_api::{
    ErrorCode, OrgId, UserId, WeaverId,
    login::{Organisation, TokenKind, User},
};

use crate::{
    problem::{Answer, Problem},
    sessions::Principal,
    state::AppState,
    store::{Token, TokenOwner},
};

#[derive(Debug)]
pub struct UserCaller {
    pub user: User,
    /// Its organisations, the personal one first.
    pub organisations: Vec<Organisation>,
    /// The token it came with.
    pub token: UserToken,
}

/// What a handler may need to know of the token that a user came with.
#[derive(Debug, Clone, Copy)]
pub struct UserToken {
    pub id: i64,
    pub kind: TokenKind,
    pub expires_at: Option<Timestamp>,
    /// The identity revision at which it was good.
    pub revision: i64,
}

/// The caller is a user, who may have come with a token that does nothing but sign in.
#[derive(Debug)]
pub struct SignInCaller(pub UserCaller);

/// A user's token that is to end, by its number. The user may be suspended, and the token one that does nothing but sign
/// in: it must not come back to life.
#[derive(Debug)]
pub struct EndingToken(pub UserId, pub i64);

#[derive(Debug)]
pub struct AgentCaller {
    /// The weaver.
    pub weaver: WeaverId,
    /// Whose a connection is that the agent opens.
    pub principal: Principal,
}

/// The caller is either: the relay serves both.
#[derive(Debug)]
pub enum Caller {
    User(UserCaller),
    Agent(AgentCaller),
}

impl UserCaller {
    /// Whose a connection is that the caller opens; it ends when the caller leaves `org`.
    pub const fn principal(&self, org: Option<OrgId>) -> Principal {
        Principal { user: Some(self.user.id), token: self.token.id, org, revision: self.token.revision }
    }

    /// Whether the caller belongs to an organisation.
    #[must_use]
    pub fn is_in(&self, org: OrgId) -> bool {
        self.organisations.iter().any(|organisation| organisation.id == org)
    }
}

fn unauthorized(message: &str) -> Problem {
    Problem::new(ErrorCode::Unauthorized, message).hint("log in: loom login")
}

async fn authenticate(parts: &Parts, app: &AppState) -> Answer<Token> {
    let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = header
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .ok_or_else(|| unauthorized("this needs a bearer token"))?
        .1;
    let token =
        app.store.token(token.trim()).await?.ok_or_else(|| unauthorized("the token is unknown, expired or revoked"))?;
    if let Err(error) = app.store.note_use(&token, app.config.login_life).await {
        tracing::warn!("the use of a token could not be noted: {error}");
    }
    Ok(token)
}

fn user_caller(token: Token) -> Answer<Caller> {
    let user_token = |kind: Option<TokenKind>| UserToken {
        id: token.id,
        kind: kind.unwrap_or(TokenKind::Unknown),
        expires_at: token.expires_at,
        revision: token.revision,
    };
    match token.owner {
        TokenOwner::User(user, organisations) => {
            Ok(Caller::User(UserCaller { user, organisations, token: user_token(token.kind) }))
        }
        TokenOwner::Suspended(user) => {
            Err(Problem::new(ErrorCode::Unauthorized, format!("the user {} is suspended", user.name))
                .hint("ask whoever runs the server"))
        }
        TokenOwner::Agent(weaver) => {
            let principal = Principal { user: None, token: token.id, org: None, revision: token.revision };
            Ok(Caller::Agent(AgentCaller { weaver, principal }))
        }
    }
}

fn not_for_agents() -> Problem {
    Problem::new(ErrorCode::Forbidden, "this is for users, not for agents")
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        match user_caller(authenticate(parts, app).await?)? {
            Self::User(user) if user.token.kind == TokenKind::SignIn => {
                Err(Problem::new(ErrorCode::Forbidden, "this token does nothing but sign in, once")
                    .hint("sign in with: loom login --token -"))
            }
            caller => Ok(caller),
        }
    }
}

impl FromRequestParts<AppState> for SignInCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        match user_caller(authenticate(parts, app).await?)? {
            Caller::User(user) => Ok(Self(user)),
            Caller::Agent(_) => Err(not_for_agents()),
        }
    }
}

impl FromRequestParts<AppState> for EndingToken {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        let token = authenticate(parts, app).await?;
        match token.owner {
            TokenOwner::User(user, _) | TokenOwner::Suspended(user) => Ok(Self(user.id, token.id)),
            TokenOwner::Agent(_) => Err(not_for_agents()),
        }
    }
}

impl FromRequestParts<AppState> for UserCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        match Caller::from_request_parts(parts, app).await? {
            Caller::User(user) => Ok(user),
            Caller::Agent(_) => Err(not_for_agents()),
        }
    }
}

impl FromRequestParts<AppState> for AgentCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        match Caller::from_request_parts(parts, app).await? {
            Caller::Agent(agent) => Ok(agent),
            Caller::User(_) => Err(Problem::new(ErrorCode::Forbidden, "this is for agents, not for users")),
        }
    }
}
