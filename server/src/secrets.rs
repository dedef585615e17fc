//! Every key of the server, derived from one 32-byte secret in a 0600 file by HKDF-SHA256 (RFC 5869).
//!
//! A restarted server gives the same answers, so agents and daemons go on with the keys that they have; see
//! `docs/decisions/0002-one-secret.md`.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use loom_api::{KeyChallenge, KeyProof, Secret, WeaverId, WireGuardKey};
use loom_tunnel::{PublicKey as X25519PublicKey, StaticSecret};
use ring::{
    aead::{self, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey},
    digest, hkdf, hmac,
    rand::{SecureRandom as _, SystemRandom},
};
use russh::keys::{
    PrivateKey, PublicKey,
    ssh_key::{
        certificate::{Builder, CertType},
        private::{Ed25519Keypair, KeypairData},
    },
};
use zeroize::Zeroizing;

use crate::durable;

/// Before a host certificate is valid, and after the weaver's end that it stays so: clocks differ.
const CERTIFICATE_SLACK: Duration = Duration::from_secs(3600);

/// How long the challenge of a WireGuard key may be answered.
const CHALLENGE_LIFETIME: SignedDuration = SignedDuration::from_mins(1);
/// What the nonces of such challenges are sealed for.
const CHALLENGE: &str = "wireguard key challenge v1";

/// Derives the server's keys.
pub struct Secrets {
    root: hkdf::Prk,
    ssh_authority: PrivateKey,
    /// What holders of WireGuard keys prove themselves to.
    challenger: StaticSecret,
}

impl Secrets {
    /// Reads the secret at `path`, or makes it there at the first start.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or made, others may read it, or it does not hold 32 bytes.
    pub fn load(path: &Path) -> Result<Self> {
        let secret = match fs::read(path) {
            Ok(secret) => {
                let mode = fs::metadata(path)?.permissions().mode();
                ensure!(mode & 0o077 == 0, "{} can be read by others; run: chmod 600 {0}", path.display());
                Zeroizing::new(secret)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let secret = Zeroizing::new(random::<32>().to_vec());
                durable::write(path, &secret)?;
                secret
            }
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        if secret.len() != 32 {
            bail!("{} holds {} bytes instead of 32: it is no secret of this server", path.display(), secret.len());
        }
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"loom-server").extract(&secret);
        let seed = expand(&root, &[b"ssh host authority v1"]);
        let ssh_authority = PrivateKey::new(KeypairData::from(Ed25519Keypair::from_seed(&seed)), "loom host authority")
            .context("the SSH authority's key")?;
        let challenger = StaticSecret::from(*expand(&root, &[b"wireguard key possession v1"]));
        Ok(Self { root, ssh_authority, challenger })
    }

    /// The SSH host authority's public key, as a public key line.
    ///
    /// # Errors
    ///
    /// Never in practice: an Ed25519 key always encodes.
    pub fn ssh_authority(&self) -> Result<String> {
        Ok(self.ssh_authority.public_key().to_openssh()?)
    }

    /// Signs an agent's host key for its weaver: principals are the weaver's id and its `.loom` host name, validity
    /// ends with the latest end that the weaver can have.
    ///
    /// # Errors
    ///
    /// When `host_key` is not a public key line.
    pub fn sign_host_key(&self, weaver: WeaverId, host_key: &str, until: Timestamp) -> Result<String> {
        let host_key = PublicKey::from_openssh(host_key).context("the SSH host key cannot be read")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let until = u64::try_from(until.as_second())? + CERTIFICATE_SLACK.as_secs();
        let after = now.saturating_sub(CERTIFICATE_SLACK).as_secs();
        let mut builder = Builder::new(random::<32>(), host_key.key_data().clone(), after, until)?;
        builder.cert_type(CertType::Host)?;
        builder.key_id(weaver.to_string())?;
        builder.valid_principal(weaver.to_string())?;
        // OpenSSH compares host names in lower case.
        builder.valid_principal(format!("{weaver}.loom").to_lowercase())?;
        Ok(builder.sign(&self.ssh_authority)?.to_openssh()?)
    }

    /// The WireGuard pre-shared key of a weaver's agent and a device.
    #[must_use]
    pub fn preshared_key(&self, agent: &WireGuardKey, device: &WireGuardKey) -> Secret {
        let key = expand(&self.root, &[b"wireguard preshared key v1", agent.as_bytes(), device.as_bytes()]);
        Secret::from(STANDARD.encode(*key))
    }

    /// A challenge to the holder of a WireGuard key. Nothing is kept of it: the nonce is the time, sealed.
    #[must_use]
    pub fn challenge(&self, now: Timestamp) -> KeyChallenge {
        KeyChallenge {
            public_key: WireGuardKey(X25519PublicKey::from(&self.challenger).to_bytes()),
            nonce: STANDARD.encode(self.seal(CHALLENGE, &now.as_millisecond().to_be_bytes())),
        }
    }

    /// Whether the sender of `proof` has answered a recent challenge with the private half of `key`.
    #[must_use]
    pub fn is_proven(&self, key: &WireGuardKey, proof: &KeyProof, now: Timestamp) -> bool {
        self.challenged_at(&proof.nonce).is_some_and(|at| now.duration_since(at).abs() <= CHALLENGE_LIFETIME)
            && proof.proves(key, &self.challenger)
    }

    fn challenged_at(&self, nonce: &str) -> Option<Timestamp> {
        let time = self.open(CHALLENGE, &STANDARD.decode(nonce).ok()?).ok()?;
        Timestamp::from_millisecond(i64::from_be_bytes(time.as_slice().try_into().ok()?)).ok()
    }

