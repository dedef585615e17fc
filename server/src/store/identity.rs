//! Users, organisations and device logins.

use anyhow::{Context as _, Result, bail, ensure};
use jiff::{SignedDuration, Timestamp};
use loom_api::{OrgId, Secret, UserId, login::TokenKind};
use sqlx::{Sqlite, Transaction};

use super::{
    Store, millis, parsed, timestamp,
    tokens::{self, advance_revision},
};
use crate::secrets::hash;

/// A user as operators see it.
#[derive(Debug)]
pub struct UserRecord {
    /// The name.
    pub name: String,
    /// When it was added.
    pub created_at: Timestamp,
    /// Since when it has no rights, if it is suspended.
    pub suspended_at: Option<Timestamp>,
}

/// An organisation as operators see it.
#[derive(Debug)]
pub struct OrgRecord {
    /// The name.
    pub name: String,
    /// Whether it is one user's own.
    pub personal: bool,
    /// The members' names.
    pub members: Vec<String>,
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
    /// Makes a user with a personal organisation. A name is given once: a removed user's is not free again, so that
    /// nobody is taken for who had it before.
    pub async fn add_user(&self, name: &str) -> Result<UserId> {
        let mut transaction = self.begin_write().await?;
        let user = insert_user(&mut transaction, name).await?;
        transaction.commit().await?;
        Ok(user)
    }

