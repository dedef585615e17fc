//! Verifies that the host is the weaver. Its certificate (OpenSSH PROTOCOL.certkeys) must be a host certificate for this
//! weaver, signed by the server's SSH CA and valid now.

use std::time::{SystemTime, UNIX_EPOCH};

use russh::keys::{Certificate, PublicKey, PublicKeyOrCertificate, ssh_key::certificate::CertType};

/// Why the host is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HostKeyError {
    #[error("it has no certificate")]
    NoCertificate,
    #[error("its certificate is not signed by this server's SSH CA")]
    Authority,
    #[error("its certificate is not a host certificate")]
    NotAHost,
    #[error("its certificate is not valid now; is this machine's clock right?")]
    Time,
    #[error("its certificate is for {0}, not for this weaver")]
    Principal(String),
    #[error("its certificate has the unknown critical option {0:?}")]
    CriticalOption(String),
    #[error("the server's SSH CA key cannot be parsed")]
    BadAuthority,
}

/// Checks the key or certificate that the host offered. `authority` is the public key line of the server's SSH CA.
pub(crate) fn verify(offered: &PublicKeyOrCertificate, authority: &str, weaver: &str) -> Result<(), HostKeyError> {
    let PublicKeyOrCertificate::Certificate(certificate) = offered else { return Err(HostKeyError::NoCertificate) };
    let authority = PublicKey::from_openssh(authority).map_err(|_| HostKeyError::BadAuthority)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| HostKeyError::Time)?.as_secs();
    check(certificate, &authority, weaver, now)
}

fn check(certificate: &Certificate, authority: &PublicKey, weaver: &str, now: u64) -> Result<(), HostKeyError> {
    if certificate.signature_key() != authority.key_data() || certificate.verify_signature().is_err() {
        return Err(HostKeyError::Authority);
    }
    if certificate.cert_type() != CertType::Host {
        return Err(HostKeyError::NotAHost);
    }
    let (after, before) = (certificate.valid_after(), certificate.valid_before());
    if now < after || now >= before {
        return Err(HostKeyError::Time);
    }
    if !certificate.valid_principals().iter().any(|principal| principal == weaver) {
        return Err(HostKeyError::Principal(certificate.valid_principals().join(", ")));
    }
    // No critical options are defined for host certificates; an unknown one must be refused (PROTOCOL.certkeys).
    if let Some((name, _)) = certificate.critical_options().iter().next() {
        return Err(HostKeyError::CriticalOption(name.clone()));
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
        assert_eq!(check(&good, trusted, "W-2", NOW), Err(HostKeyError::Principal("W-1".to_owned())));
        assert_eq!(check(&good, trusted, "W-1", NOW + 10), Err(HostKeyError::Time));
        assert_eq!(check(&good, trusted, "W-1", NOW - 11), Err(HostKeyError::Time));
        assert_eq!(check(&good, stranger.public_key(), "W-1", NOW), Err(HostKeyError::Authority));
        let foreign = certificate(CertType::Host, "W-1", &stranger);
        assert_eq!(check(&foreign, trusted, "W-1", NOW), Err(HostKeyError::Authority));
        let users = certificate(CertType::User, "W-1", &authority);
        assert_eq!(check(&users, trusted, "W-1", NOW), Err(HostKeyError::NotAHost));
    }

    #[test]
    fn an_unknown_critical_option_is_refused() {
        let authority = key(2);
        let mut conditional = builder(CertType::Host, "W-1");
        conditional.critical_option("only-on-sundays", "").unwrap();
        let conditional = conditional.sign(&authority).unwrap();
        assert_eq!(
            check(&conditional, authority.public_key(), "W-1", NOW),
            Err(HostKeyError::CriticalOption("only-on-sundays".to_owned()))
        );
    }

    #[test]
    fn a_certificate_for_everybody_is_not_believed() {
        // In OpenSSH's format no principals means any host; our CA never signs that.
        let authority = key(2);
        let mut anybody = Builder::new([0; 16], key(1).public_key().key_data().clone(), NOW - 10, NOW + 10).unwrap();
        anybody.cert_type(CertType::Host).unwrap();
        anybody.key_id("test").unwrap();
        anybody.all_principals_valid().unwrap();
        let anybody = anybody.sign(&authority).unwrap();
        assert_eq!(check(&anybody, authority.public_key(), "W-1", NOW), Err(HostKeyError::Principal(String::new())));
    }

    #[test]
    fn a_bare_key_is_not_believed() {
        let bare = PublicKeyOrCertificate::from(key(1).public_key().clone());
        let authority = key(2).public_key().to_openssh().unwrap();
        assert_eq!(verify(&bare, &authority, "W-1"), Err(HostKeyError::NoCertificate));
    }
}
