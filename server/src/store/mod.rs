//! The database: what should be, and what happened. SQLite in one file; SQL is kept to what PostgreSQL takes too.
//!
//! SQLite has one writer at a time, so this process has one connection that writes, and the others only read. Writers
//! queue for it here instead of colliding in the file.
//!
//! [`identity`] holds users and organisations; [`device_logins`] logins that wait for approval; [`tokens`] their
//! tokens; [`weavers`] the weavers and [`events`] what happened to them; [`tunnels`] devices, addresses and grants.
//! Methods are on [`Store`], which is cheap to clone.

mod device_logins;
mod events;
mod identity;
mod rights;
mod space;
mod tokens;
mod tunnels;
mod weavers;

use std::{fs, net::Ipv6Addr, os::unix::fs::OpenOptionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use ipnetwork::Ipv6Network;
use jiff::Timestamp;
use loom_api::weaver::MAX_LIST;
use sqlx::{
    Sqlite, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous},
};

pub use device_logins::{Approval, Decision, DeviceLoginError, DevicePoll, LoginClient, PendingLogin};
pub use tokens::{Token, TokenError, TokenOwner};
pub use tunnels::{GRANT_PAGE, KeyError, KeyOwner, LiveGrant};
pub use weavers::{Added, Deadline, Idempotency, Limit, Limits, MAX_FITTING, Page, Transition};

use crate::secrets::random;
use space::Space;