    /// Makes a user with a sign-in token. Neither is made unless `keep`, which gets the token, succeeds.
    pub async fn add_user_with_token(
        &self,
        name: &str,
        token_name: &str,
        keep: impl FnOnce(&Secret) -> Result<()> + Send,
    ) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let user = insert_user(&mut transaction, name).await?;
        let token = tokens::insert(&mut transaction, user, token_name, TokenKind::SignIn, None).await?;
        keep(&token)?;
        Ok(transaction.commit().await?)
    }

    /// Whether there is any user yet.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn has_users(&self) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM users)").fetch_one(self.reader()).await
    }

    /// The id of the user with a name.
    pub async fn user_named(&self, name: &str) -> Result<UserId> {
        let mut transaction = self.reader().begin().await?;
        Ok(parsed(&user_id(&mut transaction, name).await?)?)
    }

    /// All users but removed ones.
    pub async fn users(&self) -> sqlx::Result<Vec<UserRecord>> {
        let rows: Vec<(String, i64, Option<i64>)> =
            sqlx::query_as("SELECT name, created_at, suspended_at FROM users WHERE removed_at IS NULL ORDER BY name")
                .fetch_all(self.reader())
                .await?;
        rows.into_iter()
            .map(|(name, created_at, suspended_at)| {
                let suspended_at = suspended_at.map(timestamp).transpose()?;
                Ok(UserRecord { name, created_at: timestamp(created_at)?, suspended_at })
            })
            .collect()
    }

    /// Takes all rights of a user's away until [`Self::resume_user`] gives them back.
    pub async fn suspend_user(&self, name: &str) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let user = user_id(&mut transaction, name).await?;
        sqlx::query("UPDATE users SET suspended_at = COALESCE(suspended_at, ?) WHERE id = ?")
            .bind(millis(Timestamp::now()))
            .bind(&user)
            .execute(&mut *transaction)
            .await?;
        advance_revision(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// Gives a suspended user's rights back.
    pub async fn resume_user(&self, name: &str) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let user = user_id(&mut transaction, name).await?;
        sqlx::query("UPDATE users SET suspended_at = NULL WHERE id = ?").bind(user).execute(&mut *transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// Removes a user with its tokens and memberships for good. Its row stays for what names it; the server takes the
    /// grants of its devices back and ends the weavers in its personal organisation.
    pub async fn remove_user(&self, name: &str) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let user = user_id(&mut transaction, name).await?;
        let now = millis(Timestamp::now());
        sqlx::query("UPDATE users SET removed_at = ?, suspended_at = COALESCE(suspended_at, ?) WHERE id = ?")
            .bind(now)
            .bind(now)
            .bind(&user)
            .execute(&mut *transaction)
            .await?;
        for statement in [
            "DELETE FROM tokens WHERE user_id = ?",
            "DELETE FROM memberships WHERE user_id = ?",
            // An approved login that was not fetched yet would become a token.
            "DELETE FROM device_logins WHERE user_id = ?",
        ] {
            sqlx::query(statement).bind(&user).execute(&mut *transaction).await?;
        }
        advance_revision(&mut transaction).await?;
        Ok(transaction.commit().await?)
    }

    /// Makes an organisation without members.
    pub async fn add_org(&self, name: &str) -> Result<OrgId> {
        let org = OrgId::generate();
        let done = sqlx::query(
            "INSERT INTO organisations (id, name, created_at) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
        )
        .bind(org.to_string())
        .bind(name)
        .bind(millis(Timestamp::now()))
        .execute(self.writer())
        .await?;
        ensure!(done.rows_affected() == 1, "an organisation is called {name} already");
        Ok(org)
    }

    /// Every organisation's name with its members' names, but for those of removed users.
    pub async fn orgs(&self) -> sqlx::Result<Vec<OrgRecord>> {
        let rows: Vec<(String, bool, Option<String>)> = sqlx::query_as(
            "SELECT o.name, o.owner_id IS NOT NULL, u.name FROM organisations o \
             LEFT JOIN memberships m ON m.org_id = o.id LEFT JOIN users u ON u.id = m.user_id \
             WHERE o.owner_id IS NULL OR u.id IS NOT NULL ORDER BY o.name, u.name",
        )
        .fetch_all(self.reader())
        .await?;
        let mut orgs: Vec<OrgRecord> = Vec::new();
        for (name, personal, member) in rows {
            if orgs.last().is_none_or(|last| last.name != name) {
                orgs.push(OrgRecord { name, personal, members: Vec::new() });
            }
            if let Some(last) = orgs.last_mut() {
                last.members.extend(member);
            }
        }
        Ok(orgs)
    }

    /// Makes a user a member of a shared organisation.
    pub async fn add_member(&self, org: &str, user: &str) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let (org, user) = (shared_org_id(&mut transaction, org).await?, user_id(&mut transaction, user).await?);
        sqlx::query("INSERT INTO memberships (org_id, user_id) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(org)
            .bind(user)
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    /// Ends a membership of a shared organisation.
    pub async fn remove_member(&self, org: &str, user: &str) -> Result<()> {
        let mut transaction = self.begin_write().await?;
        let ids = (shared_org_id(&mut transaction, org).await?, user_id(&mut transaction, user).await?);
        let done = sqlx::query("DELETE FROM memberships WHERE org_id = ? AND user_id = ?")
            .bind(ids.0)
            .bind(ids.1)
            .execute(&mut *transaction)
            .await?;
        ensure!(done.rows_affected() == 1, "{user} is not a member of {org}");
        advance_revision(&mut transaction).await?;
        Ok(transaction.commit().await?)
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

async fn insert_user(transaction: &mut Transaction<'_, Sqlite>, name: &str) -> Result<UserId> {
    let (user, org, now) = (UserId::generate(), OrgId::generate(), millis(Timestamp::now()));
    let added = sqlx::query("INSERT INTO users (id, name, created_at) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING")
        .bind(user.to_string())
        .bind(name)
        .bind(now)
        .execute(&mut **transaction)
        .await?;
    if added.rows_affected() == 0 {
        bail!("there is, or was, a user {name}: names are not given twice");
    }
    sqlx::query("INSERT INTO organisations (id, name, owner_id, created_at) VALUES (?, ?, ?, ?)")
        .bind(org.to_string())
        .bind(name)
        .bind(user.to_string())
        .bind(now)
        .execute(&mut **transaction)
        .await
        .with_context(|| format!("an organisation is called {name} already"))?;
    sqlx::query("INSERT INTO memberships (org_id, user_id) VALUES (?, ?)")
        .bind(org.to_string())
        .bind(user.to_string())
        .execute(&mut **transaction)
        .await?;
    Ok(user)
}

/// The id of the user with a name, as the database keeps it.
async fn user_id(transaction: &mut Transaction<'_, Sqlite>, name: &str) -> Result<String> {
    sqlx::query_scalar("SELECT id FROM users WHERE name = ? AND removed_at IS NULL")
        .bind(name)
        .fetch_optional(&mut **transaction)
        .await?
        .with_context(|| format!("there is no user {name}; see: loom-server user list"))
}

/// The id of the organisation with a name, which must not be one user's own.
async fn shared_org_id(transaction: &mut Transaction<'_, Sqlite>, name: &str) -> Result<String> {
    let row: Option<(String, bool)> =
        sqlx::query_as("SELECT id, owner_id IS NOT NULL FROM organisations WHERE name = ?")
            .bind(name)
            .fetch_optional(&mut **transaction)
            .await?;
    let (id, personal) =
        row.with_context(|| format!("there is no organisation {name}; make it with: loom-server org create {name}"))?;
    ensure!(!personal, "{name} is a user's own organisation; its only member is that user");
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::{super::tests::temporary, *};

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
