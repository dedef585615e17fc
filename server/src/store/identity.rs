//! Users and organisations.

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use loom_api::{OrgId, Secret, UserId, login::TokenKind};
use sqlx::{Sqlite, Transaction};

use super::{
    Store, millis, parsed, timestamp,
    tokens::{self, advance_revision},
};

/// A user as operators see it.
#[derive(Debug)]
pub struct UserRecord {
    pub name: String,
    pub created_at: Timestamp,
    /// Since when it has no rights, if it is suspended.
    pub suspended_at: Option<Timestamp>,
}

/// An organisation as operators see it.
#[derive(Debug)]
pub struct OrgRecord {
    pub name: String,
    /// Whether it is one user's own.
    pub personal: bool,
    pub members: Vec<String>,
}

impl Store {
    /// Makes a user with a personal organisation.
    #[cfg(test)]
    pub async fn add_user(&self, name: &str) -> Result<UserId> {
        let mut transaction = self.begin_write().await?;
        let user = insert_user(&mut transaction, name).await?;
        transaction.commit().await?;
        Ok(user)
    }

    /// Makes a user with a personal organisation and a sign-in token. A name is given once: a removed user's is not free
    /// again, so that nobody is taken for who had it before. Nothing is made unless `keep`, which gets the token, succeeds.
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
        ensure!(done.rows_affected() == 1, "there is, or was, an organisation {name}: names are not given twice");
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
    let made = sqlx::query(
        "INSERT INTO organisations (id, name, owner_id, created_at) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO NOTHING",
    )
    .bind(org.to_string())
    .bind(name)
    .bind(user.to_string())
    .bind(now)
    .execute(&mut **transaction)
    .await?;
    ensure!(
        made.rows_affected() == 1,
        "an organisation is called {name} already, and a user's own has the user's name"
    );
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
