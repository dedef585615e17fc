//! Completion of weaver ids: what the server knows, if it says so fast enough.

use std::time::Duration;

use clap_complete::CompletionCandidate;
use loom_api::weaver::Weaver;

use crate::{cli::GlobalArgs, context::Context};

/// How long a person who has pressed Tab waits at most.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Names and ids of the live weavers; none when anything is in the way, because there is nobody to tell.
pub(crate) fn weavers() -> Vec<CompletionCandidate> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    let listed = runtime.block_on(async {
        let client = Context::load(&GlobalArgs::default()).ok()?.client().ok()?;
        tokio::time::timeout(PATIENCE, client.get::<Vec<Weaver>>("/api/weavers")).await.ok()?.ok()
    });
    // A name that is still being looked up must not keep the shell waiting.
    runtime.shutdown_background();
    listed.unwrap_or_default().into_iter().flat_map(candidates).collect()
}

fn candidates(weaver: Weaver) -> Vec<CompletionCandidate> {
    let help = crate::output::printable(&format!("{} {}", weaver.status, weaver.image)).into_owned();
    let candidate = |value: String| CompletionCandidate::new(value).help(Some(help.clone().into()));
    weaver.name.into_iter().chain([weaver.id.to_string()]).map(candidate).collect()
}
