//! `loom whoami`.

use loom_api::login::Me;
use serde_json::Value;

use crate::{
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    output,
};

/// Shows who is logged in, and where.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let me: Value = context.client()?.get("/api/me").await.doing("cannot ask the server who you are")?;
    if args.json {
        output::json(&me)?;
        return Ok(Exit::OK);
    }
    let me: Me = serde_json::from_value(me)
        .map_err(|error| CliError::failure(format!("cannot read the server's answer: {error}")))?;
    output::line(&describe(&me, &context.server_url()?))?;
    Ok(Exit::OK)
}

fn describe(me: &Me, server: &str) -> String {
    let mut text = format!("{} ({}) at {server}", me.user.name, me.user.id);
    for organisation in &me.organisations {
        let personal = if organisation.personal { ", personal" } else { "" };
        text.push_str(&format!("\norganisation {} ({}{personal})", organisation.name, organisation.id));
    }
    output::printable(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use loom_api::{OrgId, UserId, login};

    use super::*;

    #[test]
    fn the_user_the_server_and_the_organisations_are_named() {
        let me = Me {
            user: login::User { id: UserId::from(uuid::Uuid::nil()), name: "ada".into() },
            organisations: vec![login::Organisation {
                id: OrgId::from(uuid::Uuid::nil()),
                name: "ada".into(),
                personal: true,
            }],
        };
        assert_eq!(
            describe(&me, "https://loom.example"),
            "ada (U-00000000-0000-0000-0000-000000000000) at https://loom.example\n\
             organisation ada (O-00000000-0000-0000-0000-000000000000, personal)"
        );
    }
}
