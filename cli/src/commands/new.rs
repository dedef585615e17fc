//! `loom new`: creates a weaver, shows its progress, and attaches to it.

use anstream::adapter::strip_str;
use jiff::Timestamp;
use loom_api::{
    OrgId, WeaverId,
    client::{Client, ClientError},
    login::Me,
    weaver::{CreateWeaver, EventKind, Weaver, WeaverEvent},
};
use serde_json::Value;
use uuid::Uuid;

use super::{attach, logs};
use crate::{
    backoff::Backoff,
    context::{Context, Settings},
    environment::{self, EnvArg},
    error::{CliError, Doing as _, Exit, Result},
    event_stream::EventStream,
    lifetime, output,
    progress::Progress,
    terminal,
};

/// How often the request is sent if there is no answer. The idempotency key makes it one weaver.
const MAX_TRIES: u32 = 4;
/// Lines shown of a failed program's output.
const MAX_OUTPUT_LINES: usize = 20;

/// Creates a weaver and attaches to it.
///
/// A weaver is a short-lived, isolated workspace, made from any image, with your repository cloned into it. It deletes
/// itself when its time is up. Detach with Ctrl+D; the weaver keeps running.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom new                                             the server's default image, for 4 hours
  loom new --repo https://github.com/me/project --branch fix
  loom new --image python:3.13 --ttl 8 --name train -- python3
  loom new -e RUST_LOG=debug -e GITHUB_TOKEN           GITHUB_TOKEN's value is taken from here
  id=$(loom new --no-attach)                           in a script: the id is all that is printed

Defaults come from LOOM_IMAGE, LOOM_ORG and LOOM_TTL, or image, org and ttl in config.toml.")]
pub(crate) struct Args {
    /// The container image [default: the server's]
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// The organisation it belongs to, by name or id [default: your personal one]
    #[arg(long, value_name = "ORG")]
    org: Option<String>,
    /// A git repository to clone into the workspace
    #[arg(long, value_name = "URL", value_parser = reject_option, allow_hyphen_values = true)]
    repo: Option<String>,
    /// The branch to check out
    #[arg(long, value_name = "NAME", requires = "repo", value_parser = reject_option, allow_hyphen_values = true)]
    branch: Option<String>,
    /// Set an environment variable; NAME alone takes its value from the local environment
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<EnvArg>,
    /// How long it lives: hours (4, 1.5) or with units (30m, 90s, 1h30m) [default: 4]
    #[arg(long, value_name = "TTL", value_parser = lifetime::parse, allow_hyphen_values = true)]
    ttl: Option<f64>,
    /// A name, usable instead of the id
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Print the id once the weaver is ready, and do not attach
    #[arg(long)]
    no_attach: bool,
    /// Print the weaver as JSON once it is ready, and do not attach
    #[arg(long)]
    json: bool,
    /// The main program and its arguments [default: the image's own]
    #[arg(value_name = "CMD", last = true)]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let request = request(&client, &context.settings, args).await?;
    let progress = Progress::start("requesting a weaver");
    let weaver = create(&client, &request).await?;
    let attaches = !args.no_attach && !args.json && terminal::is_interactive();
    for warning in &weaver.warnings {
        progress.print_line(&output::printable(&format!("warning: {warning}")));
    }

    let ready = tokio::select! {
        ready = wait_until_ready(&client, &weaver, &progress) => ready,
        _ = tokio::signal::ctrl_c() => {
            progress.finish();
            output::note(&interrupted(weaver.id));
            return Ok(Exit::INTERRUPTED);
        }
    };
    progress.finish();
    if let StartOutcome::Ended(reason) = ready?
        && !attaches
    {
        check_exit(&client, weaver.id, &reason).await?;
    }
    if args.json {
        let now: Value = client.get(&format!("/api/weavers/{}", weaver.id)).await.doing("cannot show the weaver")?;
        output::json(&now)?;
        return Ok(Exit::OK);
    }
    if attaches {
        return attach::attach(context, &client, weaver.id, attach::Options::just_created()).await;
    }
    output::line(&weaver.id.to_string())?;
    Ok(Exit::OK)
}

/// Refuses a value that git would take for an option.
fn reject_option(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with('-') {
        return Err("it cannot be empty or begin with a dash".to_owned());
    }
    Ok(text.to_owned())
}

