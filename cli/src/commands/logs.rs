//! `loom logs`: what the main program wrote to its terminal.

use std::time::Duration;

use clap_complete::ArgValueCandidates;
use futures_util::StreamExt as _;
use loom_api::{
    WeaverId,
    client::{Client, ClientError},
};
use tokio::time::timeout;

use crate::{
    completion,
    context::Context,
    error::{Doing as _, Exit, Result},
    output,
};

/// How much is kept of an ended weaver's output, in bytes.
const MOST_OF_ENDED: usize = 256 << 10;
/// How long the server may take to tell it.
const PATIENCE: Duration = Duration::from_secs(2);

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

/// The end of what an ended weaver's program wrote; nothing when the server does not say.
pub(super) async fn of_ended(client: &Client, weaver: WeaverId) -> Vec<u8> {
    let collect = async {
        let mut output = Vec::new();
        let mut chunks = Box::pin(client.bytes(&format!("/api/weavers/{weaver}/logs")).await?);
        while let Some(chunk) = chunks.next().await {
            output.extend_from_slice(&chunk?);
            output.drain(..output.len().saturating_sub(MOST_OF_ENDED));
        }
        Ok::<_, ClientError>(output)
    };
    timeout(PATIENCE, collect).await.ok().and_then(Result::ok).unwrap_or_default()
}
