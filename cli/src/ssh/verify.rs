//! Is this host the weaver? It shows a certificate (OpenSSH PROTOCOL.certkeys); the server's authority must have signed
//! it, for this weaver, as a host, for now.

use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::{Certificate, PublicKey, PublicKeyOrCertificate, ssh_key::certificate::CertType};

/// Why a host key is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Distrust {
    /// The host offered a bare key without a certificate.
    #[error("it shows no certificate")]
    NoCertificate,
    /// The certificate is signed by another authority, or forged.
    #[error("its certificate is not from this server's SSH authority")]
    Authority,
    /// The certificate is not a host certificate.
    #[error("its certificate is not for a host")]
    NotAHost,
    /// The certificate is not valid now.
    #[error("its certificate is not valid now; is this machine's clock right?")]
    Time,
    /// The certificate belongs to another weaver.
    #[error("its certificate is for {0}, not for this weaver")]
    Principal(String),
    /// The certificate has critical options that this client does not know.
    #[error("its certificate has the unknown condition {0:?}")]
    Condition(String),
    /// The authority's key that the server gave cannot be parsed.
    #[error("the server's SSH authority cannot be read")]
    BadAuthority,
}

/// Checks what a host shows.
///
/// # Errors
///
/// [`Distrust`].
pub(crate) fn verify(shown: &PublicKeyOrCertificate, authority: &str, weaver: &str) -> Result<(), Distrust> {
    let PublicKeyOrCertificate::Certificate(certificate) = shown else { return Err(Distrust::NoCertificate) };
    let authority = PublicKey::from_openssh(authority).map_err(|_| Distrust::BadAuthority)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| Distrust::Time)?.as_secs();
    check(certificate, &authority, weaver, now)
}

fn check(certificate: &Certificate, authority: &PublicKey, weaver: &str, now: u64) -> Result<(), Distrust> {
    if certificate.signature_key() != authority.key_data() || certificate.verify_signature().is_err() {
        return Err(Distrust::Authority);
    }
    if certificate.cert_type() != CertType::Host {
        return Err(Distrust::NotAHost);
    }
    let (after, before) = (certificate.valid_after(), certificate.valid_before());
    if now < after || now >= before {
        return Err(Distrust::Time);
    }
    if !certificate.valid_principals().iter().any(|principal| principal == weaver) {
        return Err(Distrust::Principal(certificate.valid_principals().join(", ")));
    }
    // Host certificates have no critical options so far; one that is not understood must be refused
    // (PROTOCOL.certkeys).
    if let Some((name, _)) = certificate.critical_options().iter().next() {
        return Err(Distrust::Condition(name.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use russh::keys::{
        PrivateKey,
        ssh_key::{
            certificate::Builder,
            private::{Ed25519Keypair, KeypairData},
        },
    };

    use super::*;

    const NOW: u64 = 2_000_000_000;

    fn key(seed: u8) -> PrivateKey {
        PrivateKey::new(KeypairData::from(Ed25519Keypair::from_seed(&[seed; 32])), "").unwrap()
    }

    fn builder(kind: CertType, principal: &str) -> Builder {
        let mut builder = Builder::new([0; 16], key(1).public_key().key_data().clone(), NOW - 10, NOW + 10).unwrap();
        builder.cert_type(kind).unwrap();
        builder.key_id("test").unwrap();
        builder.valid_principal(principal).unwrap();
        builder
    }

    fn certificate(kind: CertType, principal: &str, signed_by: &PrivateKey) -> Certificate {
        builder(kind, principal).sign(signed_by).unwrap()
    }

    #[test]
    fn only_the_weavers_own_certificate_is_believed() {
        let (authority, stranger) = (key(2), key(3));
        let trusted = authority.public_key();
        let good = certificate(CertType::Host, "W-1", &authority);
        assert_eq!(check(&good, trusted, "W-1", NOW), Ok(()));
        assert_eq!(check(&good, trusted, "W-2", NOW), Err(Distrust::Principal("W-1".to_owned())));
        assert_eq!(check(&good, trusted, "W-1", NOW + 10), Err(Distrust::Time));
        assert_eq!(check(&good, trusted, "W-1", NOW - 11), Err(Distrust::Time));
        assert_eq!(check(&good, stranger.public_key(), "W-1", NOW), Err(Distrust::Authority));
        let foreign = certificate(CertType::Host, "W-1", &stranger);
        assert_eq!(check(&foreign, trusted, "W-1", NOW), Err(Distrust::Authority));
        let users = certificate(CertType::User, "W-1", &authority);
        assert_eq!(check(&users, trusted, "W-1", NOW), Err(Distrust::NotAHost));
    }

    #[test]
    fn a_condition_that_is_not_understood_is_not_overlooked() {
        let authority = key(2);
        let mut conditional = builder(CertType::Host, "W-1");
        conditional.critical_option("only-on-sundays", "").unwrap();
        let conditional = conditional.sign(&authority).unwrap();
        assert_eq!(
            check(&conditional, authority.public_key(), "W-1", NOW),
            Err(Distrust::Condition("only-on-sundays".to_owned()))
        );
    }

    #[test]
    fn a_certificate_for_everybody_is_not_believed() {
        // Without principals OpenSSH's format means any host; ours never do.
        let authority = key(2);
        let mut anybody = Builder::new([0; 16], key(1).public_key().key_data().clone(), NOW - 10, NOW + 10).unwrap();
        anybody.cert_type(CertType::Host).unwrap();
        anybody.key_id("test").unwrap();
        anybody.all_principals_valid().unwrap();
        let anybody = anybody.sign(&authority).unwrap();
        assert_eq!(check(&anybody, authority.public_key(), "W-1", NOW), Err(Distrust::Principal(String::new())));
    }

    #[test]
    fn a_bare_key_is_not_believed() {
        let bare = PublicKeyOrCertificate::from(key(1).public_key().clone());
        let authority = key(2).public_key().to_openssh().unwrap();
        assert_eq!(verify(&bare, &authority, "W-1"), Err(Distrust::NoCertificate));
    }
}
