//! Users, organisations, tokens and device logins.

use anyhow::{Context as _, Result, bail};
use jiff::{SignedDuration, Timestamp};
use loom_api::{
    OrgId, Secret, UserId, WeaverId,
    login::{Organisation, TokenInfo, User},
};

use super::{Store, millis, parsed, timestamp};
use crate::secrets::{hash, new_token};

/// Whose a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenOwner {
    /// A user's, with its organisations.
    User(User, Vec<Organisation>),
    /// An agent's, for one weaver.
    Agent(WeaverId),
}

/// A good token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its number.
    pub id: i64,
    /// Whose it is.
    pub owner: TokenOwner,
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
    /// The user said yes; the login is used up.
    Approved(UserId),
}

/// What a user says to a device login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approval {
    /// Let it in.
    Approve,
    /// Do not.
    Deny,
}

impl Store {
    /// Makes a user with a personal organisation.
    ///
    /// # Errors
    ///
    /// When the name is taken, or is not a DNS label.
    pub async fn add_user(&self, name: &str) -> Result<UserId> {
        let (user, org, now) = (UserId::generate(), OrgId::generate(), millis(Timestamp::now()));
        let mut transaction = self.begin_write().await?;
        let added =
            sqlx::query("INSERT INTO users (id, name, created_at) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING")
                .bind(user.to_string())
                .bind(name)
                .bind(now)
                .execute(&mut *transaction)
                .await?;
        if added.rows_affected() == 0 {
            bail!("there is a user {name} already");
        }
        sqlx::query("INSERT INTO organisations (id, name, owner_id, created_at) VALUES (?, ?, ?, ?)")
            .bind(org.to_string())
            .bind(name)
            .bind(user.to_string())
            .bind(now)
            .execute(&mut *transaction)
            .await
            .with_context(|| format!("making the organisation {name}"))?;
        sqlx::query("INSERT INTO memberships (org_id, user_id) VALUES (?, ?)")
            .bind(org.to_string())
            .bind(user.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(user)
    }

    /// Whether there is any user yet.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn has_users(&self) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users)").fetch_one(self.reader()).await
    }