    /// Encrypts what must not stand in the database in clear; `context` binds it to its row.
    #[must_use]
    pub fn seal(&self, context: &str, plain: &[u8]) -> Vec<u8> {
        let nonce = random::<{ aead::NONCE_LEN }>();
        let mut sealed = plain.to_vec();
        self.sealing_key()
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut sealed)
            .expect("a few kilobytes are within the cipher's limit");
        [&nonce[..], &sealed].concat()
    }

    /// Decrypts what [`Secrets::seal`] made.
    ///
    /// # Errors
    ///
    /// When it was sealed with another secret or for another row, or was changed.
    pub fn open(&self, context: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
        let (nonce, body) = sealed.split_at_checked(aead::NONCE_LEN).context("sealed data is too short")?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| anyhow::anyhow!("a nonce's length"))?;
        let mut body = Zeroizing::new(body.to_vec());
        let plain = self
            .sealing_key()
            .open_in_place(nonce, Aad::from(context), &mut body)
            .map_err(|_| anyhow::anyhow!("it was sealed with another secret.key"))?
            .len();
        body.truncate(plain);
        Ok(body)
    }

    /// What tells whether two texts are the same, to those who have the secret: a text may hold passwords that others
    /// would find by trying.
    #[must_use]
    pub fn fingerprint(&self, text: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*expand(&self.root, &[b"fingerprint v1"]));
        hexadecimal(hmac::sign(&key, text.as_bytes()).as_ref())
    }

    fn sealing_key(&self) -> LessSafeKey {
        let key = expand(&self.root, &[b"sealing v1"]);
        LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &*key).expect("32 bytes are the cipher's key length"))
    }
}

fn expand(root: &hkdf::Prk, info: &[&[u8]]) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    root.expand(info, hkdf::HKDF_SHA256)
        .and_then(|output| output.fill(&mut *key))
        .expect("HKDF gives one hash's length for any labels");
    key
}

/// Random bytes from the operating system.
///
/// # Panics
///
/// When the operating system gives none; nothing safe could be done then.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

/// A new bearer token: 256 random bits, with a prefix that secret scanners can find.
#[must_use]
pub fn new_token() -> Secret {
    Secret::from(format!("loom_{}", URL_SAFE_NO_PAD.encode(random::<32>())))
}

/// How a token, or any other high-entropy secret, stands in the database.
#[must_use]
pub fn hash(secret: &str) -> String {
    hexadecimal(digest::digest(&digest::SHA256, secret.as_bytes()).as_ref())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_file_gives_the_same_keys_and_another_file_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("secret.key");
        let (first, again) = (Secrets::load(&path).expect("made"), Secrets::load(&path).expect("read"));
        let other = Secrets::load(&directory.path().join("other.key")).expect("made");
        let (agent, device) = (WireGuardKey([1; 32]), WireGuardKey([2; 32]));
        assert_eq!(first.preshared_key(&agent, &device), again.preshared_key(&agent, &device));
        assert_ne!(first.preshared_key(&agent, &device), first.preshared_key(&device, &agent));
        assert_ne!(first.preshared_key(&agent, &device), other.preshared_key(&agent, &device));
        assert_eq!(first.ssh_authority().expect("a key"), again.ssh_authority().expect("a key"));
        assert_eq!(first.fingerprint("secret"), again.fingerprint("secret"));
        assert_ne!(first.fingerprint("secret"), other.fingerprint("secret"), "nobody else can try passwords");
        let sealed = first.seal("row", b"secret");
        assert_eq!(*again.open("row", &sealed).expect("opens"), b"secret");
        assert!(again.open("other row", &sealed).is_err());
        assert!(other.open("row", &sealed).is_err());
        assert!(again.open("row", &sealed[..5]).is_err());
    }

    #[test]
    fn a_challenge_is_answered_with_the_private_key_and_soon() {
        let directory = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::load(&directory.path().join("secret.key")).expect("made");
        let other = Secrets::load(&directory.path().join("other.key")).expect("made");
        let private = StaticSecret::from([3; 32]);
        let key = WireGuardKey(X25519PublicKey::from(&private).to_bytes());
        let now = Timestamp::now();
        let proof = secrets.challenge(now).answer(&private);
        assert!(secrets.is_proven(&key, &proof, now + CHALLENGE_LIFETIME / 2));
        assert!(!secrets.is_proven(&key, &proof, now + CHALLENGE_LIFETIME * 2), "too late");
        assert!(!secrets.is_proven(&WireGuardKey([9; 32]), &proof, now), "another key");
        assert!(!other.is_proven(&key, &proof, now), "another server's challenge");
        let invented = KeyChallenge { nonce: "AAAA".to_owned(), ..secrets.challenge(now) };
        assert!(!secrets.is_proven(&key, &invented.answer(&private), now));
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("secret.key");
        Secrets::load(&path).expect("made");
        assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("set");
        assert!(Secrets::load(&path).is_err());
    }

    #[test]
    fn a_host_certificate_names_its_weaver_and_its_authority() {
        let directory = tempfile::tempdir().expect("a directory");
        let secrets = Secrets::load(&directory.path().join("secret.key")).expect("made");
        let host = PrivateKey::new(KeypairData::from(Ed25519Keypair::from_seed(&[7; 32])), "").expect("a key");
        let weaver = WeaverId::generate();
        let line = secrets
            .sign_host_key(weaver, &host.public_key().to_openssh().expect("a line"), Timestamp::now())
            .expect("signed");
        let certificate = russh::keys::Certificate::from_openssh(&line).expect("a certificate");
        assert_eq!(certificate.cert_type(), CertType::Host);
        assert!(certificate.valid_principals().contains(&weaver.to_string()));
        assert_eq!(certificate.signature_key(), secrets.ssh_authority.public_key().key_data());
    }
}
