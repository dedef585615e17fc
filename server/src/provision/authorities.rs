//! Certificate authorities that agents are told to trust for the server, besides those that their system trusts.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

/// The most bytes of them in PEM: agents get them in one variable of their environment, of which Linux takes 128 KiB.
const MAX_AUTHORITIES: usize = 96 << 10;

/// The certificates of a file, in PEM. Nothing else in it is passed on: a file of certificates may hold a key, too.
///
/// # Errors
///
/// When there are none, or too many.
pub(super) fn read(path: &Path) -> Result<String> {
    let file = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let certificates: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(&file)
        .collect::<Result<_, _>>()
        .with_context(|| format!("reading the certificates in {}", path.display()))?;
    ensure!(!certificates.is_empty(), "there is no certificate in {}", path.display());
    let pem: String = certificates.iter().map(encode).collect();
    ensure!(
        pem.len() <= MAX_AUTHORITIES,
        "{} holds more certificates than agents can be given ({} KiB): name a file with the server's authority only",
        path.display(),
        MAX_AUTHORITIES >> 10
    );
    Ok(pem)
}

/// One certificate as RFC 7468 §2 has it, in lines of 64 characters.
fn encode(certificate: &CertificateDer<'_>) -> String {
    let base64 = BASE64.encode(certificate);
    let mut lines = vec!["-----BEGIN CERTIFICATE-----"];
    // Base64 is ASCII: every piece of it is text.
    lines.extend(base64.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()));
    lines.extend(["-----END CERTIFICATE-----", ""]);
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_certificates_of_a_file_are_passed_on() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let certificates = [vec![1; 200], vec![2; 48]].map(|der| encode(&der.into()));
        let key = "-----BEGIN PRIVATE KEY-----\nAQID\n-----END PRIVATE KEY-----\n";
        let [one, two] = &certificates;
        fs::write(file.path(), format!("# a comment\n{one}{key}{two}")).expect("written");
        assert_eq!(read(file.path()).expect("two certificates"), certificates.concat());
        fs::write(file.path(), key).expect("written");
        assert!(read(file.path()).expect_err("none").to_string().contains("no certificate"));
        fs::write(file.path(), encode(&vec![1; MAX_AUTHORITIES].into())).expect("written");
        assert!(read(file.path()).expect_err("too many").to_string().contains("more certificates"));
    }
}
