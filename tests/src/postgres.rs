//! A real PostgreSQL inside a weaver, which listens on the weaver's localhost only.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{System, Weaver, cluster::registry};

/// PostgreSQL's own port.
pub const PORT: u16 = 5432;

/// Makes a cluster in the weaver and starts it.
const START: &str = r#"
set -e
PATH="$(ls -d /usr/lib/postgresql/*/bin | tail -n 1):$PATH"
initdb --pgdata "$HOME/pg" --username loom --auth trust --no-sync >"$HOME/initdb.log" 2>&1 || { cat "$HOME/initdb.log" >&2; exit 1; }
pg_ctl --pgdata "$HOME/pg" --log "$HOME/pg.log" --wait \
  --options "-c listen_addresses=localhost -c unix_socket_directories=/tmp -c fsync=off" start >/dev/null
"#;

impl System {
    /// Makes a weaver from an image with PostgreSQL in it, where there are images; it does not run yet.
    pub fn new_weaver_with_postgres(&self) -> Result<Weaver> {
        match self.namespace() {
            None => self.new_weaver(&[]),
            Some(_) => self.new_weaver(&["--image", &registry::image("postgres"), "--", "/bin/bash"]),
        }
    }

    /// Starts PostgreSQL in a weaver, over `loom ssh`.
    pub fn start_postgres(&self, weaver: &Weaver) -> Result<()> {
        self.run(&["ssh", &weaver.id, "--", START]).context("starting PostgreSQL in the weaver").map(drop)
    }

    /// The loopback address at which a weaver's listening ports appear here.
    pub fn local_address(&self, weaver: &Weaver) -> Result<String> {
        let status = self.json(&["tunnel", "status", &weaver.id, "--json"])?;
        find_address(&status).context("the tunnel's status names no address")
    }

    /// Asks PostgreSQL at `address` with the real `psql`.
    pub fn psql(&self, address: &str, port: u16, query: &str) -> Result<String> {
        let output = Command::new("psql")
            .args([
                "-X",
                "-A",
                "-t",
                "-h",
                address,
                "-p",
                &port.to_string(),
                "-U",
                "loom",
                "-d",
                "postgres",
                "-c",
                query,
            ])
            .env("PGCONNECT_TIMEOUT", "20")
            .output()
            .context("starting psql")?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }
}

fn find_address(status: &Value) -> Option<String> {
    match status {
        Value::Array(items) => items.iter().find_map(find_address),
        Value::Object(fields) => fields.get("address").and_then(Value::as_str).map(ToOwned::to_owned),
        _ => None,
    }
}
