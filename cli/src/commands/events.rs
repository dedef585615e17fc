//! `loom events`.

use clap_complete::ArgValueCandidates;
use loom_api::weaver::{EventKind, Weaver, WeaverEvent};
use serde_json::Value;

use crate::{
    completion,
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    event_stream::EventStream,
    output,
};

/// Shows what happened to a weaver, and why.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom events 0193f
  loom events 0193f -f           goes on until the weaver has ended
  loom events 0193f --json       an array; with -f one object on each line")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    id: String,
    /// Keep showing new events
    #[arg(long, short = 'f')]
    follow: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let path = super::weaver_path(&args.id)?;
    let doing = format!("cannot show the events of {}", args.id);
    if args.follow {
        let weaver: Weaver = client.get(&path).await.doing(&doing)?;
        let mut events = EventStream::new(client, weaver.id);
        loop {
            let event = events.next().await?;
            if args.json {
                output::json_line(&event)?
            } else {
                output::line(&line(&event))?
            }
            if is_last(event.kind) {
                return Ok(Exit::OK);
            }
        }
    }
    let listed: Value = client.get(&format!("{path}/events")).await.doing(&doing)?;
    if args.json {
        output::json(&listed)?;
        return Ok(Exit::OK);
    }
    let events: Vec<WeaverEvent> = serde_json::from_value(listed)
        .map_err(|error| CliError::failure(format!("cannot read the list of events: {error}")))?;
    for event in &events {
        output::line(&line(event))?;
    }
    Ok(Exit::OK)
}

/// Whether no interesting event can follow.
const fn is_last(kind: EventKind) -> bool {
    matches!(kind, EventKind::Exited | EventKind::Failed | EventKind::Expired | EventKind::Deleted)
}

fn line(event: &WeaverEvent) -> String {
    // Whole seconds are enough: events are in order.
    let at = event.at.round(jiff::Unit::Second).unwrap_or(event.at);
    let message = output::printable(&event.message).replace('\n', " ");
    format!("{at}  {:<18}  {message}", kind_name(event.kind))
}

/// The kind's name in the API.
fn kind_name(kind: EventKind) -> String {
    match serde_json::to_value(kind) {
        Ok(Value::String(name)) => name,
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_with_its_time_kind_and_words() {
        let event: WeaverEvent = serde_json::from_value(serde_json::json!({
            "id": 1, "weaver_id": "W-01890000-0000-7000-8000-000000000001", "at": "2026-01-01T00:00:00.25Z",
            "kind": "agent_connected", "message": "the agent has\nconnected\u{1b}[2J"
        }))
        .expect("an event");
        assert_eq!(line(&event), "2026-01-01T00:00:00Z  agent_connected     the agent has connected\u{fffd}[2J");
    }
}
