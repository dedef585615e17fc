//! From the server's word to the main program: the clone, the start, and watching it to its end.

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
    identity::BackOff,
};
use crate::protocol::{HostError, StartRequest};

/// The workspace as the user's processes see it.
const WORKSPACE: &str = "/workspace";
/// Before the deadline, when people are told of it.
const WARNINGS: [Duration; 3] = [Duration::from_secs(15 * 60), Duration::from_secs(5 * 60), Duration::from_secs(60)];
/// The longest sleep without a look at the clock, which may be set anew meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Brings the main program up, once the server has said what it is. Does nothing when a predecessor of this process did
/// it.
pub(crate) async fn start(sidecar: Arc<Sidecar>) {
    let mut wanted = sidecar.start.subscribe();
    let Some(spec) = wanted.wait_for(Option::is_some).await.ok().and_then(|spec| spec.clone()) else {
        return;
    };
    let mut pause = BackOff::default();
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
    // What runs needs its environment no longer from here.
    sidecar.start.send_modify(|spec| {
        if let Some(spec) = spec {
            spec.env.clear();
        }
    });
}

enum StartError {
    /// Trying again would not help.
    Final(String),
    /// The host cannot be reached now.
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
    tell(sidecar, EventKind::Cloning, format!("cloning {name}")).await;
    let begun = std::time::Instant::now();
    repository.run().await.map_err(|error| error.to_string())?;
    tell(sidecar, EventKind::Cloned, format!("{name} was cloned in {:.1} s", begun.elapsed().as_secs_f32())).await;
    Ok(())
}

async fn tell(sidecar: &Sidecar, kind: EventKind, message: String) {
    // The queue ends with the sidecar only.
    let _ = sidecar.outbox.send(AgentMessage::Event { kind, message }).await;
}

/// Follows the host's state. Ends when the main program has ended and the server knows it, which lets the host end.
pub(crate) async fn watch(sidecar: Arc<Sidecar>) {
    let mut pause = BackOff::default();
    loop {
        match follow(&sidecar, &mut pause).await {
            Ok(true) => return,
            Ok(false) => tracing::info!("the process host is gone"),
            Err(error) => tracing::info!("cannot watch the process host: {error}"),
        }
        pause.wait().await;
    }
}

/// One connection to the host; whether it ended with the main program.
async fn follow(sidecar: &Sidecar, pause: &mut BackOff) -> Result<bool, HostError> {
    let mut states = sidecar.host.watch().await?;
    *pause = BackOff::default();
    while let Some(state) = states.next().await? {
        let exited = matches!(state.main, MainState::Exited { .. });
        sidecar.state.send_if_modified(|known| {
            let changed = *known != state;
            *known = state;
            changed
        });
        if exited {
            // The host lingers as long as this connection stands, and not for ever.
            sidecar.reported.cancelled().await;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Tells people who are attached when the weaver's end is near.
pub(crate) async fn announce_deadline(sidecar: Arc<Sidecar>) {
    let mut deadline = sidecar.deadline.subscribe();
    // The last warning that was given.
    let mut told: Option<Duration> = None;
    loop {
        let Some(end) = *deadline.borrow_and_update() else {
            if deadline.changed().await.is_err() {
                return;
            }
            continue;
        };
        let left = until(end);
        // Moved away: there will be something to tell again.
        if told.is_some_and(|told| left > told + Duration::from_secs(1)) {
            told = None;
        }
        let due = WARNINGS.into_iter().rfind(|warning| left <= *warning);
        if let Some(warning) = due
            && told.is_none_or(|told| warning < told)
            && !left.is_zero()
        {
            told = Some(warning);
            let seconds = left.as_secs_f64().round() as u64;
            if let Err(error) = sidecar.host.expiring(seconds).await {
                tracing::info!("nobody could be told of the deadline: {error}");
            }
        }
        let next = WARNINGS.into_iter().find(|warning| *warning < left);
        let pause = next.map_or(LONGEST_SLEEP, |next| (left - next).min(LONGEST_SLEEP));
        tokio::select! {
            () = sleep(pause) => {}
            changed = deadline.changed() => if changed.is_err() { return },
        }
    }
}
