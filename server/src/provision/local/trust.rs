//! Whether the agents of local weavers will trust this server's certificate, and by which authorities.

use std::{path::Path, process::Stdio, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use reqwest::Url;
use rustls::{
    CertificateError,
    client::danger::ServerCertVerifier as _,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use rustls_platform_verifier::Verifier;

use super::super::authorities;

/// The variable in which agents are given authorities.
pub(super) const AUTHORITIES: &str = "LOOM_SERVER_CA";

/// The authorities that agents are given, in PEM: those of `named`, or of the server's own chain, which may end in a
/// root or be a certificate that signed itself.
///
/// # Errors
///
/// When they cannot be read.
pub(super) fn authorities(named: Option<&Path>, chain: Option<&Path>) -> Result<Option<String>> {
    named.or(chain).map(authorities::read).transpose()
}

/// Why agents will not accept the chain in this file at `url`, if they will not. It is checked in a process of its own
/// with an agent's environment: the server's can name other authorities than the system's (`SSL_CERT_FILE`).
pub(super) async fn doubt(url: &str, chain: &Path, authorities: &str) -> Result<Option<String>> {
    let output = tokio::process::Command::new("/proc/self/exe")
        .args(["local-trust", url])
        .arg(chain)
        .env_clear()
        .env(AUTHORITIES, authorities)
        .stdin(Stdio::null())
        .output()
        .await
        .context("checking the server's certificate")?;
    let said = |text: Vec<u8>| String::from_utf8_lossy(&text).trim().to_owned();
    ensure!(output.status.success(), "checking the server's certificate: {}", said(output.stderr));
    Ok(Some(said(output.stdout)).filter(|doubt| !doubt.is_empty()))
}

/// `loom-server local-trust`: says why agents in this environment will not accept a certificate.
///
/// # Errors
///
/// When the certificate or the address cannot be read.
pub fn say_doubt(url: &str, chain: &Path) -> Result<()> {
    if let Some(doubt) = look(url, chain, &std::env::var(AUTHORITIES).unwrap_or_default())? {
        println!("{doubt}");
    }
    Ok(())
}

fn look(url: &str, chain: &Path, authorities: &str) -> Result<Option<String>> {
    let url: Url = url.parse().context("the server's own address")?;
    if url.scheme() != "https" {
        return Ok(None);
    }
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host).with_context(|| format!("the name {host}"))?;
    let roots: Vec<CertificateDer<'_>> =
        CertificateDer::pem_slice_iter(authorities.as_bytes()).collect::<Result<_, _>>()?;
    let chain: Vec<CertificateDer<'_>> = CertificateDer::pem_file_iter(chain)?.collect::<Result<_, _>>()?;
    let (leaf, intermediates) = chain.split_first().context("the chain has no certificate")?;
    let verifier = Verifier::new_with_extra_roots(roots, Arc::new(ring::default_provider()))?;
    let Err(error) = verifier.verify_server_cert(leaf, intermediates, &name, &[], UnixTime::now()) else {
        return Ok(None);
    };
    let why = match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its issuer is not known on this machine; name the authority's certificate with --local-agent-ca".to_owned()
        }
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!("it is not for {host}; name the address that it is for with --public-url"),
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "it has expired; renew it".to_owned()
        }
        other => other.to_string(),
    };
    Ok(Some(format!("no weaver becomes ready, because its agent does not accept the server's certificate: {why}")))
}
