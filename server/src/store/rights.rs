//! Who has which rights, and what remains of rights that are gone.

use loom_api::{OrgId, UserId, WeaverId, WireGuardKey};
use sqlx::{Sqlite, Transaction};

use super::{Store, parsed};
use crate::sessions::Rights;

/// A grant whose token, user or membership is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct LostGrant {
    pub user: UserId,
    pub weaver: WeaverId,
    pub device: WireGuardKey,
}

impl Store {
    /// All rights, at one moment.
    pub async fn rights(&self) -> sqlx::Result<Rights> {
        // One transaction reads one state of the database.
        let mut transaction = self.reader().begin().await?;
        let revision = sqlx::query_scalar("SELECT number FROM identity_revision").fetch_one(&mut *transaction).await?;
        let tokens: Vec<i64> = sqlx::query_scalar("SELECT id FROM tokens").fetch_all(&mut *transaction).await?;
        let suspended: Vec<String> = sqlx::query_scalar("SELECT id FROM users WHERE suspended_at IS NOT NULL")
            .fetch_all(&mut *transaction)
            .await?;
        let memberships: Vec<(String, String)> =
            sqlx::query_as("SELECT user_id, org_id FROM memberships").fetch_all(&mut *transaction).await?;
        let memberships = memberships.iter().map(|(user, org)| Ok((parsed(user)?, parsed(org)?)));
        Ok(Rights {
            revision,
            tokens: tokens.into_iter().collect(),
            suspended: suspended.iter().map(|user| parsed(user)).collect::<sqlx::Result<_>>()?,
            memberships: memberships.collect::<sqlx::Result<_>>()?,
        })
    }

    /// The grants that nothing entitles to any more.
    pub async fn lost_grants(&self) -> sqlx::Result<Vec<LostGrant>> {
        let rows: Vec<(String, String, String)> = sqlx::query_as(
            "SELECT d.user_id, g.weaver_id, g.public_key FROM grants g \
             JOIN devices d ON d.public_key = g.public_key JOIN weavers w ON w.id = g.weaver_id \
             WHERE NOT EXISTS (SELECT 1 FROM tokens t JOIN users u ON u.id = t.user_id \
             JOIN memberships m ON m.user_id = u.id AND m.org_id = w.org_id \
             WHERE t.id = g.token_id AND u.suspended_at IS NULL)",
        )
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(user, weaver, device)| {
                Ok(LostGrant { user: parsed(&user)?, weaver: parsed(&weaver)?, device: parsed(&device)? })
            })
            .collect()
    }

    /// The devices of removed users.
    pub async fn orphaned_devices(&self) -> sqlx::Result<Vec<(UserId, WireGuardKey)>> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT d.user_id, d.public_key FROM devices d JOIN users u ON u.id = d.user_id \
             WHERE u.removed_at IS NOT NULL",
        )
        .fetch_all(self.reader())
        .await?;
        rows.iter().map(|(user, device)| Ok((parsed(user)?, parsed(device)?))).collect()
    }

    /// The weavers in personal organisations of removed users that have not ended.
    pub async fn orphaned_weavers(&self) -> sqlx::Result<Vec<WeaverId>> {
        let ids: Vec<String> = sqlx::query_scalar(
            "SELECT w.id FROM weavers w JOIN organisations o ON o.id = w.org_id JOIN users u ON u.id = o.owner_id \
             WHERE u.removed_at IS NOT NULL AND w.ended_at IS NULL",
        )
        .fetch_all(self.reader())
        .await?;
        ids.iter().map(|id| parsed(id)).collect()
    }
}

/// Whether a token entitles to the weavers of an organisation now. Asked inside the transaction that relies on it, so
/// that nothing is revoked in between.
pub(super) async fn entitles(transaction: &mut Transaction<'_, Sqlite>, token: i64, org: OrgId) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM tokens t JOIN users u ON u.id = t.user_id \
         JOIN memberships m ON m.user_id = u.id AND m.org_id = ? WHERE t.id = ? AND u.suspended_at IS NULL)",
    )
    .bind(org.to_string())
    .bind(token)
    .fetch_one(&mut **transaction)
    .await
}

#[cfg(test)]
mod tests {
    use loom_api::login::TokenKind;

    use super::{super::tests::temporary, *};

    #[tokio::test]
    async fn a_token_entitles_only_while_it_its_user_and_the_membership_are_there() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let org = store.add_org("engines").await.expect("made");
        let secret = store.add_user_token(user, "ci", TokenKind::Api, None).await.expect("made");
        let token = store.token(secret.expose()).await.expect("looked up").expect("found").id;
        let entitled = async || {
            let mut transaction = store.begin_write().await.expect("begun");
            entitles(&mut transaction, token, org).await.expect("asked")
        };
        assert!(!entitled().await, "not a member yet");
        store.add_member("engines", "ada").await.expect("added");
        assert!(entitled().await);
        store.suspend_user("ada").await.expect("suspended");
        assert!(!entitled().await);
        assert!(store.rights().await.expect("read").suspended.contains(&user));
        store.resume_user("ada").await.expect("resumed");
        assert!(entitled().await);
        assert!(store.rights().await.expect("read").memberships.contains(&(user, org)));
        let before = store.identity_revision().await.expect("read");
        store.remove_member("engines", "ada").await.expect("removed");
        assert!(!entitled().await);
        assert!(store.identity_revision().await.expect("read") > before, "a running server notices");
    }
}
