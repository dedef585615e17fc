//! The main program: the clone before it, its start, and watching it until it ends.

use std::{sync::Arc, time::Duration};

use loom_api::{
    agent::{AgentMessage, MainState, StartSpec},
    weaver::EventKind,
};
use tokio::time::sleep;

use super::{
    Sidecar,
    clone::{Repository, directory_name},
    grants::until,
    identity::Backoff,
};
use crate::protocol::{HostError, StartRequest};

/// The workspace's path for the user's processes.
const WORKSPACE: &str = "/workspace";
/// How long before the deadline attached users are warned.
const WARNINGS: [Duration; 3] = [Duration::from_secs(15 * 60), Duration::from_secs(5 * 60), Duration::from_secs(60)];
/// The clock is checked at least this often, because it may be changed.
const MAX_SLEEP: Duration = Duration::from_secs(60);

/// Starts the main program, once the server has said what to run. Does nothing if an earlier sidecar has started it.
pub(crate) async fn start(sidecar: Arc<Sidecar>) {
    let mut wanted = sidecar.start.subscribe();
    let Some(spec) = wanted.wait_for(Option::is_some).await.ok().and_then(|spec| spec.clone()) else {
        return;
    };
    let mut pause = Backoff::default();
    while let Err(error) = try_to_start(&sidecar, &spec).await {
        match error {
            StartError::Final(reason) => {
                tracing::warn!("{reason}");
                sidecar.failed.send_replace(Some(reason));
                return;
            }
            StartError::Host(error) => tracing::warn!("the main program is not started yet: {error}"),
        }
        pause.wait().await;
    }
    // The secrets in the environment are no longer needed here.
    sidecar.start.send_modify(|spec| {
        if let Some(spec) = spec {
            spec.env.clear();
        }
    });
}

enum StartError {
    /// A retry would not help.
    Final(String),
    /// The host is not reachable at the moment.
    Host(HostError),
}

async fn try_to_start(sidecar: &Sidecar, spec: &StartSpec) -> Result<(), StartError> {
    let state = sidecar.host.state().await.map_err(StartError::Host)?;
    if state.main != MainState::Waiting {
        tracing::info!("the main program was started before");
        return Ok(());
    }
    let mut cwd = WORKSPACE.to_owned();
    if let Some(url) = &spec.repo {
        clone(sidecar, url, spec.branch.as_deref()).await.map_err(StartError::Final)?;
        if let Some(name) = directory_name(url) {
            cwd = format!("{WORKSPACE}/{name}");
        }
    }
    let request = StartRequest { command: spec.command.clone(), env: spec.env.clone(), cwd: Some(cwd) };
    match sidecar.host.start(request).await {
        Ok(()) => Ok(()),
        Err(HostError::Refused(failure)) => Err(StartError::Final(format!("the program cannot be started: {failure}"))),
        Err(error) => Err(StartError::Host(error)),
    }
}

async fn clone(sidecar: &Sidecar, url: &str, branch: Option<&str>) -> Result<(), String> {
    let repository = Repository {
        url: url.to_owned(),
        branch: branch.map(str::to_owned),
        workspace: sidecar.config.workspace_dir.clone(),
        file_repositories: sidecar.config.file_repositories.clone(),
    };
    let destination = repository.destination().map_err(|error| error.to_string())?;
    if tokio::fs::symlink_metadata(&destination).await.is_ok() {
        return Ok(());
    }
    let name = directory_name(url).unwrap_or_default();
    send_event(sidecar, EventKind::Cloning, format!("cloning {name}")).await;
    let begun = std::time::Instant::now();
    repository.run().await.map_err(|error| error.to_string())?;
    send_event(sidecar, EventKind::Cloned, format!("{name} was cloned in {:.1} s", begun.elapsed().as_secs_f32()))
        .await;
    Ok(())
}

async fn send_event(sidecar: &Sidecar, kind: EventKind, message: String) {
    // The queue lives as long as the sidecar.
    let _ = sidecar.outbox.send(AgentMessage::Event { kind, message }).await;
}

/// Follows the host's state. Returns when the main program has ended and the server knows it, which lets the host exit.
pub(crate) async fn watch(sidecar: Arc<Sidecar>) {
    let mut pause = Backoff::default();
    loop {
        match follow(&sidecar, &mut pause).await {
            Ok(true) => return,
            Ok(false) => tracing::info!("the process host is gone"),
            Err(error) => tracing::info!("cannot watch the process host: {error}"),
        }
        pause.wait().await;
    }
}

/// Follows one connection to the host; returns whether the main program has ended.
async fn follow(sidecar: &Sidecar, pause: &mut Backoff) -> Result<bool, HostError> {
    let mut states = sidecar.host.watch().await?;
    *pause = Backoff::default();
    while let Some(state) = states.next().await? {
        let exited = matches!(state.main, MainState::Exited { .. });
        sidecar.state.send_if_modified(|known| {
            let changed = *known != state;
            *known = state;
            changed
        });
        if exited {
            // The host stays as long as this connection is open, up to a limit.
            sidecar.reported.cancelled().await;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Warns attached users before the deadline.
pub(crate) async fn announce_deadline(sidecar: Arc<Sidecar>) {
    let mut deadline = sidecar.deadline.subscribe();
    // The time before the deadline of the last warning.
    let mut warned: Option<Duration> = None;
    loop {
        let Some(end) = *deadline.borrow_and_update() else {
            if deadline.changed().await.is_err() {
                return;
            }
            continue;
        };
        let left = until(end);
        // The deadline was moved, so warn again.
        if warned.is_some_and(|warned| left > warned + Duration::from_secs(1)) {
            warned = None;
        }
        let due = WARNINGS.into_iter().rfind(|warning| left <= *warning);
        if let Some(warning) = due
            && warned.is_none_or(|warned| warning < warned)
            && !left.is_zero()
        {
            warned = Some(warning);
            let seconds = left.as_secs_f64().round() as u64;
            if let Err(error) = sidecar.host.expiring(seconds).await {
                tracing::info!("cannot warn attached users of the deadline: {error}");
            }
        }
        let next = WARNINGS.into_iter().find(|warning| *warning < left);
        let pause = next.map_or(MAX_SLEEP, |next| (left - next).min(MAX_SLEEP));
        tokio::select! {
            () = sleep(pause) => {}
            changed = deadline.changed() => if changed.is_err() { return },
        }
    }
}
