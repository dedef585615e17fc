//! WireGuard keys, devices, and which of them may reach which weaver until when.

use std::net::{Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use loom_api::{UserId, WeaverId, WireGuardKey};
use sqlx::{Sqlite, Transaction};

use super::{Store, millis, parsed, rights::entitles, timestamp, weavers};
use crate::weaver::Weaver;

/// The part of the deployment's prefix that devices live in.
const DEVICE_SUBNET: u16 = 0xd;
/// The most devices of one user: each command-line daemon is one, and those unused are forgotten.
const MAX_DEVICES: i64 = 1_000;
/// The most grants of one weaver, and of one user's devices together.
const MAX_GRANTS: i64 = 10_000;
/// How many grants are read at once.
pub const GRANT_PAGE: u32 = 256;

/// Why a device is not admitted, or an agent not registered.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("this WireGuard key belongs to somebody else")]
    Taken,
    #[error("nothing proves that this WireGuard key is yours")]
    Unproven,
    #[error("you have {MAX_DEVICES} devices, as many as a user may")]
    TooManyDevices,
    #[error("there are {MAX_GRANTS} admissions, as many as a weaver and a user may have")]
    TooManyGrants,
    #[error("the token is unknown, expired or revoked")]
    NotEntitled,
    /// The weaver has ended, or its agent has not registered yet.
    #[error("the weaver cannot be reached")]
    NotReachable(Option<Box<Weaver>>),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// A grant in force, with all that the agent needs but the pre-shared key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveGrant {
    pub weaver: WeaverId,
    pub device: WireGuardKey,
    /// The device's address inside the tunnel.
    pub address: Ipv6Addr,
    /// UDP addresses where the device can perhaps be reached.
    pub candidates: Vec<SocketAddr>,
    pub expires_at: Timestamp,
    /// The user's name.
    pub user: String,
}

/// Two keys that may talk through the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    pub agent: WireGuardKey,
    pub device: WireGuardKey,
    pub expires_at: Timestamp,
}

/// Whose a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyOwner {
    User(UserId),
    Weaver(WeaverId),
}

type GrantRow = (String, String, String, String, i64, String);

/// A macro, because statements are whole at compile time.
macro_rules! select_grants {
    ($rest:literal) => {
        concat!(
            "SELECT g.weaver_id, g.public_key, d.address, g.candidates, w.expires_at, u.name \
             FROM grants g JOIN devices d ON d.public_key = g.public_key JOIN users u ON u.id = d.user_id \
             JOIN weavers w ON w.id = g.weaver_id WHERE w.ended_at IS NULL AND w.expires_at > ? ",
            $rest
        )
    };
}

impl Store {
    /// Admits a user's device to a weaver until the weaver's end. The device is recorded when it is new, for which its
    /// key must be `proven` to be the user's; its address depends only on its key.
    pub async fn admit(
        &self,
        user: UserId,
        weaver: WeaverId,
        key: WireGuardKey,
        proven: bool,
        candidates: &[SocketAddr],
        token: i64,
    ) -> Result<(Weaver, Ipv6Addr), KeyError> {
        let candidates = serde_json::to_string(candidates).map_err(|error| sqlx::Error::Encode(error.into()))?;
        let now = millis(Timestamp::now());
        let mut transaction = self.begin_write().await?;
        let found = weavers::read(&mut transaction, weaver).await?;
        let found = match found {
            Some(weaver) if !weaver.has_ended() && weaver.agent.is_some() => weaver,
            found => return Err(KeyError::NotReachable(found.map(Box::new))),
        };
        if !entitles(&mut transaction, token, found.org_id).await? {
            return Err(KeyError::NotEntitled);
        }
        claim(&mut transaction, key, KeyOwner::User(user), proven).await?;
        let address = self.address(DEVICE_SUBNET, key.as_bytes());
        sqlx::query(
            "INSERT INTO devices (public_key, user_id, address, created_at, last_used_at) VALUES (?, ?, ?, ?, ?) \
             ON CONFLICT (public_key) DO UPDATE SET last_used_at = excluded.last_used_at",
        )
        .bind(key.to_string())
        .bind(user.to_string())
        .bind(address.to_string())
        .bind(now)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        sqlx::query(
            "INSERT INTO grants (weaver_id, public_key, candidates, token_id) VALUES (?, ?, ?, ?) \
             ON CONFLICT (weaver_id, public_key) DO UPDATE SET candidates = excluded.candidates, \
             token_id = excluded.token_id",
        )
        .bind(weaver.to_string())
        .bind(key.to_string())
        .bind(candidates)
        .bind(token)
        .execute(&mut *transaction)
        .await?;
        // Counted with the new ones; what is too much is rolled back.
        let devices: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM devices WHERE user_id = ?")
            .bind(user.to_string())
            .fetch_one(&mut *transaction)
            .await?;
        if devices > MAX_DEVICES {
            return Err(KeyError::TooManyDevices);
        }
        let of_weaver: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM grants WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .fetch_one(&mut *transaction)
            .await?;
        let of_user: i64 = sqlx::query_scalar(
            "SELECT COUNT(*) FROM grants g JOIN devices d ON d.public_key = g.public_key WHERE d.user_id = ?",
        )
        .bind(user.to_string())
        .fetch_one(&mut *transaction)
        .await?;
        if of_weaver.max(of_user) > MAX_GRANTS {
            return Err(KeyError::TooManyGrants);
        }
        transaction.commit().await?;
        Ok((found, address))
    }

