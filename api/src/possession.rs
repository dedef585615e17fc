//! Proof that whoever names a WireGuard key holds its private half.
//!
//! Public keys are no secrets, and a key is a place on the relay. So the server lets a key belong to someone only with a
//! [`KeyProof`], the answer to a [`KeyChallenge`]: a MAC keyed with what X25519 (RFC 7748) yields from the private key
//! and the challenge's public key, which only the holders of the two private keys can compute.
//!
//! ```text
//! HMAC-SHA256(key = X25519(own private key, challenge's public key),
//!             "loom wireguard key possession v1" ‖ own public key ‖ challenge's public key ‖ nonce as it came)
//! ```

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::hmac;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret};

use crate::WireGuardKey;

/// Keeps the MAC apart from all others that are made with the key.
const LABEL: &[u8] = b"loom wireguard key possession v1";

/// The answer to `GET /api/wireguard/challenge`: what a [`KeyProof`] answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyChallenge {
    /// An X25519 public key of the server's.
    pub public_key: WireGuardKey,
    /// Goes back with the proof as it is. The server accepts it for a minute.
    pub nonce: String,
}

/// Proves that the sender holds the private half of the WireGuard key in the same request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyProof {
    /// The challenge's nonce.
    pub nonce: String,
    /// The MAC, base64 of 32 bytes.
    pub mac: String,
}

impl KeyChallenge {
    /// Answers with the private half of the key that is to be registered.
    #[must_use]
    pub fn answer(&self, private_key: &StaticSecret) -> KeyProof {
        let server = PublicKey::from(self.public_key.0);
        let own = PublicKey::from(private_key);
        let mac = hmac::sign(
            &mac_key(&private_key.diffie_hellman(&server)),
            &message(own.as_bytes(), server.as_bytes(), &self.nonce),
        );
        KeyProof { nonce: self.nonce.clone(), mac: STANDARD.encode(mac) }
    }
}

impl KeyProof {
    /// Whether the MAC was made with the private half of `key`, for the challenge with the public half of `server`.
    /// How old the nonce is, and whether it was ever given out, is for the server to know.
    #[must_use]
    pub fn proves(&self, key: &WireGuardKey, server: &StaticSecret) -> bool {
        let shared = server.diffie_hellman(&PublicKey::from(key.0));
        // With a point of low order the secret is the same for everybody (RFC 7748 §6.1).
        let Some(mac) = STANDARD.decode(&self.mac).ok().filter(|_| shared.was_contributory()) else { return false };
        let message = message(key.as_bytes(), PublicKey::from(server).as_bytes(), &self.nonce);
        hmac::verify(&mac_key(&shared), &message, &mac).is_ok()
    }
}

fn mac_key(shared: &SharedSecret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, shared.as_bytes())
}

fn message(key: &[u8; 32], server: &[u8; 32], nonce: &str) -> Vec<u8> {
    [LABEL, key, server, nonce.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> (StaticSecret, WireGuardKey) {
        let private = StaticSecret::from([seed; 32]);
        let public = WireGuardKey(PublicKey::from(&private).to_bytes());
        (private, public)
    }

    #[test]
    fn only_the_holder_of_the_private_key_can_answer() {
        let ((server, server_key), (device, device_key), (other, other_key)) = (key(1), key(2), key(3));
        let challenge = KeyChallenge { public_key: server_key, nonce: "nonce".to_owned() };
        let proof = challenge.answer(&device);
        assert!(proof.proves(&device_key, &server));
        assert!(!proof.proves(&other_key, &server), "it is a proof of one key");
        assert!(!proof.proves(&device_key, &other), "to one server");
        assert!(!challenge.answer(&other).proves(&device_key, &server));
        let reused = KeyProof { nonce: "another".to_owned(), ..proof.clone() };
        assert!(!reused.proves(&device_key, &server), "for one nonce");
        for mac in ["", "not base64!", &STANDARD.encode([0; 32]), &proof.mac[..proof.mac.len() - 4]] {
            let damaged = KeyProof { mac: mac.to_owned(), ..proof.clone() };
            assert!(!damaged.proves(&device_key, &server), "{mac}");
        }
    }

    #[test]
    fn keys_of_low_order_cannot_be_proved() {
        let (server, server_key) = key(1);
        for low in [[0; 32], {
            let mut one = [0; 32];
            one[0] = 1;
            one
        }] {
            // Whoever answers for such a key knows the shared secret, which is zero.
            let mac = hmac::sign(
                &hmac::Key::new(hmac::HMAC_SHA256, &[0; 32]),
                &message(&low, server_key.as_bytes(), "nonce"),
            );
            let proof = KeyProof { nonce: "nonce".to_owned(), mac: STANDARD.encode(mac) };
            assert!(!proof.proves(&WireGuardKey(low), &server));
        }
    }
}
