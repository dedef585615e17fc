//! Device logins: few at a time, in all and from one network, so that nobody fills the table, and each knows who asks.

use std::net::IpAddr;

use jiff::{SignedDuration, Timestamp};
use loom_api::{Secret, UserId, login::TokenKind};

use super::{
    Store, millis, parsed, timestamp,
    tokens::{self, TokenError},
};
use crate::secrets::hash;

/// Logins that may wait at a time.
const MAX_LOGINS: i64 = 10_000;
/// Those of them that come from one network.
const MAX_LOGINS_OF_NETWORK: i64 = 50;

/// Who asks to be logged in.
#[derive(Debug, Clone)]
pub struct LoginClient {
    /// What the client says of itself.
    pub name: String,
    pub address: IpAddr,
    /// What limits per address count by.
    pub network: IpAddr,
}

/// A login that can still be decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingLogin {
    /// What the client says of itself.
    pub client_name: String,
    pub client_address: String,
    pub created_at: Timestamp,
}

/// Why a device login was not begun.
#[derive(Debug, thiserror::Error)]
pub enum DeviceLoginError {
    #[error("too many logins wait for their approval")]
    TooMany,
    /// The database failed, or the user code is in use.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// What a poll of a device login finds.
#[derive(Debug)]
pub enum DevicePoll {
    /// Nobody has approved yet.
    Pending,
    /// The last poll was less than the interval ago.
    TooSoon,
    /// Unknown, used, or too old.
    Expired,
    /// The user said no.
    Denied,
    /// The user said yes: the token that the login was used up for.
    Approved(Secret),
}

/// What became of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Made,
    /// There is no such login, or it was decided already.
    NoLogin,
    /// The token with which the user decides is not good any more.
    NoToken,
}

/// What a user says to a device login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approval {
    Approve,
    Deny,
}