async fn request(client: &Client, settings: &Settings, args: &Args) -> Result<CreateWeaver> {
    let lifetime_hours = match (&args.ttl, &settings.ttl) {
        (Some(hours), _) => Some(*hours),
        (None, Some(text)) => Some(
            lifetime::parse(text)
                .map_err(|error| CliError::usage(format!("cannot use the setting ttl = {text:?}: {error}")))?,
        ),
        (None, None) => None,
    };
    let env = environment::collect(&args.env)?;
    let org_id = match args.org.as_ref().or(settings.org.as_ref()) {
        Some(org) => Some(organisation(client, org).await?),
        None => None,
    };
    Ok(CreateWeaver {
        image: args.image.clone().or_else(|| settings.image.clone()),
        org_id,
        name: args.name.clone(),
        env,
        repo: args.repo.clone(),
        branch: args.branch.clone(),
        lifetime_hours,
        command: (!args.command.is_empty()).then(|| args.command.clone()),
        resources: None,
    })
}

/// An organisation by its id or its name.
pub(super) async fn organisation(client: &Client, text: &str) -> Result<OrgId> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let me: Me = client.get("/api/me").await.doing("cannot look up the organisation")?;
    let names: Vec<&str> = me.organisations.iter().map(|organisation| organisation.name.as_str()).collect();
    me.organisations
        .iter()
        .find(|organisation| organisation.name == text)
        .map(|organisation| organisation.id)
        .ok_or_else(|| {
            CliError::failure(format!("you are in no organisation {text:?}"))
                .hint(format!("yours are: {}", names.join(", ")))
        })
}

/// Requests the weaver; retries if there is no answer.
async fn create(client: &Client, request: &CreateWeaver) -> Result<Weaver> {
    let key = Uuid::new_v4().to_string();
    let mut backoff = Backoff::default();
    let mut tries = 1;
    loop {
        match client.post_once("/api/weavers", &key, request).await {
            Err(ClientError::Unreachable { .. }) if tries < MAX_TRIES => {
                tries += 1;
                backoff.wait().await;
            }
            result => return result.doing("cannot create a weaver"),
        }
    }
}

/// How a weaver started, other than with an error.
enum StartOutcome {
    /// The main program is running.
    Ready,
    /// The main program has exited already; with the event's message.
    Ended(String),
}

/// Shows the stages as they complete, until the weaver is ready.
async fn wait_until_ready(client: &Client, weaver: &Weaver, progress: &Progress) -> Result<StartOutcome> {
    let mut events = EventStream::new(client.clone(), weaver.id);
    let mut stages = Stages::new(weaver.created_at);
    progress.waiting_for("waiting to be scheduled");
    loop {
        let event = events.next().await?;
        match stages.take(&event) {
            Step::Done { stage, seconds, next } => {
                progress.done(stage, seconds);
                progress.waiting_for(next);
            }
            Step::Next(next) => progress.waiting_for(next),
            Step::Message => progress.print_line(&format!("  {}", output::printable(&event.message))),
            Step::Ready { seconds, total } => {
                progress.done("main program runs", seconds);
                progress.print_line(&ready(weaver, total));
                return Ok(StartOutcome::Ready);
            }
            Step::Exited => return Ok(StartOutcome::Ended(event.message)),
            Step::Failed => {
                return Err(CliError::failure(format!("the weaver did not become ready: {}", event.message))
                    .hint(format!("see all that happened: loom events {}", weaver.id)));
            }
        }
    }
}

/// Fails if the program's exit code is not 0; the error contains its last output.
async fn check_exit(client: &Client, weaver: WeaverId, reason: &str) -> Result<()> {
    let now: Weaver = client.get(&format!("/api/weavers/{weaver}")).await.doing("cannot show the weaver")?;
    if now.exit_code == Some(0) {
        return Ok(());
    }
    let output = logs::final_output(client, weaver).await;
    let output = strip_str(&String::from_utf8_lossy(&output)).to_string();
    let lines: Vec<&str> = output.trim_end().lines().collect();
    let mut message = format!("the weaver did not become ready: {reason}");
    if !lines.is_empty() {
        message.push_str("; the end of its output:");
        for line in &lines[lines.len().saturating_sub(MAX_OUTPUT_LINES)..] {
            message.push_str("\n  ");
            message.push_str(line.trim_end());
        }
    }
    Err(CliError::failure(message).hint(format!("see all that happened: loom events {weaver}")))
}

