//! `loom logs`: the output of the main program.

use std::time::Duration;

use clap_complete::ArgValueCandidates;
use futures_util::StreamExt as _;
use loom_api::{
    WeaverId,
    client::{Client, ClientError},
    weaver::Weaver,
};
use tokio::time::timeout;

use crate::{
    completion,
    context::Context,
    error::{Doing as _, Exit, Result},
    output,
};

/// In bytes, of an ended weaver; the server keeps less.
const MAX_FINAL_OUTPUT: usize = 256 << 10;
/// For fetching the output of an ended weaver.
const FINAL_OUTPUT_TIMEOUT: Duration = Duration::from_secs(2);
/// For asking the server why it cut the output off.
const CUT_REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// Shows the main program's output, byte for byte.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom logs 0193f
  loom logs 0193f -f       goes on until the program ends")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// Keep showing new output
    #[arg(long, short = 'f')]
    follow: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let doing = format!("cannot show the output of {}", args.id);
    let query = if args.follow { "?follow=true" } else { "" };
    let path = format!("{}/logs{query}", super::weaver_path(&args.id)?);
    let client = context.client()?;
    let mut chunks = Box::pin(client.bytes(&path).await.doing(&doing)?);
    while let Some(chunk) = chunks.next().await {
        match chunk {
            Ok(chunk) => output::bytes(&chunk)?,
            Err(cut) => {
                let error = why_cut(&client, &super::weaver_path(&args.id)?).await.unwrap_or(cut);
                return Err(error).doing(format_args!("the output of {} was cut off", args.id));
            }
        }
    }
    Ok(Exit::OK)
}

/// Why the server has cut the output off, if it was because the user may no longer see it.
async fn why_cut(client: &Client, weaver: &str) -> Option<ClientError> {
    let asked = timeout(CUT_REASON_TIMEOUT, client.get::<Weaver>(weaver)).await.ok()?;
    asked.err().filter(|error| error.code().is_some())
}

/// The last output of an ended weaver's program; empty if the server does not answer.
pub(super) async fn final_output(client: &Client, weaver: WeaverId) -> Vec<u8> {
    let collect = async {
        let mut output = Vec::new();
        let mut chunks = Box::pin(client.bytes(&format!("/api/weavers/{weaver}/logs")).await?);
        while let Some(chunk) = chunks.next().await {
            output.extend_from_slice(&chunk?);
            output.drain(..output.len().saturating_sub(MAX_FINAL_OUTPUT));
        }
        Ok::<_, ClientError>(output)
    };
    timeout(FINAL_OUTPUT_TIMEOUT, collect).await.ok().and_then(Result::ok).unwrap_or_default()
}
