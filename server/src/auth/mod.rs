//! Who is asking: a bearer token names a user with its organisations, or one weaver's agent. [`device`] is how people
//! log in.

pub mod device;

use axum::{
    extract::FromRequestParts,
    http::{header, request::Parts},
};
use loom_api::{
    ErrorCode, OrgId, WeaverId,
    login::{Organisation, User},
};

use crate::{
    app::AppState,
    problem::{Answer, Problem},
    store::{Token, TokenOwner},
};

/// The caller is a user.
#[derive(Debug)]
pub struct UserCaller {
    /// Who.
    pub user: User,
    /// Its organisations, the personal one first.
    pub organisations: Vec<Organisation>,
    /// The number of the token it came with.
    pub token: i64,
}

/// The caller is the agent of a weaver.
#[derive(Debug)]
pub struct AgentCaller(pub WeaverId);

/// The caller is either: the relay serves both.
#[derive(Debug)]
pub enum Caller {
    /// A user.
    User(UserCaller),
    /// An agent.
    Agent(AgentCaller),
}

impl UserCaller {
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
    app.store.token(token.trim()).await?.ok_or_else(|| unauthorized("the token is unknown, expired or revoked"))
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        let token = authenticate(parts, app).await?;
        Ok(match token.owner {
            TokenOwner::User(user, organisations) => Self::User(UserCaller { user, organisations, token: token.id }),
            TokenOwner::Agent(weaver) => Self::Agent(AgentCaller(weaver)),
        })
    }
}

impl FromRequestParts<AppState> for UserCaller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &AppState) -> Answer<Self> {
        match Caller::from_request_parts(parts, app).await? {
            Caller::User(user) => Ok(user),
            Caller::Agent(_) => Err(Problem::new(ErrorCode::Forbidden, "this is for users, not for agents")),
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
