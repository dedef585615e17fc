//! `loom logs`: what the main program wrote to its terminal.

use clap_complete::ArgValueCandidates;
use futures_util::StreamExt as _;

use crate::{
    completion,
    context::Context,
    error::{Doing as _, Exit, Result},
    output,
};

/// Shows the main program's output, byte for byte.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom logs 0193f
  loom logs 0193f -f       goes on until the program ends")]
pub(crate) struct Args {
    /// The weaver: its id, the beginning of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// Go on with what comes
    #[arg(long, short = 'f')]
    follow: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let doing = format!("cannot show the output of {}", args.id);
    let query = if args.follow { "?follow=true" } else { "" };
    let path = format!("{}/logs{query}", super::weaver_path(&args.id)?);
    let mut chunks = Box::pin(context.client()?.bytes(&path).await.doing(&doing)?);
    while let Some(chunk) = chunks.next().await {
        output::bytes(&chunk.doing(&doing)?)?;
    }
    Ok(Exit::OK)
}