/// Connections that only read.
const READERS: u32 = 4;
/// Rows that SQLite's thread reads ahead of whoever asked: a whole list. With the usual 50, the two threads wait for
/// each other twenty times on the way through a list of 1,000 weavers.
const ROWS_AHEAD: usize = MAX_LIST as usize;
/// How long a statement waits for the lock of another process, such as `loom-server user add`.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!();

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    reader: SqlitePool,
    writer: SqlitePool,
    network: Ipv6Network,
    space: Space,
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
            // What was answered must survive a power cut: a token that was revoked must not come back.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(options.clone())
            .await?;
        MIGRATIONS.run(&writer).await.context("the database's schema; was it written by a newer server?")?;
        if let Err(error) = vacuum_when_due(&writer).await {
            tracing::warn!("secrets that were deleted are still in the database's file, until the next start: {error}");
        }
        let network = network(&writer).await?;
        let reader = SqlitePoolOptions::new()
            .max_connections(READERS)
            .connect_with(options.row_buffer_size(ROWS_AHEAD).pragma("query_only", "ON"))
            .await?;
        Ok(Self { reader, writer, network, space: Space::beside(path) })
    }

    /// The deployment's prefix inside the tunnel: a random unique local /48 (RFC 4193 §3.2.2), the same for ever.
    #[cfg(test)]
    pub const fn network(&self) -> Ipv6Network {
        self.network
    }

    /// The connections for statements that only read; a write on them fails.
    const fn reader(&self) -> &SqlitePool {
        &self.reader
    }

    /// The one connection that writes, for a single statement. Several statements belong in [`Self::begin_write`].
    const fn writer(&self) -> &SqlitePool {
        &self.writer
    }

    /// Begins a transaction that may write. It holds the write lock from its start, so that what it reads is still true
    /// when it writes, and nothing in it fails because another was quicker.
    ///
    /// There is only one such connection: using [`Self::writer`] before the transaction has ended waits for itself.
    async fn begin_write(&self) -> sqlx::Result<Transaction<'static, Sqlite>> {
        self.writer.begin_with("BEGIN IMMEDIATE").await
    }

    /// Whether the disk is too full for what only adds to the database.
    pub fn is_low_on_space(&self) -> bool {
        self.space.is_low()
    }

    /// Keeps an eye on the disk until it is dropped.
    pub async fn watch_space(self) {
        self.space.watch().await;
    }

    /// Whether the database answers.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn ping(&self) -> sqlx::Result<()> {
        sqlx::query("SELECT 1").execute(self.reader()).await.map(drop)
    }

    /// Closes all connections; the journal is folded into the file.
    pub async fn close(&self) {
        self.reader.close().await;
        self.writer.close().await;
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

/// Rewrites the file after a migration that deleted secrets: until then they stand in its free space.
async fn vacuum_when_due(writer: &SqlitePool) -> sqlx::Result<()> {
    let is_due: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM settings WHERE name = 'vacuum')").fetch_one(writer).await?;
    if is_due {
        sqlx::query("VACUUM").execute(writer).await?;
        sqlx::query("DELETE FROM settings WHERE name = 'vacuum'").execute(writer).await?;
        // The journal is cut off: it had the old pages.
        sqlx::query("PRAGMA wal_checkpoint (TRUNCATE)").execute(writer).await?;
    }
    Ok(())
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

    use jiff::SignedDuration;
    use loom_api::login::TokenKind;

    use super::*;

    pub(crate) use super::weavers::tests::added;

    impl Store {
        /// Makes the row of a weaver unreadable.
        pub(crate) async fn garble(&self, weaver: loom_api::WeaverId) {
            sqlx::query("UPDATE weavers SET status = 'nonsense' WHERE id = ?")
                .bind(weaver.to_string())
                .execute(self.writer())
                .await
                .expect("written");
        }
    }

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

    /// Clients that poll logins (which reads, then writes) while others write, also from another process.
    #[tokio::test(flavor = "multi_thread")]
    async fn many_who_read_and_write_at_once_never_find_the_database_locked() {
        const CLIENTS: usize = 24;
        const ROUNDS: usize = 20;
        let (directory, store) = temporary().await;
        let other_process = Store::open(&directory.path().join("loom.db")).await.expect("opens twice");
        let user = store.add_user("ada").await.expect("added");
        let until = Timestamp::now() + SignedDuration::from_mins(10);
        let mut clients = tokio::task::JoinSet::<Result<()>>::new();
        for client in 0..CLIENTS {
            let store = if client % 4 == 0 { other_process.clone() } else { store.clone() };
            clients.spawn(async move {
                let device = format!("device-{client}");
                let address = std::net::IpAddr::from([192, 0, 2, client as u8]);
                let who = LoginClient { name: "laptop".to_owned(), address, network: address };
                store.add_device_login(&device, &format!("USER-{client}"), &who, until).await?;
                for _ in 0..ROUNDS {
                    store.poll_device_login(&device, SignedDuration::ZERO, "login", until).await?;
                    let token = store.add_user_token(user, "ci", TokenKind::Api, None).await?;
                    let found = store.token(token.expose()).await?.expect("a token can be used once it is made");
                    assert!(store.remove_token(user, found.id).await?, "removed once");
                }
                Ok(())
            });
        }
        for result in clients.join_all().await {
            result.expect("no client fails");
        }
    }

    /// A database as the server left it before migration 7, with a weaver of each of these repositories. Its messages
    /// quote the repository's URL.
    async fn of_migration_6(path: &Path, repositories: &[&str]) {
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options.journal_mode(SqliteJournalMode::Wal))
            .await
            .expect("opens");
        MIGRATIONS.run_to(6, &pool).await.expect("migrated");
        let mut statements = vec![
            "INSERT INTO users (id, name, created_at) VALUES ('u', 'ada', 0)".to_owned(),
            "INSERT INTO organisations (id, name, created_at) VALUES ('o', 'ada', 0)".to_owned(),
        ];
        for (number, repository) in repositories.iter().enumerate() {
            statements.push(format!(
                "INSERT INTO weavers (id, org_id, owner_id, image, repo, cpu_millicores, memory_mb, created_at, \
                 expires_at, status, reason, address) VALUES ('{number}', 'o', 'u', 'a', '{repository}', 1, 1, 0, 0, \
                 'Failed', '{repository}: no', '{number}')"
            ));
            statements.push(format!(
                "INSERT INTO events (weaver_id, at, kind, message) VALUES ('{number}', 0, 'failed', 'see {repository}')"
            ));
            statements.push(format!("INSERT INTO idempotency_keys VALUES ('u', '{number}', 'hash', '{number}', 0)"));
            // Longer now: the old row goes to the free space.
            statements.push(format!("UPDATE weavers SET image = '{}' WHERE id = '{number}'", "a".repeat(2000)));
        }
        for statement in statements {
            sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&pool).await.expect("executed");
        }
        pool.close().await;
    }

    #[tokio::test]
    async fn credentials_in_urls_from_before_they_were_refused_leave_the_database_and_its_file() {
        let cases = [
            ("https://ada:s3cret@host/team/project", "https://host/team/project"),
            ("https://s3cret-token-of-a-user@host:8443/x", "https://host:8443/x"),
            ("http://ada:s3cret@[::1]:8443/x", "http://[::1]:8443/x"),
            ("https://ada:s3cret/s3cret@host/x", "https://host/x"),
            ("https://ada:s3cret#s3cret?@host/x", "https://host/x"),
            (r"https://ada:s3cret\s3cret@host/x", "https://host/x"),
            ("https://ada:s3cret@s3cret@host/x", "https://host/x"),
            ("https://ada%3As3cret%40host/x", "https://removed"),
            ("git://[::1]s3cret/x", "git://removed"),
            // None of these has any.
            ("https://host:8443/@team/project@v1?at=a@b", "https://host:8443/@team/project@v1?at=a@b"),
            ("https://[::1]:8443/x", "https://[::1]:8443/x"),
            ("https://[::1]/x", "https://[::1]/x"),
            ("git://host", "git://host"),
            ("file:///srv/git/a@b", "file:///srv/git/a@b"),
        ];
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("loom.db");
        of_migration_6(&path, &cases.map(|(before, _)| before)).await;
        let holds_secret = || {
            let files =
                fs::read_dir(directory.path()).expect("a directory").map(|entry| entry.expect("an entry").path());
            let mut contents = files.map(|file| fs::read(file).expect("read"));
            contents.any(|content| content.windows(6).any(|window| window == b"s3cret"))
        };
        assert!(holds_secret(), "there is something to remove");

        let store = Store::open(&path).await.expect("opens");
        for (number, (before, after)) in cases.iter().enumerate() {
            let (repo, reason, message): (String, String, String) = sqlx::query_as(
                "SELECT repo, reason, message FROM weavers JOIN events ON weaver_id = weavers.id WHERE weavers.id = ?",
            )
            .bind(number.to_string())
            .fetch_one(store.reader())
            .await
            .expect("a row");
            assert_eq!(repo, *after, "{before}");
            assert_eq!((reason, message), (format!("{after}: no"), format!("see {after}")), "{before}");
        }
        let keys: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM idempotency_keys").fetch_one(store.reader()).await.expect("read");
        assert_eq!(keys, 5, "those of requests without a secret");
        assert!(!holds_secret(), "the file still holds it while the server runs");
        store.close().await;
        Store::open(&path).await.expect("opens again").close().await;
        assert!(!holds_secret());
    }

    #[tokio::test]
    async fn readers_cannot_write() {
        let (_directory, store) = temporary().await;
        let error = sqlx::query("DELETE FROM users").execute(store.reader()).await.expect_err("refused");
        assert!(error.to_string().contains("readonly"), "{error}");
    }
}
