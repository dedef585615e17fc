//! WireGuard keys of the tests' own, and the proof of who holds them, as another program than ours would make it from
//! `docs/protocols.md`.

use std::{collections::BTreeMap, fs::File, io::Read as _};

use anyhow::{Context as _, Result};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use ring::hmac;
use serde_json::{Value, json};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::{System, Weaver, api::Answer};

/// A WireGuard key pair.
pub struct KeyPair {
    pub(crate) private: StaticSecret,
}

impl KeyPair {
    pub fn generate() -> Result<Self> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self { private: StaticSecret::from(bytes) })
    }

    /// The public half in base64.
    #[must_use]
    pub fn public(&self) -> String {
        STANDARD.encode(PublicKey::from(&self.private).as_bytes())
    }

    /// The public half as it stands in a path or query: URL-safe, without padding.
    #[must_use]
    pub fn in_url(&self) -> String {
        URL_SAFE_NO_PAD.encode(PublicKey::from(&self.private))
    }

    /// Answers a challenge of the server's.
    pub fn answer(&self, challenge: &Value) -> Result<Value> {
        let nonce = challenge["nonce"].as_str().context("a nonce")?;
        let server = STANDARD.decode(challenge["public_key"].as_str().context("a key")?)?;
        let server: [u8; 32] = server.try_into().ok().context("32 bytes")?;
        let shared = self.private.diffie_hellman(&PublicKey::from(server));
        let message = [
            b"loom wireguard key possession v1",
            PublicKey::from(&self.private).as_bytes().as_slice(),
            &server,
            nonce.as_bytes(),
        ]
        .concat();
        let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, shared.as_bytes()), &message);
        Ok(json!({"nonce": nonce, "mac": STANDARD.encode(mac)}))
    }

    /// What asks for the device's admission to a weaver, with its answer to a challenge.
    pub fn admission(&self, challenge: &Value) -> Result<Value> {
        Ok(json!({"public_key": self.public(), "proof": self.answer(challenge)?}))
    }
}

impl System {
    /// A challenge for the holder of a key.
    pub fn key_challenge(&self) -> Result<Value> {
        Ok(self.request(None, "GET", "/api/wireguard/challenge", None)?.body)
    }

    /// Asks for a device's admission to a weaver, with a proof that its owner holds the key.
    pub fn open_tunnel(&self, token: &str, weaver: &Weaver, device: &KeyPair) -> Result<Answer> {
        self.open_tunnel_with(token, weaver, &device.admission(&self.key_challenge()?)?)
    }

    /// The same with any body.
    pub fn open_tunnel_with(&self, token: &str, weaver: &Weaver, body: &Value) -> Result<Answer> {
        self.request(Some(token), "POST", &format!("/api/weavers/{}/tunnel", weaver.id), Some(&body.to_string()))
    }

    /// The same for many devices, several at a time, each with its owner's token; how many answers there were of each
    /// HTTP status.
    pub fn open_tunnels(
        &self,
        weaver: &Weaver,
        devices: &[(&str, &KeyPair)],
        candidates: &[String],
    ) -> Result<BTreeMap<u16, usize>> {
        let mut answers = BTreeMap::new();
        // A challenge may be answered for a minute.
        for some in devices.chunks(1000) {
            let challenge = self.key_challenge()?;
            let requests = some.iter().map(|(token, device)| {
                let mut body = device.admission(&challenge)?;
                body["candidates"] = json!(candidates);
                Ok((*token, "POST", format!("/api/weavers/{}/tunnel", weaver.id), body.to_string()))
            });
            for (status, count) in self.request_all(&requests.collect::<Result<Vec<_>>>()?)? {
                *answers.entry(status).or_default() += count;
            }
        }
        Ok(answers)
    }
}
