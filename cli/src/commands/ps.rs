//! `loom ps`: the weavers there are.

use std::fmt::Write as _;

use loom_api::{
    client::Client,
    weaver::{MAX_LIST, Weaver},
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

AGE counts from creation; TTL is the whole life, extensions included.")]
pub(crate) struct Args {
    /// Print JSON: the API's objects
    #[arg(long)]
    json: bool,
    /// List those that have ended too
    #[arg(long, short = 'a')]
    all: bool,
    /// Show names and reasons too
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
    output::bytes(table(&weavers, args.wide).as_bytes())?;
    if weavers.is_empty() {
        output::note("No weavers. Make one with: loom new");
    }
    Ok(Exit::OK)
}

/// Every page of a list.
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

fn table(weavers: &[Weaver], wide: bool) -> String {
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
    output::table(&header, &rows)
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
            table(&[weaver()], false),
            "ID                                      IMAGE      STATUS   AGE   TTL\n\
             W-01890000-0000-7000-8000-000000000001  debian:13  Running  1.5h  4h\n"
        );
    }

    #[test]
    fn the_wide_table_has_names_and_reasons() {
        assert_eq!(
            table(&[weaver()], true),
            "ID                                      IMAGE      STATUS   AGE   TTL  NAME  REASON\n\
             W-01890000-0000-7000-8000-000000000001  debian:13  Running  1.5h  4h   work  the main program runs\n"
        );
    }

    #[test]
    fn no_weavers_are_a_header() {
        assert_eq!(table(&[], false), "ID  IMAGE  STATUS  AGE  TTL\n");
    }
}