    /// Makes a token of a user's.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn add_user_token(
        &self,
        user: UserId,
        name: &str,
        expires_at: Option<Timestamp>,
    ) -> sqlx::Result<Secret> {
        let token = new_token();
        sqlx::query("INSERT INTO tokens (hash, name, user_id, created_at, expires_at) VALUES (?, ?, ?, ?, ?)")
            .bind(hash(token.expose()))
            .bind(name)
            .bind(user.to_string())
            .bind(millis(Timestamp::now()))
            .bind(expires_at.map(millis))
            .execute(self.writer())
            .await?;
        Ok(token)
    }

    /// Makes the token of a weaver's agent; the one it had before ends.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn replace_agent_token(&self, weaver: WeaverId) -> sqlx::Result<Secret> {
        let token = new_token();
        let mut transaction = self.begin_write().await?;
        sqlx::query("DELETE FROM tokens WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .execute(&mut *transaction)
            .await?;
        sqlx::query("INSERT INTO tokens (hash, name, weaver_id, created_at) VALUES (?, 'agent', ?, ?)")
            .bind(hash(token.expose()))
            .bind(weaver.to_string())
            .bind(millis(Timestamp::now()))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(token)
    }

    /// Whose a bearer token is. It is looked up by its hash, so the comparison tells nothing about the token.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn token(&self, token: &str) -> sqlx::Result<Option<Token>> {
        let row: Option<(i64, Option<String>, Option<String>)> = sqlx::query_as(
            "SELECT id, user_id, weaver_id FROM tokens WHERE hash = ? AND (expires_at IS NULL OR expires_at > ?)",
        )
        .bind(hash(token))
        .bind(millis(Timestamp::now()))
        .fetch_optional(self.reader())
        .await?;
        Ok(match row {
            Some((id, Some(user), _)) => {
                let user = self.user(parsed(&user)?).await?;
                let organisations = self.organisations(user.id).await?;
                Some(Token { id, owner: TokenOwner::User(user, organisations) })
            }
            Some((id, None, Some(weaver))) => Some(Token { id, owner: TokenOwner::Agent(parsed(&weaver)?) }),
            _ => None,
        })
    }

    /// The tokens of a user, newest first.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn tokens(&self, user: UserId) -> sqlx::Result<Vec<TokenInfo>> {
        let rows: Vec<(i64, String, i64, Option<i64>)> = sqlx::query_as(
            "SELECT id, name, created_at, expires_at FROM tokens WHERE user_id = ? ORDER BY id DESC LIMIT 1000",
        )
        .bind(user.to_string())
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(id, name, created_at, expires_at)| {
                let expires_at = expires_at.map(timestamp).transpose()?;
                Ok(TokenInfo { id, name, created_at: timestamp(created_at)?, expires_at })
            })
            .collect()
    }

    /// Ends a token of a user's; whether there was one.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn remove_token(&self, user: UserId, id: i64) -> sqlx::Result<bool> {
        let done = sqlx::query("DELETE FROM tokens WHERE id = ? AND user_id = ?")
            .bind(id)
            .bind(user.to_string())
            .execute(self.writer())
            .await?;
        Ok(done.rows_affected() > 0)
    }

    /// A user by its id.
    ///
    /// # Errors
    ///
    /// The database's; also when there is no such user.
    pub async fn user(&self, id: UserId) -> sqlx::Result<User> {
        let name = sqlx::query_scalar("SELECT name FROM users WHERE id = ?")
            .bind(id.to_string())
            .fetch_one(self.reader())
            .await?;
        Ok(User { id, name })
    }

    pub(super) async fn organisations(&self, user: UserId) -> sqlx::Result<Vec<Organisation>> {
        let rows: Vec<(String, String, Option<String>)> = sqlx::query_as(
            "SELECT o.id, o.name, o.owner_id FROM organisations o JOIN memberships m ON m.org_id = o.id \
             WHERE m.user_id = ? ORDER BY o.owner_id IS NULL, o.name",
        )
        .bind(user.to_string())
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(id, name, owner)| {
                Ok(Organisation { id: parsed(&id)?, name, personal: owner == Some(user.to_string()) })
            })
            .collect()
    }

    /// Records a device login.
    ///
    /// # Errors
    ///
    /// The database's; also when the user code is in use.
    pub async fn add_device_login(
        &self,
        device_code: &str,
        user_code: &str,
        client: &str,
        until: Timestamp,
    ) -> sqlx::Result<()> {
        let mut transaction = self.begin_write().await?;
        // The table holds only what can still be used, so that it never grows.
        sqlx::query("DELETE FROM device_logins WHERE expires_at <= ?")
            .bind(millis(Timestamp::now()))
            .execute(&mut *transaction)
            .await?;
        sqlx::query("INSERT INTO device_logins (device_hash, user_hash, client_name, expires_at) VALUES (?, ?, ?, ?)")
            .bind(hash(device_code))
            .bind(hash(user_code))
            .bind(client)
            .bind(millis(until))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await
    }

    /// Where the login with a user code comes from, if it can still be decided.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn pending_device_login(&self, user_code: &str) -> sqlx::Result<Option<String>> {
        sqlx::query_scalar(
            "SELECT client_name FROM device_logins \
             WHERE user_hash = ? AND expires_at > ? AND denied = 0 AND user_id IS NULL",
        )
        .bind(hash(user_code))
        .bind(millis(Timestamp::now()))
        .fetch_optional(self.reader())
        .await
    }

    /// Decides a device login; whether it could still be decided.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn decide_device_login(&self, user_code: &str, user: UserId, approval: Approval) -> sqlx::Result<bool> {
        let done = sqlx::query(
            "UPDATE device_logins SET denied = ?, user_id = ? \
             WHERE user_hash = ? AND expires_at > ? AND denied = 0 AND user_id IS NULL",
        )
        .bind(i64::from(approval == Approval::Deny))
        .bind((approval == Approval::Approve).then(|| user.to_string()))
        .bind(hash(user_code))
        .bind(millis(Timestamp::now()))
        .execute(self.writer())
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Looks at a device login on behalf of its device (RFC 8628 §3.5). An approved one is used up by this.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn poll_device_login(&self, device_code: &str, interval: SignedDuration) -> sqlx::Result<DevicePoll> {
        let now = Timestamp::now();
        let code = hash(device_code);
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
            (DevicePoll::Approved(parsed(&user)?), true)
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

    #[tokio::test]
    async fn a_token_works_until_it_is_removed_or_has_ended() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        assert!(store.add_user("ada").await.is_err(), "names are unique");
        let token = store.add_user_token(user, "ci", None).await.expect("made");
        let found = store.token(token.expose()).await.expect("looked up").expect("found");
        let TokenOwner::User(found_user, organisations) = found.owner else { panic!("a user's") };
        assert_eq!((found_user.id, organisations.len(), organisations[0].personal), (user, 1, true));
        assert_eq!(store.token("loom_wrong").await.expect("looked up"), None);
        assert!(store.remove_token(user, found.id).await.expect("removed"));
        assert_eq!(store.token(token.expose()).await.expect("looked up"), None);

        let past = Timestamp::now() - SignedDuration::from_secs(1);
        let ended = store.add_user_token(user, "old", Some(past)).await.expect("made");
        assert_eq!(store.token(ended.expose()).await.expect("looked up"), None);
    }

    #[tokio::test]
    async fn a_device_login_is_approved_once_and_used_once() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let (interval, soon) = (SignedDuration::from_secs(5), Timestamp::now() + SignedDuration::from_secs(60));
        store.add_device_login("device", "USER", "ada@laptop", soon).await.expect("recorded");
        assert!(matches!(store.poll_device_login("device", interval).await, Ok(DevicePoll::Pending)));
        assert!(matches!(store.poll_device_login("device", interval).await, Ok(DevicePoll::TooSoon)));
        assert_eq!(store.pending_device_login("USER").await.expect("found").as_deref(), Some("ada@laptop"));
        assert!(store.decide_device_login("USER", user, Approval::Approve).await.expect("decided"));
        assert!(!store.decide_device_login("USER", user, Approval::Deny).await.expect("too late"));
        assert!(
            matches!(store.poll_device_login("device", interval).await, Ok(DevicePoll::Approved(id)) if id == user)
        );
        assert!(matches!(store.poll_device_login("device", interval).await, Ok(DevicePoll::Expired)));
    }
}
