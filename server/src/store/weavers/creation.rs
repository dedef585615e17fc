//! Adding a weaver, within the limits and once for each idempotency key.

use std::net::Ipv6Addr;

use loom_api::{UserId, WeaverId};
use sqlx::{Sqlite, Transaction};

use super::{
    super::{Store, events::insert_event, millis, parsed},
    row::read,
};
use crate::weaver::{Event, NewWeaver, Weaver};

/// The part of the deployment's prefix that weavers live in.
const WEAVER_SUBNET: u16 = 0xa;

/// What became of a request for a weaver.
#[derive(Debug)]
pub enum Added {
    New(Weaver),
    /// An earlier request with the same idempotency key made it.
    Earlier(Weaver),
    /// The idempotency key came with another request before.
    KeyUsed,
    NameTaken,
    DiskFull,
    /// As many as the limits allow have not ended.
    TooMany(Limit),
}

/// How many weavers may live at a time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub of_organisation: u32,
    pub of_user: u32,
}

/// The limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    Organisation,
    User,
}

/// The key that a client sends with a request that it may repeat, and the request's fingerprint.
#[derive(Debug, Clone, Copy)]
pub struct Idempotency<'a> {
    pub key: &'a str,
    pub body_hash: &'a str,
}

impl Store {
    /// The address inside the tunnel that a new weaver is to have.
    pub fn weaver_address(&self, id: WeaverId) -> Ipv6Addr {
        self.address(WEAVER_SUBNET, id.uuid().as_bytes())
    }

    /// Records a weaver, unless the name, the limits, the idempotency key or a full disk are against it. All of it is
    /// looked at in the transaction that writes, so requests at the same time cannot get past it.
    pub async fn add_weaver(
        &self,
        NewWeaver { weaver, sealed_env }: &NewWeaver,
        idempotency: Option<Idempotency<'_>>,
        limits: Limits,
        created: &Event,
    ) -> sqlx::Result<Added> {
        let mut transaction = self.begin_write().await?;
        if let Some(idempotency) = idempotency
            && let Some(earlier) = earlier(&mut transaction, weaver.owner_id, idempotency).await?
        {
            return Ok(earlier);
        }
        if self.is_low_on_space() {
            return Ok(Added::DiskFull);
        }
        if let Some(limit) = reached(&mut transaction, weaver, limits).await? {
            return Ok(Added::TooMany(limit));
        }
        match insert(&mut transaction, weaver, sealed_env).await {
            Err(error) if error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation) => {
                return Ok(Added::NameTaken);
            }
            inserted => inserted?,
        }
        if let Some(Idempotency { key, body_hash }) = idempotency {
            sqlx::query(
                "INSERT INTO idempotency_keys (user_id, key, body_hash, weaver_id, created_at) VALUES (?, ?, ?, ?, ?)",
            )
            .bind(weaver.owner_id.to_string())
            .bind(key)
            .bind(body_hash)
            .bind(weaver.id.to_string())
            .bind(millis(weaver.created_at))
            .execute(&mut *transaction)
            .await?;
        }
        insert_event(&mut transaction, weaver.id, created).await?;
        let weaver = read(&mut transaction, weaver.id).await?.ok_or(sqlx::Error::RowNotFound)?;
        transaction.commit().await?;
        Ok(Added::New(weaver))
    }
}

