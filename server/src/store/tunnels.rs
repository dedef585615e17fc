//! Devices, and which of them may reach which weaver until when.

use std::net::{Ipv6Addr, SocketAddr};

use jiff::Timestamp;
use loom_api::{UserId, WeaverId, WireGuardKey};

use super::{Store, millis, parsed, timestamp};

/// The part of the deployment's prefix that devices live in.
const DEVICE_SUBNET: u16 = 0xd;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Its key belongs to another user.
    #[error("this WireGuard key belongs to another user")]
    SomebodyElses,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// A grant in force, with all that the agent needs but the pre-shared key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveGrant {
    /// The weaver.
    pub weaver: WeaverId,
    /// The device.
    pub device: WireGuardKey,
    /// The device's address inside the tunnel.
    pub address: Ipv6Addr,
    /// UDP addresses where the device can perhaps be reached.
    pub candidates: Vec<SocketAddr>,
    /// Until when.
    pub expires_at: Timestamp,
    /// The user's name.
    pub user: String,
}

type GrantRow = (String, String, String, String, i64, String);

/// A macro, because statements are whole at compile time.
macro_rules! select_grants {
    () => {
        "SELECT g.weaver_id, g.public_key, d.address, g.candidates, g.expires_at, u.name \
         FROM grants g JOIN devices d ON d.public_key = g.public_key JOIN users u ON u.id = d.user_id \
         JOIN weavers w ON w.id = g.weaver_id WHERE w.ended_at IS NULL AND g.expires_at > ?"
    };
}

impl Store {
    /// A user's device; it is recorded when it is new. Its address depends only on its key.
    ///
    /// # Errors
    ///
    /// [`DeviceError`].
    pub async fn device(&self, user: UserId, key: WireGuardKey) -> Result<Ipv6Addr, DeviceError> {
        let address = self.address(DEVICE_SUBNET, key.as_bytes());
        sqlx::query("INSERT INTO devices (public_key, user_id, address, created_at) VALUES (?, ?, ?, ?) ON CONFLICT (public_key) DO NOTHING")
            .bind(key.to_string())
            .bind(user.to_string())
            .bind(address.to_string())
            .bind(millis(Timestamp::now()))
            .execute(self.writer())
            .await?;
        if self.device_owner(key).await? == Some(user) { Ok(address) } else { Err(DeviceError::SomebodyElses) }
    }

    /// Whose a device is.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn device_owner(&self, key: WireGuardKey) -> sqlx::Result<Option<UserId>> {
        let owner: Option<String> = sqlx::query_scalar("SELECT user_id FROM devices WHERE public_key = ?")
            .bind(key.to_string())
            .fetch_optional(self.reader())
            .await?;
        owner.map(|owner| parsed(&owner)).transpose()
    }

    /// Forgets a device of a user's with all its grants; the weavers that it could reach.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn remove_device(&self, user: UserId, key: WireGuardKey) -> sqlx::Result<Vec<WeaverId>> {
        let mut transaction = self.begin_write().await?;
        let weavers: Vec<String> = sqlx::query_scalar(
            "SELECT g.weaver_id FROM grants g JOIN devices d ON d.public_key = g.public_key WHERE d.public_key = ? AND d.user_id = ?",
        )
        .bind(key.to_string())
        .bind(user.to_string())
        .fetch_all(&mut *transaction)
        .await?;
        sqlx::query("DELETE FROM devices WHERE public_key = ? AND user_id = ?")
            .bind(key.to_string())
            .bind(user.to_string())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        weavers.iter().map(|id| parsed(id)).collect()
    }

    /// Records a grant, or changes it.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn put_grant(
        &self,
        weaver: WeaverId,
        device: WireGuardKey,
        candidates: &[SocketAddr],
        until: Timestamp,
    ) -> sqlx::Result<()> {
        let candidates = serde_json::to_string(candidates).map_err(|error| sqlx::Error::Encode(error.into()))?;
        sqlx::query(
            "INSERT INTO grants (weaver_id, public_key, candidates, expires_at) VALUES (?, ?, ?, ?) \
             ON CONFLICT (weaver_id, public_key) DO UPDATE SET candidates = excluded.candidates, expires_at = excluded.expires_at",
        )
        .bind(weaver.to_string())
        .bind(device.to_string())
        .bind(candidates)
        .bind(millis(until))
        .execute(self.writer())
        .await
        .map(drop)
    }

    /// Moves the end of all grants of a weaver: its deadline was moved.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn move_grants(&self, weaver: WeaverId, until: Timestamp) -> sqlx::Result<()> {
        sqlx::query("UPDATE grants SET expires_at = ? WHERE weaver_id = ?")
            .bind(millis(until))
            .bind(weaver.to_string())
            .execute(self.writer())
            .await
            .map(drop)
    }

    /// Ends a grant, if `user` owns the device; whether there was one.
    ///
    /// # Errors
    ///
    /// The database's.
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

    /// Ends all grants of a weaver; the devices that had them.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn remove_grants(&self, weaver: WeaverId) -> sqlx::Result<Vec<WireGuardKey>> {
        let keys: Vec<String> = sqlx::query_scalar("DELETE FROM grants WHERE weaver_id = ? RETURNING public_key")
            .bind(weaver.to_string())
            .fetch_all(self.writer())
            .await?;
        keys.iter().map(|key| parsed(key)).collect()
    }

    /// The grants of a weaver that are in force.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn grants(&self, weaver: WeaverId) -> sqlx::Result<Vec<LiveGrant>> {
        let rows: Vec<GrantRow> = sqlx::query_as(concat!(select_grants!(), " AND g.weaver_id = ?"))
            .bind(millis(Timestamp::now()))
            .bind(weaver.to_string())
            .fetch_all(self.reader())
            .await?;
        rows.into_iter().map(live_grant).collect()
    }

    /// All grants that are in force.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn all_grants(&self) -> sqlx::Result<Vec<LiveGrant>> {
        let rows: Vec<GrantRow> =
            sqlx::query_as(select_grants!()).bind(millis(Timestamp::now())).fetch_all(self.reader()).await?;
        rows.into_iter().map(live_grant).collect()
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
