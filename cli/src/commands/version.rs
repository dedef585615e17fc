//! `loom version`.

use loom_api::{PROTOCOL_VERSION, weaver::VersionInfo};
use serde_json::{Value, json};

use crate::{
    context::Context,
    error::{Exit, Result},
    output,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Shows the versions of this program and the server, and warns if they are incompatible.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    // Works without a server too.
    let server = match context.server_url() {
        Ok(url) => Some((url.clone(), ask(context).await)),
        Err(_) => None,
    };
    let known = server.as_ref().and_then(|(_, answer)| answer.as_ref().ok());
    if args.json {
        let client = json!({"version": VERSION, "protocol": PROTOCOL_VERSION});
        output::json(&json!({"client": client, "server": known}))?;
    } else {
        output::line(&format!("loom {VERSION} (protocol {PROTOCOL_VERSION})"))?;
    }
    let info = known.cloned().and_then(|info| serde_json::from_value::<VersionInfo>(info).ok());
    match (server, info) {
        (None, _) => output::note("No server is known yet; log in with: loom login --server-url https://YOUR-SERVER"),
        (Some((url, Err(error))), _) => {
            output::warning(&format!("cannot get the version of the server at {url}: {error}"))
        }
        (Some((url, Ok(_))), None) => {
            output::warning(&format!("the answer of {url} cannot be parsed; are the versions too far apart?"))
        }
        (Some((url, Ok(_))), Some(info)) => {
            if !args.json {
                let VersionInfo { version, protocol, backend } = &info;
                let line = format!("server {version} (protocol {protocol}, {backend} backend) at {url}");
                output::line(&output::printable(&line))?;
            }
            if let Some(warning) = skew(&info) {
                output::warning(&warning);
            }
        }
    }
    Ok(Exit::OK)
}

async fn ask(context: &Context) -> Result<Value> {
    Ok(context.anonymous_client()?.get("/api/version").await?)
}

/// The warning if the versions differ.
fn skew(server: &VersionInfo) -> Option<String> {
    if server.protocol > PROTOCOL_VERSION {
        return Some(format!(
            "the server speaks protocol {}, this program {PROTOCOL_VERSION}: update loom",
            server.protocol
        ));
    }
    if server.protocol < PROTOCOL_VERSION {
        return Some(format!(
            "the server speaks protocol {}, this program {PROTOCOL_VERSION}: some commands need a newer server",
            server.protocol
        ));
    }
    (server.version != VERSION)
        .then(|| format!("this program is {VERSION} and the server {}; they may differ in details", server.version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_warning_fits_the_version_skew() {
        let server =
            |version: &str, protocol| VersionInfo { version: version.into(), protocol, backend: "local".into() };
        assert_eq!(skew(&server(VERSION, PROTOCOL_VERSION)), None);
        assert!(skew(&server("9.9.9", PROTOCOL_VERSION)).is_some_and(|text| text.contains("9.9.9")));
        assert!(skew(&server(VERSION, PROTOCOL_VERSION + 1)).is_some_and(|text| text.contains("update loom")));
        assert!(skew(&server(VERSION, PROTOCOL_VERSION - 1)).is_some_and(|text| text.contains("newer server")));
    }
}
