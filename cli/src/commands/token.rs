//! `loom token`: tokens for programs, such as CI.

use jiff::Timestamp;
use loom_api::{
    ErrorCode,
    login::{CreateToken, NewToken, TokenInfo},
};
use serde_json::Value;

use crate::{
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    lifetime, output,
};

/// Manages your tokens: those of your logins, and those you create for programs.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom token create ci --ttl 720 > token     for a month; the token is printed this once
  loom token list                            what there is, and when it was last used
  loom token revoke 7                        ends one at once

A program sets LOOM_SERVER_URL, and LOOM_TOKEN to the token.")]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Create a token and print it
    Create {
        /// The token's name in lists
        name: String,
        /// Hours until it expires; by default never
        #[arg(long, value_name = "HOURS", value_parser = lifetime::parse, allow_hyphen_values = true)]
        ttl: Option<f64>,
    },
    /// List your tokens
    #[command(visible_alias = "ls")]
    List {
        /// Print the API's objects as JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a token at once
    #[command(visible_alias = "rm")]
    Revoke {
        /// The token's id, from `loom token list`
        id: i64,
    },
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    match &args.action {
        Action::Create { name, ttl } => create(context, name, *ttl).await?,
        Action::List { json } => list(context, *json).await?,
        Action::Revoke { id } => revoke(context, *id).await?,
    }
    Ok(Exit::OK)
}

async fn create(context: &Context, name: &str, ttl_hours: Option<f64>) -> Result<()> {
    let request = CreateToken { name: name.to_owned(), ttl_hours, login: false };
    let new: NewToken = context.client()?.post("/api/tokens", &request).await.doing("cannot create a token")?;
    output::line(new.token.expose())?;
    let end = match new.expires_at {
        Some(at) => format!("ends {at:.0}"),
        None => "does not expire".to_owned(),
    };
    output::note(&format!("The token {} {end}. Copy it now: it is not shown again.", new.name));
    Ok(())
}

async fn list(context: &Context, json: bool) -> Result<()> {
    let listed: Value = context.client()?.get("/api/tokens").await.doing("cannot list tokens")?;
    if json {
        return output::json(&listed);
    }
    let tokens: Vec<TokenInfo> = serde_json::from_value(listed)
        .map_err(|error| CliError::failure(format!("cannot read the list of tokens: {error}")))?;
    output::bytes(table(&tokens).as_bytes())
}

async fn revoke(context: &Context, id: i64) -> Result<()> {
    context.client()?.delete(&format!("/api/tokens/{id}")).await.map_err(|error| {
        let unknown = error.code() == Some(ErrorCode::NotFound);
        let error = CliError::from(error).doing(format_args!("cannot revoke token {id}"));
        if unknown { error.hint("list your tokens with: loom token list") } else { error }
    })?;
    output::note(&format!("Revoked token {id}."));
    Ok(())
}

fn table(tokens: &[TokenInfo]) -> String {
    let time = |time: Option<Timestamp>, none: &str| time.map_or_else(|| none.to_owned(), |time| format!("{time:.0}"));
    let rows: Vec<Vec<String>> = tokens
        .iter()
        .map(|token| {
            vec![
                token.id.to_string(),
                token.name.clone(),
                time(Some(token.created_at), "-"),
                time(token.last_used_at, "never"),
                time(token.expires_at, "never"),
            ]
        })
        .collect();
    output::table(&["ID", "NAME", "CREATED", "LAST USED", "ENDS"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_when_each_token_was_used_and_ends() {
        let tokens: Vec<TokenInfo> = serde_json::from_value(serde_json::json!([
            {"id": 7, "name": "ci", "kind": "api", "created_at": "2026-01-01T00:00:00Z",
             "last_used_at": "2026-01-02T00:00:00Z", "expires_at": "2026-01-31T00:00:00Z"},
            {"id": 3, "name": "me@laptop", "kind": "login", "created_at": "2026-01-01T00:00:00Z"},
        ]))
        .expect("tokens");
        assert_eq!(
            table(&tokens),
            "ID  NAME       CREATED               LAST USED             ENDS\n\
             7   ci         2026-01-01T00:00:00Z  2026-01-02T00:00:00Z  2026-01-31T00:00:00Z\n\
             3   me@laptop  2026-01-01T00:00:00Z  never                 never\n"
        );
    }
}