fn ready(weaver: &Weaver, seconds: f64) -> String {
    let name = weaver.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
    let line = format!(
        "{}{name} is ready after {}; it ends in {}.",
        weaver.id,
        output::seconds(seconds),
        lifetime::format(weaver.lifetime_hours)
    );
    output::printable(&line).into_owned()
}

fn interrupted(weaver: WeaverId) -> String {
    format!(
        "\nThe weaver is still starting: {weaver}\nTo attach once it is ready: loom attach {weaver}\n\
         To delete it: loom delete {weaver}"
    )
}

/// Turns events into stages with their durations, by the server's clock.
struct Stages {
    created: Timestamp,
    last: Timestamp,
}

/// What an event means for the progress.
#[derive(Debug, PartialEq)]
enum Step {
    /// A stage is done, and the next begins.
    Done { stage: &'static str, seconds: f64, next: &'static str },
    /// Another stage begins.
    Next(&'static str),
    /// The event's message is shown.
    Message,
    /// The main program is running.
    Ready { seconds: f64, total: f64 },
    /// The main program has exited already.
    Exited,
    /// The weaver will not become ready.
    Failed,
}

impl Stages {
    const fn new(created: Timestamp) -> Self {
        Self { created, last: created }
    }

    fn take(&mut self, event: &WeaverEvent) -> Step {
        let seconds = event.at.duration_since(self.last).as_secs_f64();
        let (stage, next) = match event.kind {
            EventKind::Created => {
                self.last = event.at;
                return Step::Next("waiting to be scheduled");
            }
            EventKind::Started => ("scheduled and started", "waiting for the agent"),
            EventKind::AgentConnected => ("agent connected", "starting the main program"),
            EventKind::Cloning => {
                self.last = event.at;
                return Step::Next("cloning the repository");
            }
            EventKind::Cloned => ("repository cloned", "starting the main program"),
            EventKind::Ready => {
                return Step::Ready { seconds, total: event.at.duration_since(self.created).as_secs_f64() };
            }
            EventKind::Exited => return Step::Exited,
            EventKind::Failed | EventKind::Expired | EventKind::Deleted => return Step::Failed,
            _ => return Step::Message,
        };
        self.last = event.at;
        Step::Done { stage, seconds, next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(second: i64, kind: EventKind) -> WeaverEvent {
        let at = Timestamp::from_second(second).expect("in range");
        WeaverEvent { id: second, weaver_id: WeaverId::from(Uuid::nil()), at, kind, message: "words".into() }
    }

    #[test]
    fn each_stage_has_its_own_time_and_the_end_the_sum() {
        let mut stages = Stages::new(Timestamp::from_second(10).expect("in range"));
        let steps: Vec<Step> = [
            event(10, EventKind::Created),
            event(12, EventKind::Started),
            event(13, EventKind::AgentConnected),
            event(14, EventKind::Cloning),
            event(14, EventKind::Backend),
            event(19, EventKind::Cloned),
            event(20, EventKind::Ready),
        ]
        .iter()
        .map(|event| stages.take(event))
        .collect();
        let done = |stage, seconds, next| Step::Done { stage, seconds, next };
        assert_eq!(
            steps,
            [
                Step::Next("waiting to be scheduled"),
                done("scheduled and started", 2.0, "waiting for the agent"),
                done("agent connected", 1.0, "starting the main program"),
                Step::Next("cloning the repository"),
                Step::Message,
                done("repository cloned", 5.0, "starting the main program"),
                Step::Ready { seconds: 1.0, total: 10.0 },
            ]
        );
    }

    #[test]
    fn an_end_before_ready_is_reported_at_once() {
        for (kind, step) in [
            (EventKind::Failed, Step::Failed),
            (EventKind::Exited, Step::Exited),
            (EventKind::Expired, Step::Failed),
            (EventKind::Deleted, Step::Failed),
        ] {
            let mut stages = Stages::new(Timestamp::from_second(10).expect("in range"));
            assert_eq!(stages.take(&event(11, kind)), step, "{kind:?}");
        }
    }

    #[test]
    fn interrupting_the_wait_says_what_to_do() {
        let text = interrupted(WeaverId::from(Uuid::nil()));
        assert!(text.contains("loom delete W-00000000-0000-0000-0000-000000000000"), "{text}");
    }
}
