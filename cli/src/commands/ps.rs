//! `loom ps`.

use std::fmt::Write as _;

use loom_api::{
    client::Client,
    weaver::{MAX_LIST, Weaver, WeaverStatus},
};
use serde_json::Value;

use crate::{
    context::Context,
    error::{CliError, Doing as _, Exit, Result},
    output,
};

/// Lists the weavers of your organisations.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom ps
  loom ps --wide           with names and reasons
  loom ps --all            those that have ended too
  loom ps --json | jq -r '.[].id'

Under what is Pending or Failed stands the reason. AGE counts from creation; TTL is the whole life, extensions included.")]
pub(crate) struct Args {
    /// Print the API's objects as JSON
    #[arg(long)]
    json: bool,
    /// Also list weavers that have ended
    #[arg(long, short = 'a')]
    all: bool,
    /// Also show names and reasons
    #[arg(long, short = 'w')]
    wide: bool,
    /// Only those of one organisation, by name or id
    #[arg(long, value_name = "ORG")]
    org: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let client = context.client()?;
    let mut query = format!("limit={MAX_LIST}");
    if args.all {
        query.push_str("&all=true");
    }
    if let Some(org) = &args.org {
        let _ = write!(query, "&org={}", super::new::organisation(&client, org).await?);
    }
    let listed = Value::Array(all_pages(&client, &query).await?);
    if args.json {
        output::json(&listed)?;
        return Ok(Exit::OK);
    }
    let weavers: Vec<Weaver> = serde_json::from_value(listed)
        .map_err(|error| CliError::failure(format!("cannot read the list of weavers: {error}")))?;
    output::bytes(table(&weavers, args.wide, width()).as_bytes())?;
    if weavers.is_empty() {
        output::note("No weavers. Create one with: loom new");
    }
    Ok(Exit::OK)
}

/// Fetches all pages of a list.
async fn all_pages(client: &Client, query: &str) -> Result<Vec<Value>> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let before = all.last().and_then(|last| last["id"].as_str()).map(|id| format!("&before={id}"));
        let path = format!("/api/weavers?{query}{}", before.unwrap_or_default());
        let page: Vec<Value> = client.get(&path).await.doing("cannot list weavers")?;
        let is_last = page.len() < MAX_LIST as usize;
        all.extend(page);
        if is_last {
            return Ok(all);
        }
    }
}

/// The terminal's width in characters, if standard output is one.
fn width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col.into())
}

fn table(weavers: &[Weaver], wide: bool, width: Option<usize>) -> String {
    let mut header = vec!["ID", "IMAGE", "STATUS", "AGE", "TTL"];
    if wide {
        header.extend(["NAME", "REASON"]);
    }
    let rows: Vec<Vec<String>> = weavers
        .iter()
        .map(|weaver| {
            let mut row = vec![
                weaver.id.to_string(),
                weaver.image.clone(),
                weaver.status.to_string(),
                output::hours(weaver.age_hours),
                output::hours(weaver.lifetime_hours),
            ];
            if wide {
                row.push(weaver.name.clone().unwrap_or_else(|| "-".to_owned()));
                row.push(weaver.reason.clone().unwrap_or_default());
            }
            row
        })
        .collect();
    let table = output::table(&header, &rows);
    if wide {
        return table;
    }
    let mut lines = table.lines();
    let mut text = String::new();
    if let Some(line) = lines.next() {
        text.push_str(&format!("{line}\n"));
    }
    // The table has a line for each weaver.
    for (line, weaver) in lines.zip(weavers) {
        text.push_str(&format!("{line}\n"));
        if let Some(reason) = reason(weaver) {
            text.push_str(&reason_line(reason, width));
        }
    }
    text
}

/// The reason why a weaver is pending or has failed.
fn reason(weaver: &Weaver) -> Option<&str> {
    let asked = matches!(weaver.status, WeaverStatus::Pending | WeaverStatus::Failed);
    weaver.reason.as_deref().filter(|reason| asked && !reason.trim().is_empty())
}

/// A reason on one line below its weaver, cut to the terminal's width.
fn reason_line(reason: &str, width: Option<usize>) -> String {
    const INDENT: &str = "  ";
    let words: Vec<&str> = reason.split_whitespace().collect();
    let mut text = output::printable(&words.join(" ")).into_owned();
    let room = width.map_or(usize::MAX, |width| width.saturating_sub(INDENT.len()).max(1));
    if text.chars().count() > room {
        text = text.chars().take(room - 1).chain(['…']).collect();
    }
    format!("{INDENT}{text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weaver() -> Weaver {
        serde_json::from_value(serde_json::json!({
            "id": "W-01890000-0000-7000-8000-000000000001", "name": "work",
            "org_id": "O-01890000-0000-7000-8000-000000000002", "owner_id": "U-01890000-0000-7000-8000-000000000003",
            "image": "debian:13", "status": "Running", "reason": "the main program runs",
            "created_at": "2026-01-01T00:00:00Z", "lifetime_hours": 4.0, "expires_at": "2026-01-01T04:00:00Z",
            "age_hours": 1.52, "remaining_hours": 2.48, "pod_name": "weaver-01890000-0000-7000-8000-000000000001",
            "resources": {"cpu_millicores": 2000, "memory_mb": 2048}
        }))
        .expect("a weaver")
    }

    #[test]
    fn the_table_is_as_documented() {
        assert_eq!(
            table(&[weaver()], false, None),
            "ID                                      IMAGE      STATUS   AGE   TTL\n\
             W-01890000-0000-7000-8000-000000000001  debian:13  Running  1.5h  4h\n"
        );
    }

    #[test]
    fn the_wide_table_has_names_and_reasons() {
        assert_eq!(
            table(&[weaver()], true, Some(20)),
            "ID                                      IMAGE      STATUS   AGE   TTL  NAME  REASON\n\
             W-01890000-0000-7000-8000-000000000001  debian:13  Running  1.5h  4h   work  the main program runs\n"
        );
    }

    #[test]
    fn what_is_pending_or_failed_has_its_reason_below_it() {
        let failed = |reason: &str| Weaver { status: WeaverStatus::Failed, reason: Some(reason.into()), ..weaver() };
        let pending = Weaver { status: WeaverStatus::Pending, reason: Some("no node has room".into()), ..weaver() };
        let text = table(&[failed("exited with 1\n\x1b[2Jand said so"), weaver(), pending], false, None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert_eq!(lines[2], "  exited with 1 \u{fffd}[2Jand said so");
        assert_eq!(lines[5], "  no node has room");
        assert_eq!(table(&[failed(" ")], false, None).lines().count(), 2, "nothing to say needs no line");
        let cut = table(&[failed("exited with 1")], false, Some(12));
        assert_eq!(cut.lines().last(), Some("  exited wi…"));
    }

    #[test]
    fn no_weavers_are_a_header() {
        assert_eq!(table(&[], false, None), "ID  IMAGE  STATUS  AGE  TTL\n");
    }
}
