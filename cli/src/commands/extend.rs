//! `loom extend`.

use clap_complete::ArgValueCandidates;
use loom_api::weaver::{ExtendWeaver, Weaver};
use serde_json::Value;

use crate::{
    completion,
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    lifetime, output,
};

/// Extends a weaver's lifetime, up to the server's limit (48 hours from creation).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom extend 0193f 2          two hours more
  loom extend 0193f 30m        half an hour more")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// How much longer: hours (2, 1.5) or with units (30m, 1h30m)
    #[arg(value_name = "HOURS", value_parser = lifetime::parse, allow_hyphen_values = true)]
    hours: f64,
    /// Print the weaver as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let path = format!("{}/extend", super::weaver_path(&args.id)?);
    let extended: Value = context
        .client()?
        .post(&path, &ExtendWeaver { hours: args.hours })
        .await
        .doing(format_args!("cannot extend {}", args.id))?;
    if args.json {
        output::json(&extended)?;
        return Ok(Exit::OK);
    }
    let weaver: Weaver = serde_json::from_value(extended)
        .map_err(|error| CliError::failure(format!("cannot read the server's answer: {error}")))?;
    let end = weaver.expires_at.round(jiff::Unit::Second).unwrap_or(weaver.expires_at);
    output::note(&format!("{} ends at {end}, in {}.", weaver.id, output::hours(weaver.remaining_hours)));
    Ok(Exit::OK)
}