async fn insert(transaction: &mut Transaction<'_, Sqlite>, weaver: &Weaver, sealed_env: &[u8]) -> sqlx::Result<()> {
    sqlx::query(
        "INSERT INTO weavers (id, name, org_id, owner_id, image, repo, branch, command, cpu_millicores, memory_mb, \
         created_at, expires_at, status, address) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(weaver.id.to_string())
    .bind(&weaver.name)
    .bind(weaver.org_id.to_string())
    .bind(weaver.owner_id.to_string())
    .bind(&weaver.image)
    .bind(&weaver.repo)
    .bind(&weaver.branch)
    .bind(weaver.command.as_ref().map(|command| serde_json::json!(command).to_string()))
    .bind(i64::from(weaver.resources.cpu_millicores))
    .bind(i64::from(weaver.resources.memory_mb))
    .bind(millis(weaver.created_at))
    .bind(millis(weaver.expires_at))
    .bind(weaver.life.status().to_string())
    .bind(weaver.address.to_string())
    .execute(&mut **transaction)
    .await?;
    sqlx::query("INSERT INTO environments (weaver_id, sealed) VALUES (?, ?)")
        .bind(weaver.id.to_string())
        .bind(sealed_env)
        .execute(&mut **transaction)
        .await
        .map(drop)
}

/// What an earlier request with the same key came to.
async fn earlier(
    transaction: &mut Transaction<'_, Sqlite>,
    user: UserId,
    Idempotency { key, body_hash }: Idempotency<'_>,
) -> sqlx::Result<Option<Added>> {
    let row: Option<(String, String)> =
        sqlx::query_as("SELECT weaver_id, body_hash FROM idempotency_keys WHERE user_id = ? AND key = ?")
            .bind(user.to_string())
            .bind(key)
            .fetch_optional(&mut **transaction)
            .await?;
    Ok(match row {
        Some((id, hash)) if hash == body_hash => read(transaction, parsed(&id)?).await?.map(Added::Earlier),
        Some(_) => Some(Added::KeyUsed),
        None => None,
    })
}

async fn reached(
    transaction: &mut Transaction<'_, Sqlite>,
    new: &Weaver,
    limits: Limits,
) -> sqlx::Result<Option<Limit>> {
    let in_organisation: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM weavers WHERE org_id = ? AND ended_at IS NULL")
        .bind(new.org_id.to_string())
        .fetch_one(&mut **transaction)
        .await?;
    if in_organisation >= i64::from(limits.of_organisation) {
        return Ok(Some(Limit::Organisation));
    }
    let of_user: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM weavers WHERE owner_id = ? AND ended_at IS NULL")
        .bind(new.owner_id.to_string())
        .fetch_one(&mut **transaction)
        .await?;
    Ok((of_user >= i64::from(limits.of_user)).then_some(Limit::User))
}

#[cfg(test)]
pub(crate) mod tests {
    use loom_api::{OrgId, weaver::EventKind};

    use super::*;
    use crate::{store::tests::temporary, weaver::tests::pending};

    const LIMITS: Limits = Limits { of_organisation: 3, of_user: 100 };

    /// A new user with their organisation.
    pub(in crate::store) async fn user(store: &Store) -> (UserId, OrgId) {
        let user = store.add_user(&format!("u{}", UserId::generate().uuid().simple())).await.expect("added");
        (user, store.organisations(user).await.expect("listed")[0].id)
    }

    async fn add(store: &Store, (owner_id, org_id): (UserId, OrgId), name: Option<&str>, key: Option<&str>) -> Added {
        let id = WeaverId::generate();
        let weaver = Weaver {
            id,
            name: name.map(ToOwned::to_owned),
            org_id,
            owner_id,
            command: Some(vec!["sh".to_owned()]),
            address: store.weaver_address(id),
            ..pending()
        };
        let new = NewWeaver { weaver, sealed_env: vec![1, 2, 3] };
        let idempotency = key.map(|key| Idempotency { key, body_hash: "hash" });
        store.add_weaver(&new, idempotency, LIMITS, &Event::new(EventKind::Created, "made")).await.expect("answered")
    }

    /// A new weaver.
    pub(crate) async fn added(store: &Store, owner: (UserId, OrgId), name: Option<&str>) -> Weaver {
        match add(store, owner, name, None).await {
            Added::New(weaver) => weaver,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn limits_hold_for_requests_at_the_same_time() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let requests = (0..24).map(|_| add(&store, owner, None, None));
        let answers = futures_util::future::join_all(requests).await;
        let made = answers.iter().filter(|answer| matches!(answer, Added::New(_))).count();
        assert_eq!(made, 3);
        let refused = answers.iter().filter(|answer| matches!(answer, Added::TooMany(Limit::Organisation))).count();
        assert_eq!(refused, 21);
    }

    #[tokio::test]
    async fn an_idempotency_key_makes_one_weaver() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let answers =
            futures_util::future::join_all((0..8).map(|_| add(&store, owner, Some("once"), Some("key")))).await;
        let ids: std::collections::HashSet<_> = answers
            .iter()
            .map(|answer| match answer {
                Added::New(weaver) | Added::Earlier(weaver) => weaver.id,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ids.len(), 1);
        assert!(matches!(add(&store, owner, Some("once"), None).await, Added::NameTaken));
    }
}
