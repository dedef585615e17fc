//! The database: what should be, and what happened. SQLite in one file; SQL is kept to what PostgreSQL takes too.
//!
//! [`identity`] holds users, organisations, tokens and device logins; [`weavers`] the weavers with their events;
//! [`tunnels`] devices, addresses and grants. Methods are on [`Store`], which is cheap to clone.

mod identity;
mod tunnels;
mod weavers;

use std::{fs, net::Ipv6Addr, os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use ipnetwork::Ipv6Network;
use jiff::Timestamp;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

pub use identity::{Approval, DevicePoll, Token, TokenOwner};
pub use tunnels::{DeviceError, LiveGrant};
pub use weavers::{EndedBy, NewWeaver, WeaverRow};

use crate::secrets::random;

/// Connections to the database; SQLite has one writer anyway.
const CONNECTIONS: u32 = 4;
/// How long a statement waits for another's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: SqlitePool,
    network: Ipv6Network,
}

impl Store {
    /// Opens the database at `path`, makes it when it is not there, and brings its schema up to date.
    ///
    /// # Errors
    ///
    /// When the file cannot be used, or was written by a newer server.
    pub async fn open(path: &Path) -> Result<Self> {
        // Made here, so that neither it nor the journal beside it, which takes its mode, is ever readable by others.
        fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("opening the database {}", path.display()))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).connect_with(options).await?;
        MIGRATIONS.run(&pool).await.context("the database's schema; was it written by a newer server?")?;
        let network = network(&pool).await?;
        Ok(Self { pool, network })
    }

    /// The deployment's prefix inside the tunnel: a random unique local /48 (RFC 4193 §3.2.2), the same for ever.
    #[must_use]
    pub const fn network(&self) -> Ipv6Network {
        self.network
    }

    /// Whether the database answers.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ping(&self) -> sqlx::Result<()> {
        sqlx::query("SELECT 1").execute(&self.pool).await.map(drop)
    }

    /// Closes all connections; the journal is folded into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// An address in the deployment's prefix that depends only on `seed`: the last 80 bits come from it.
    fn address(&self, subnet: u16, seed: &[u8]) -> Ipv6Addr {
        let digest = ring::digest::digest(&ring::digest::SHA256, seed);
        let mut octets = self.network.network().octets();
        octets[6..8].copy_from_slice(&subnet.to_be_bytes());
        octets[8..].copy_from_slice(&digest.as_ref()[..8]);
        Ipv6Addr::from(octets)
    }
}

async fn network(pool: &SqlitePool) -> Result<Ipv6Network> {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&random::<5>());
    let fresh = Ipv6Network::new(Ipv6Addr::from(octets), 48)?;
    sqlx::query("INSERT INTO settings (name, value) VALUES ('network', ?) ON CONFLICT DO NOTHING")
        .bind(fresh.to_string())
        .execute(pool)
        .await?;
    let kept: String = sqlx::query_scalar("SELECT value FROM settings WHERE name = 'network'").fetch_one(pool).await?;
    kept.parse().context("the network in the database")
}

/// A time as the database keeps it.
fn millis(time: Timestamp) -> i64 {
    time.as_millisecond()
}

/// A time from the database.
fn timestamp(millis: i64) -> sqlx::Result<Timestamp> {
    Timestamp::from_millisecond(millis).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// A value that was written in its text form.
fn parsed<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> sqlx::Result<T> {
    text.parse().map_err(|error: T::Err| sqlx::Error::Decode(error.into()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A store in a directory of its own.
    pub(crate) async fn temporary() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().expect("a directory");
        let store = Store::open(&directory.path().join("loom.db")).await.expect("opens");
        (directory, store)
    }

    #[tokio::test]
    async fn no_file_of_the_database_is_readable_by_others_and_it_opens_again() {
        let (directory, store) = temporary().await;
        let network = store.network();
        for entry in fs::read_dir(directory.path()).expect("a directory") {
            let entry = entry.expect("an entry");
            let mode = entry.metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{:?}", entry.file_name());
        }
        store.close().await;
        let again = Store::open(&directory.path().join("loom.db")).await.expect("opens again");
        assert_eq!(again.network(), network);
        assert_eq!(network.network().octets()[0], 0xfd, "a unique local address");
    }
}
