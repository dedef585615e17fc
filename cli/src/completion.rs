//! Shell completion of weaver ids and names, from the server if it answers fast enough.

use std::time::Duration;

use clap_complete::CompletionCandidate;
use loom_api::weaver::Weaver;

use crate::{cli::GlobalArgs, context::Context};

/// The longest that Tab may block the shell.
const TIMEOUT: Duration = Duration::from_millis(1500);

/// Names and ids of the live weavers; none on any error, as there is no way to report it.
pub(crate) fn weavers() -> Vec<CompletionCandidate> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let listed = runtime.block_on(async {
        let client = Context::load(&GlobalArgs::default()).ok()?.client().ok()?;
        tokio::time::timeout(TIMEOUT, client.get::<Vec<Weaver>>("/api/weavers")).await.ok()?.ok()
    });
    // A DNS lookup that is still running must not block the shell.
    runtime.shutdown_background();
    listed.unwrap_or_default().into_iter().flat_map(candidates).collect()
}

fn candidates(weaver: Weaver) -> Vec<CompletionCandidate> {
    let help = crate::output::printable(&format!("{} {}", weaver.status, weaver.image)).into_owned();
    let candidate = |value: String| CompletionCandidate::new(value).help(Some(help.clone().into()));
    weaver.name.into_iter().chain([weaver.id.to_string()]).map(candidate).collect()
}
