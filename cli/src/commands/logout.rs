//! `loom logout`: revokes the token at the server and removes it here.

use loom_api::ErrorCode;

use crate::{
    context::Context,
    error::{CliError, Exit, Result},
    output,
};

/// Revokes this machine's token and removes it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) async fn run(context: &Context, _: &Args) -> Result<Exit> {
    let url = context.server_url()?;
    let mut credentials = context.credentials()?;
    if context.token_is_from_environment() {
        output::warning("LOOM_TOKEN is set and stays valid; unset it to be logged out");
    }
    let Some(token) = credentials.token(&url) else {
        output::note(&format!("Not logged in to {url}."));
        return Ok(Exit::OK);
    };
    let revoked = match context.anonymous_client() {
        Ok(client) => client.with_token(token).delete("/api/login").await.map_err(CliError::from),
        Err(error) => Err(error),
    };
    // Removed whatever the server answers: after a logout no token may remain here.
    credentials.forget(&url);
    credentials.write(context.directory()?)?;
    match revoked {
        Ok(()) => {}
        Err(error) if error.exit() == Exit::of(ErrorCode::Unauthorized) => {} // revoked or expired already
        Err(error) => {
            return Err(error
                .doing("the token was removed here, but cannot be revoked")
                .hint("it stays valid at the server until it is deleted there"));
        }
    }
    output::note(&format!("Logged out of {url}."));
    Ok(Exit::OK)
}