impl Store {
    /// Records a device login. Those that have expired go first; when there are too many in all, the oldest of the
    /// network with the most gives way.
    pub async fn add_device_login(
        &self,
        device_code: &str,
        user_code: &str,
        client: &LoginClient,
        until: Timestamp,
    ) -> Result<(), DeviceLoginError> {
        let now = millis(Timestamp::now());
        let network = client.network.to_string();
        let mut transaction = self.begin_write().await?;
        sqlx::query("DELETE FROM device_logins WHERE expires_at <= ?").bind(now).execute(&mut *transaction).await?;
        let (all, of_network): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT COUNT(*) FROM device_logins), \
             (SELECT COUNT(*) FROM device_logins WHERE client_network = ?)",
        )
        .bind(&network)
        .fetch_one(&mut *transaction)
        .await?;
        if of_network >= MAX_LOGINS_OF_NETWORK {
            // What has expired stays deleted.
            transaction.commit().await?;
            return Err(DeviceLoginError::TooMany);
        }
        if all >= MAX_LOGINS {
            // Whoever has hundreds of networks keeps nobody out who has one.
            sqlx::query(
                "DELETE FROM device_logins WHERE device_hash = (SELECT device_hash FROM device_logins \
                 WHERE client_network = (SELECT client_network FROM device_logins GROUP BY client_network \
                 ORDER BY COUNT(*) DESC LIMIT 1) ORDER BY created_at LIMIT 1)",
            )
            .execute(&mut *transaction)
            .await?;
        }
        sqlx::query(
            "INSERT INTO device_logins \
             (device_hash, user_hash, client_name, client_address, client_network, created_at, expires_at) \
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(hash(device_code))
        .bind(hash(user_code))
        .bind(&client.name)
        .bind(client.address.to_string())
        .bind(network)
        .bind(now)
        .bind(millis(until))
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// The login with a user code, if it can still be decided.
    pub async fn pending_device_login(&self, user_code: &str) -> sqlx::Result<Option<PendingLogin>> {
        let row: Option<(String, String, i64)> = sqlx::query_as(
            "SELECT client_name, client_address, created_at FROM device_logins \
             WHERE user_hash = ? AND expires_at > ? AND denied = 0 AND user_id IS NULL",
        )
        .bind(hash(user_code))
        .bind(millis(Timestamp::now()))
        .fetch_optional(self.reader())
        .await?;
        row.map(|(client_name, client_address, created_at)| {
            Ok(PendingLogin { client_name, client_address, created_at: timestamp(created_at)? })
        })
        .transpose()
    }

    /// Decides a device login with a user's token. A token that signs in is used up by an approval, so it approves one
    /// login, also when it is shown for several at the same time.
    pub async fn decide_device_login(
        &self,
        user_code: &str,
        user: UserId,
        token: i64,
        approval: Approval,
    ) -> sqlx::Result<Decision> {
        let mut transaction = self.begin_write().await?;
        let Some(kind) = tokens::kind_of_good_one(&mut transaction, token, user).await? else {
            return Ok(Decision::NoToken);
        };
        let done = sqlx::query(
            "UPDATE device_logins SET denied = ?, user_id = ? \
             WHERE user_hash = ? AND expires_at > ? AND denied = 0 AND user_id IS NULL",
        )
        .bind(i64::from(approval == Approval::Deny))
        .bind((approval == Approval::Approve).then(|| user.to_string()))
        .bind(hash(user_code))
        .bind(millis(Timestamp::now()))
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() == 0 {
            return Ok(Decision::NoLogin);
        }
        if kind == TokenKind::SignIn && approval == Approval::Approve {
            tokens::delete(&mut transaction, token, Some(user)).await?;
        }
        transaction.commit().await?;
        Ok(Decision::Made)
    }

    /// Looks at a device login on behalf of its device (RFC 8628 §3.5). An approved one is used up by this, and becomes a
    /// token with a name and an end.
    pub async fn poll_device_login(
        &self,
        device_code: &str,
        interval: SignedDuration,
        token_name: &str,
        token_end: Timestamp,
    ) -> Result<DevicePoll, TokenError> {
        let now = Timestamp::now();
        let code = hash(device_code);
        // Strangers who guess must not keep the one connection that writes from others.
        let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM device_logins WHERE device_hash = ?)")
            .bind(&code)
            .fetch_one(self.reader())
            .await?;
        if !known {
            return Ok(DevicePoll::Expired);
        }
        let mut transaction = self.begin_write().await?;
        let row: Option<(i64, Option<i64>, i64, Option<String>)> =
            sqlx::query_as("SELECT expires_at, polled_at, denied, user_id FROM device_logins WHERE device_hash = ?")
                .bind(&code)
                .fetch_optional(&mut *transaction)
                .await?;
        let Some((expires_at, polled_at, denied, user)) = row else { return Ok(DevicePoll::Expired) };
        let (poll, used_up) = if denied != 0 {
            (DevicePoll::Denied, true)
        } else if expires_at <= millis(now) {
            (DevicePoll::Expired, true)
        } else if let Some(user) = user {
            let (user, kind) = (parsed(&user)?, TokenKind::Login);
            let token = tokens::insert(&mut transaction, user, token_name, kind, Some(token_end)).await?;
            (DevicePoll::Approved(token), true)
        } else if polled_at
            .is_some_and(|polled| millis(now) - polled < i64::try_from(interval.as_millis()).unwrap_or(0))
        {
            (DevicePoll::TooSoon, false)
        } else {
            (DevicePoll::Pending, false)
        };
        if used_up {
            sqlx::query("DELETE FROM device_logins WHERE device_hash = ?")
                .bind(&code)
                .execute(&mut *transaction)
                .await?;
        } else {
            sqlx::query("UPDATE device_logins SET polled_at = ? WHERE device_hash = ?")
                .bind(millis(now))
                .bind(&code)
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(poll)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::temporary, *};

    fn client(address: &str) -> LoginClient {
        let address = address.parse().expect("an address");
        LoginClient { name: "ada@laptop".to_owned(), address, network: address }
    }

    async fn poll(store: &Store, device_code: &str) -> DevicePoll {
        let (interval, end) = (SignedDuration::from_secs(5), Timestamp::now() + SignedDuration::from_hours(1));
        store.poll_device_login(device_code, interval, "loom login", end).await.expect("polled")
    }

    async fn token(store: &Store, user: UserId, kind: TokenKind) -> i64 {
        let token = store.add_user_token(user, "token", kind, None).await.expect("made");
        store.token(token.expose()).await.expect("read").expect("found").id
    }

    #[tokio::test]
    async fn a_token_that_signs_in_approves_one_login_and_a_revoked_one_none() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let soon = Timestamp::now() + SignedDuration::from_secs(60);
        let codes = ["A", "B", "C", "D"];
        for code in codes {
            store.add_device_login(code, code, &client("192.0.2.7"), soon).await.expect("recorded");
        }
        let sign_in = token(&store, user, TokenKind::SignIn).await;
        // All of them have seen that the token is good.
        let decide = |code| store.decide_device_login(code, user, sign_in, Approval::Approve);
        let decisions = futures_util::future::join_all(codes.map(decide)).await;
        let made = decisions.iter().filter(|decision| matches!(decision, Ok(Decision::Made))).count();
        assert_eq!(made, 1, "{decisions:?}");

        let revoked = token(&store, user, TokenKind::Login).await;
        store.remove_token(user, revoked).await.expect("removed");
        let waiting = codes.into_iter().zip(&decisions).find(|(_, decision)| !matches!(decision, Ok(Decision::Made)));
        let decision = store.decide_device_login(waiting.expect("three").0, user, revoked, Approval::Approve).await;
        assert_eq!(decision.expect("answered"), Decision::NoToken);
    }

    #[tokio::test]
    async fn a_device_login_is_approved_once_and_used_once() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let (soon, login) =
            (Timestamp::now() + SignedDuration::from_secs(60), token(&store, user, TokenKind::Login).await);
        store.add_device_login("device", "USER", &client("192.0.2.7"), soon).await.expect("recorded");
        assert!(matches!(poll(&store, "device").await, DevicePoll::Pending));
        assert!(matches!(poll(&store, "device").await, DevicePoll::TooSoon));
        let pending = store.pending_device_login("USER").await.expect("found").expect("pending");
        assert_eq!((pending.client_name.as_str(), pending.client_address.as_str()), ("ada@laptop", "192.0.2.7"));
        let decide = |approval| store.decide_device_login("USER", user, login, approval);
        assert_eq!(decide(Approval::Approve).await.expect("answered"), Decision::Made);
        assert_eq!(decide(Approval::Deny).await.expect("answered"), Decision::NoLogin, "too late");
        let DevicePoll::Approved(made) = poll(&store, "device").await else { panic!("approved") };
        let made = store.token(made.expose()).await.expect("read").expect("found");
        assert!(made.kind == Some(TokenKind::Login) && made.expires_at.is_some());
        assert!(matches!(poll(&store, "device").await, DevicePoll::Expired));
    }

    #[tokio::test]
    async fn whoever_has_many_networks_keeps_nobody_out() {
        let (_directory, store) = temporary().await;
        let soon = Timestamp::now() + SignedDuration::from_secs(60);
        store.add_device_login("honest", "HONEST", &client("192.0.2.7"), soon).await.expect("recorded");
        // As two hundred networks would leave it.
        sqlx::query(
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?) \
             INSERT INTO device_logins (device_hash, user_hash, client_name, client_address, client_network, created_at, \
             expires_at) SELECT 'd' || n, 'u' || n, '', '', '10.0.0.' || (n % 200), 0, ? FROM numbers",
        )
        .bind(MAX_LOGINS - 1)
        .bind(millis(soon))
        .execute(store.writer())
        .await
        .expect("filled");
        store.add_device_login("late", "LATE", &client("198.51.100.9"), soon).await.expect("recorded");
        for code in ["HONEST", "LATE"] {
            assert!(store.pending_device_login(code).await.expect("read").is_some(), "{code}");
        }
        let count: i64 =
            sqlx::query_scalar("SELECT COUNT(*) FROM device_logins").fetch_one(store.reader()).await.expect("counted");
        assert_eq!(count, MAX_LOGINS);
    }

    #[tokio::test]
    async fn logins_that_wait_are_few_and_expired_ones_make_room() {
        let (_directory, store) = temporary().await;
        let at = |seconds| Timestamp::now() + SignedDuration::from_secs(seconds);
        let add = async |number: i64, address: &str, until: Timestamp| {
            store
                .add_device_login(&format!("device {number}"), &format!("user {number}"), &client(address), until)
                .await
        };
        for number in 0..MAX_LOGINS_OF_NETWORK {
            add(number, "192.0.2.7", if number == 0 { at(-1) } else { at(60) }).await.expect("room");
        }
        add(100, "192.0.2.7", at(60)).await.expect("the expired one made room");
        assert!(matches!(add(101, "192.0.2.7", at(60)).await, Err(DeviceLoginError::TooMany)));
        add(102, "192.0.2.8", at(60)).await.expect("another network is not concerned");
    }

    #[tokio::test]
    async fn what_has_expired_is_found_by_an_index() {
        let (_directory, store) = temporary().await;
        for (statement, index) in [
            ("DELETE FROM device_logins WHERE expires_at <= 1", "device_logins_by_expiry"),
            ("SELECT COUNT(*) FROM device_logins WHERE client_network = ''", "device_logins_by_network"),
        ] {
            let plan: Vec<(i64, i64, i64, String)> =
                sqlx::query_as(sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}")))
                    .fetch_all(store.writer())
                    .await
                    .expect("a plan");
            assert!(plan.iter().any(|(.., step)| step.contains(index)), "{plan:?}");
        }
    }
}
