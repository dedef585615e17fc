//! The sidecar's identity: keys made in memory at start, and the registration that ties them to the weaver.

use std::time::Duration;

use anyhow::{Context as _, bail};
use loom_api::{
    ErrorCode, KeyChallenge, PROTOCOL_VERSION, Secret, WireGuardKey,
    agent::{Register, Registered},
    client::{Client, ClientError},
};
use loom_tunnel::{PublicKey, StaticSecret};
use ring::rand::{SecureRandom as _, SystemRandom};
use russh::keys::{
    PrivateKey,
    ssh_key::private::{Ed25519Keypair, KeypairData},
};
use zeroize::Zeroizing;

use super::config::Config;

/// The pauses between retries double from the first to the second.
const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The sidecar's keys. They live as long as the process, so that a new registration does not affect its peers.
pub(crate) struct Identity {
    pub(crate) wireguard: StaticSecret,
    pub(crate) ssh: PrivateKey,
}

impl Identity {
    pub(crate) fn generate() -> anyhow::Result<Self> {
        let ssh = KeypairData::from(Ed25519Keypair::from_seed(&*random_key()?));
        Ok(Self {
            wireguard: StaticSecret::from(*random_key()?),
            ssh: PrivateKey::new(ssh, "").context("the SSH host key")?,
        })
    }

    pub(crate) fn public_key(&self) -> WireGuardKey {
        WireGuardKey(PublicKey::from(&self.wireguard).to_bytes())
    }

    /// Registers with the server, retrying until it succeeds. Cancel-safe.
    pub(crate) async fn register(&self, config: &Config) -> Registered {
        let mut pause = Backoff::default();
        loop {
            match self.try_to_register(config).await {
                Ok(registered) => {
                    tracing::info!(weaver = %config.weaver, address = %registered.address, "registered");
                    return registered;
                }
                Err(error) => tracing::warn!("cannot register: {error:#}"),
            }
            pause.wait().await;
        }
    }

    async fn try_to_register(&self, config: &Config) -> anyhow::Result<Registered> {
        // Read each time, because Kubernetes replaces a projected token before it expires.
        let credential = tokio::fs::read_to_string(&config.credential_file).await.map(Zeroizing::new);
        let credential = credential.with_context(|| config.credential_file.display().to_string())?;
        if credential.trim().is_empty() {
            bail!("{} is empty", config.credential_file.display());
        }
        let challenge: KeyChallenge = config.server.get("/api/wireguard/challenge").await?;
        let request = Register {
            weaver_id: config.weaver,
            credential: Secret::from(credential.trim().to_owned()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            wireguard_key: self.public_key(),
            proof: challenge.answer(&self.wireguard),
            ssh_host_key: self.ssh.public_key().to_openssh().context("the SSH host key")?,
        };
        Ok(config.server.post("/api/agent/register", &request).await?)
    }
}

/// Whether the server refused the token.
pub(crate) fn is_refused_token(error: &ClientError) -> bool {
    error.code() == Some(ErrorCode::Unauthorized)
}

/// A client with the registration's token.
pub(crate) fn client(config: &Config, registered: &Registered) -> Client {
    config.server.with_token(registered.token.clone())
}

fn random_key() -> anyhow::Result<Zeroizing<[u8; 32]>> {
    let mut bytes = Zeroizing::new([0; 32]);
    SystemRandom::new()
        .fill(&mut *bytes)
        .map_err(|_| anyhow::anyhow!("the operating system provides no random bytes"))?;
    Ok(bytes)
}

/// Exponential backoff with jitter: each pause is randomly shortened by up to half, so that agents do not all reconnect
/// to a restarted server at once.
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: MIN_PAUSE }
    }
}

impl Backoff {
    /// Sleeps for the next pause.
    pub(crate) async fn wait(&mut self) {
        let pause = jitter(self.next);
        self.next = (self.next * 2).min(MAX_PAUSE);
        tokio::time::sleep(pause).await;
    }
}

/// A random duration between half of the given one and all of it.
pub(crate) fn jitter(duration: Duration) -> Duration {
    let mut byte = [0];
    // If this fails, the duration is not shortened.
    let _ = SystemRandom::new().fill(&mut byte);
    duration - duration.mul_f64(f64::from(byte[0]) / 510.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_identities_differ() {
        let (one, other) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        assert_ne!(one.public_key(), other.public_key());
        assert_ne!(one.ssh.public_key().to_openssh().unwrap(), other.ssh.public_key().to_openssh().unwrap());
    }

    #[test]
    fn pauses_are_shortened_by_at_most_half() {
        for _ in 0..100 {
            let pause = jitter(MAX_PAUSE);
            assert!(pause >= MAX_PAUSE / 2 && pause <= MAX_PAUSE, "{pause:?}");
        }
    }
}
