//! `loom delete`.

use std::io::{BufRead as _, Write as _};

use clap_complete::ArgValueCandidates;
use loom_api::{client::Client, weaver::Weaver};

use crate::{
    completion,
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    output, terminal,
};

/// Deletes weavers at once, with their data.
///
/// Work that was not pushed or copied is lost. Asks for confirmation on a terminal.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom delete 0193f
  loom delete 0193f 0193e --yes")]
pub(crate) struct Args {
    /// The weavers: ids, prefixes of them, or names
    #[arg(value_name = "ID", required = true, add = ArgValueCandidates::new(completion::weavers))]
    ids: Vec<String>,
    /// Do not ask for confirmation
    #[arg(long, short = 'y')]
    yes: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let asks = !args.yes && terminal::can_prompt();
    let mut exit = Exit::OK;
    for id in &args.ids {
        match delete(&client, id, asks).await {
            Ok(true) => output::note(&format!("Deleted {id}.")),
            Ok(false) => output::note(&format!("Kept {id}.")),
            Err(error) if args.ids.len() == 1 => return Err(error),
            Err(error) => {
                // The others are deleted anyway; the exit code is that of the first failure.
                output::error(&error);
                if exit == Exit::OK {
                    exit = error.exit();
                }
            }
        }
    }
    Ok(exit)
}

/// Returns whether it was deleted.
async fn delete(client: &Client, id: &str, asks: bool) -> Result<bool> {
    let doing = format!("cannot delete {id}");
    let mut path = super::weaver_path(id)?;
    if asks {
        let weaver: Weaver = client.get(&path).await.doing(&doing)?;
        if !confirmed(&weaver)? {
            return Ok(false);
        }
        // The weaver that was confirmed, not another that the name may refer to by now.
        path = format!("/api/weavers/{}", weaver.id);
    }
    client.delete(&path).await.doing(&doing)?;
    Ok(true)
}

fn confirmed(weaver: &Weaver) -> Result<bool> {
    let name = weaver.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let question = format!("Delete {}{name}, {}, and all its data? [y/N] ", weaver.id, weaver.image);
    let mut out = std::io::stderr().lock();
    let asked = out.write_all(output::printable(&question).as_bytes()).and_then(|()| out.flush());
    asked.map_err(|error| CliError::failure(format!("cannot ask: {error}")))?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| CliError::failure(format!("cannot read the answer: {error}")))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}