    /// Records an agent that has proved itself and its key; the weaver as it is now, and the key that it had before.
    pub async fn register_agent(
        &self,
        weaver: WeaverId,
        version: &str,
        key: WireGuardKey,
    ) -> Result<(Weaver, Option<WireGuardKey>), KeyError> {
        let mut transaction = self.begin_write().await?;
        let Some(mut found) = weavers::read(&mut transaction, weaver).await? else {
            return Err(KeyError::NotReachable(None));
        };
        let before = found.agent.as_ref().map(|agent| agent.wireguard_key);
        if found.registered(version, key).is_err() {
            return Err(KeyError::NotReachable(Some(Box::new(found))));
        }
        sqlx::query("DELETE FROM wireguard_keys WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .execute(&mut *transaction)
            .await?;
        claim(&mut transaction, key, KeyOwner::Weaver(weaver), true).await?;
        weavers::write(&mut transaction, &found).await?;
        transaction.commit().await?;
        Ok((found, before.filter(|before| *before != key)))
    }

    /// Whose a key is, if it is anybody's.
    pub async fn key_owner(&self, key: WireGuardKey) -> sqlx::Result<Option<KeyOwner>> {
        let row: Option<(Option<String>, Option<String>)> =
            sqlx::query_as("SELECT user_id, weaver_id FROM wireguard_keys WHERE public_key = ?")
                .bind(key.to_string())
                .fetch_optional(self.reader())
                .await?;
        row.map(owner).transpose()
    }

    /// Forgets a device of a user's with all its grants; the weavers that it could reach.
    pub async fn remove_device(&self, user: UserId, key: WireGuardKey) -> sqlx::Result<Vec<WeaverId>> {
        let mut transaction = self.begin_write().await?;
        let weavers: Vec<String> = sqlx::query_scalar(
            "SELECT g.weaver_id FROM grants g JOIN devices d ON d.public_key = g.public_key WHERE d.public_key = ? AND d.user_id = ?",
        )
        .bind(key.to_string())
        .bind(user.to_string())
        .fetch_all(&mut *transaction)
        .await?;
        for statement in [
            "DELETE FROM devices WHERE public_key = ? AND user_id = ?",
            "DELETE FROM wireguard_keys WHERE public_key = ? AND user_id = ?",
        ] {
            sqlx::query(statement).bind(key.to_string()).bind(user.to_string()).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        weavers.iter().map(|id| parsed(id)).collect()
    }

    /// Forgets devices that have not been used since `time` and can reach no weaver, a thousand at most; those.
    pub async fn remove_unused_devices(&self, time: Timestamp) -> sqlx::Result<Vec<WireGuardKey>> {
        let mut transaction = self.begin_write().await?;
        let keys: Vec<String> = sqlx::query_scalar(
            "DELETE FROM devices WHERE public_key IN (SELECT public_key FROM devices d WHERE last_used_at < ? \
             AND NOT EXISTS (SELECT 1 FROM grants g WHERE g.public_key = d.public_key) LIMIT 1000) \
             RETURNING public_key",
        )
        .bind(millis(time))
        .fetch_all(&mut *transaction)
        .await?;
        for key in &keys {
            sqlx::query("DELETE FROM wireguard_keys WHERE public_key = ?").bind(key).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        keys.iter().map(|key| parsed(key)).collect()
    }

    /// The key of the agent of a weaver, also of one whose row cannot be read.
    pub async fn agent_key(&self, weaver: WeaverId) -> sqlx::Result<Option<WireGuardKey>> {
        let key: Option<Option<String>> = sqlx::query_scalar("SELECT wireguard_key FROM weavers WHERE id = ?")
            .bind(weaver.to_string())
            .fetch_optional(self.reader())
            .await?;
        key.flatten().map(|key| parsed(&key)).transpose()
    }

    /// Ends a grant, if `user` owns the device; whether there was one.
    pub async fn remove_grant(&self, user: UserId, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<bool> {
        let done = sqlx::query(
            "DELETE FROM grants WHERE weaver_id = ? AND public_key = ? \
             AND public_key IN (SELECT public_key FROM devices WHERE user_id = ?)",
        )
        .bind(weaver.to_string())
        .bind(device.to_string())
        .bind(user.to_string())
        .execute(self.writer())
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Ends all grants of an ended weaver and frees its agent's key; the devices that had grants. It is asked again for as
    /// long as the weaver's pod is there, so it writes only when something is left.
    pub async fn remove_grants(&self, weaver: WeaverId) -> sqlx::Result<Vec<WireGuardKey>> {
        let is_left: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM grants WHERE weaver_id = ?1) \
             OR EXISTS (SELECT 1 FROM wireguard_keys WHERE weaver_id = ?1)",
        )
        .bind(weaver.to_string())
        .fetch_one(self.reader())
        .await?;
        if !is_left {
            return Ok(Vec::new());
        }
        let mut transaction = self.begin_write().await?;
        let keys: Vec<String> = sqlx::query_scalar("DELETE FROM grants WHERE weaver_id = ? RETURNING public_key")
            .bind(weaver.to_string())
            .fetch_all(&mut *transaction)
            .await?;
        sqlx::query("DELETE FROM wireguard_keys WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        keys.iter().map(|key| parsed(key)).collect()
    }

    /// The grants of a weaver that are in force, by key, after `after`: at most [`GRANT_PAGE`].
    pub async fn grants(&self, weaver: WeaverId, after: Option<WireGuardKey>) -> sqlx::Result<Vec<LiveGrant>> {
        let rows: Vec<GrantRow> =
            sqlx::query_as(select_grants!("AND g.weaver_id = ? AND g.public_key > ? ORDER BY g.public_key LIMIT ?"))
                .bind(millis(Timestamp::now()))
                .bind(weaver.to_string())
                .bind(after.map(|key| key.to_string()).unwrap_or_default())
                .bind(i64::from(GRANT_PAGE))
                .fetch_all(self.reader())
                .await?;
        rows.into_iter().map(live_grant).collect()
    }

    /// A device's grant for a weaver, if it is in force.
    pub async fn grant(&self, weaver: WeaverId, device: WireGuardKey) -> sqlx::Result<Option<LiveGrant>> {
        let row: Option<GrantRow> = sqlx::query_as(select_grants!("AND g.weaver_id = ? AND g.public_key = ?"))
            .bind(millis(Timestamp::now()))
            .bind(weaver.to_string())
            .bind(device.to_string())
            .fetch_optional(self.reader())
            .await?;
        row.map(live_grant).transpose()
    }

    /// All keys that may talk to each other, as far as their rows can be read.
    pub async fn pairs(&self) -> sqlx::Result<Vec<Pair>> {
        let rows: Vec<(String, String, String, i64)> = sqlx::query_as(
            "SELECT w.id, w.wireguard_key, g.public_key, w.expires_at FROM grants g JOIN weavers w ON w.id = g.weaver_id \
             WHERE w.ended_at IS NULL AND w.wireguard_key IS NOT NULL AND w.expires_at > ?",
        )
        .bind(millis(Timestamp::now()))
        .fetch_all(self.reader())
        .await?;
        let pair = |agent: &str, device: &str, expires_at| {
            Ok(Pair { agent: parsed(agent)?, device: parsed(device)?, expires_at: timestamp(expires_at)? })
        };
        let readable = rows.into_iter().filter_map(|(weaver, agent, device, expires_at)| {
            weavers::unless_unreadable(&weaver, pair(&agent, &device, expires_at))
        });
        Ok(readable.collect())
    }
}

/// Records whose a key is, unless it is somebody else's. One that is nobody's yet must be `proven`.
async fn claim(
    transaction: &mut Transaction<'_, Sqlite>,
    key: WireGuardKey,
    by: KeyOwner,
    proven: bool,
) -> Result<(), KeyError> {
    let row = sqlx::query_as("SELECT user_id, weaver_id FROM wireguard_keys WHERE public_key = ?")
        .bind(key.to_string())
        .fetch_optional(&mut **transaction)
        .await?;
    match row.map(owner).transpose()? {
        Some(owner) if owner == by => return Ok(()),
        Some(_) => return Err(KeyError::Taken),
        None if !proven => return Err(KeyError::Unproven),
        None => {}
    }
    let (user, weaver) = match by {
        KeyOwner::User(user) => (Some(user.to_string()), None),
        KeyOwner::Weaver(weaver) => (None, Some(weaver.to_string())),
    };
    sqlx::query("INSERT INTO wireguard_keys (public_key, user_id, weaver_id) VALUES (?, ?, ?)")
        .bind(key.to_string())
        .bind(user)
        .bind(weaver)
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

fn owner((user, weaver): (Option<String>, Option<String>)) -> sqlx::Result<KeyOwner> {
    match (user, weaver) {
        (Some(user), None) => Ok(KeyOwner::User(parsed(&user)?)),
        (None, Some(weaver)) => Ok(KeyOwner::Weaver(parsed(&weaver)?)),
        _ => Err(sqlx::Error::Decode("a WireGuard key has one owner".into())),
    }
}

fn live_grant((weaver, device, address, candidates, expires_at, user): GrantRow) -> sqlx::Result<LiveGrant> {
    Ok(LiveGrant {
        weaver: parsed(&weaver)?,
        device: parsed(&device)?,
        address: parsed(&address)?,
        candidates: serde_json::from_str(&candidates).map_err(|error| sqlx::Error::Decode(error.into()))?,
        expires_at: timestamp(expires_at)?,
        user,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::SignedDuration;
    use loom_api::login::TokenKind;

    use super::*;
    use crate::store::{
        tests::temporary,
        weavers::tests::{added, end, user},
    };

    #[tokio::test]
    async fn a_device_that_can_reach_a_weaver_is_not_forgotten_however_long_it_is_unused() {
        let (_directory, store) = temporary().await;
        let owner = user(&store).await;
        let weaver = added(&store, owner, None).await.id;
        store.register_agent(weaver, "1.0", WireGuardKey([7; 32])).await.expect("registered");
        let token = store.add_user_token(owner.0, "ci", TokenKind::Api, None).await.expect("made");
        let token = store.token(token.expose()).await.expect("read").expect("found").id;
        let [unused, used] = [1, 2].map(|byte| WireGuardKey([byte; 32]));
        for device in [unused, used] {
            store.admit(owner.0, weaver, device, true, &[], token).await.expect("admitted");
        }
        store.remove_grant(owner.0, weaver, unused).await.expect("removed");
        let later = Timestamp::now() + SignedDuration::from_secs(1);
        assert_eq!(store.remove_unused_devices(later).await.expect("removed"), [unused]);
        assert_eq!(store.key_owner(unused).await.expect("read"), None);
        assert_eq!(store.key_owner(used).await.expect("read"), Some(KeyOwner::User(owner.0)));
    }

    #[tokio::test]
    async fn cutting_off_an_ended_weaver_again_writes_nothing() {
        let (_directory, store) = temporary().await;
        let weaver = added(&store, user(&store).await, None).await.id;
        let key = WireGuardKey([7; 32]);
        store.register_agent(weaver, "1.0", key).await.expect("registered");
        end(&store, weaver, Timestamp::now()).await;
        store.remove_grants(weaver).await.expect("removed");
        assert_eq!(store.key_owner(key).await.expect("read"), None);
        // Whoever wants to write now waits for ever.
        let _writer = store.begin_write().await.expect("begun");
        let again = tokio::time::timeout(Duration::from_secs(5), store.remove_grants(weaver));
        assert_eq!(again.await.expect("nothing is written").expect("read"), []);
    }
}
