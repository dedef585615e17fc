//! HTTPS, served by the server itself, with a certificate that is read again when its files change.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use parking_lot::Mutex;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};

/// How often the certificate's files are looked at, at most.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// What was given.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Serve HTTPS with this certificate chain, in PEM; read anew when it changes.
    #[arg(long, env = "LOOM_SERVER_TLS_CERT", value_name = "FILE", requires = "tls_key", global = true)]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key, in PEM.
    #[arg(long, env = "LOOM_SERVER_TLS_KEY", value_name = "FILE", requires = "tls_cert", global = true)]
    tls_key: Option<PathBuf>,
}

/// The files for HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The certificate chain, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

impl Settings {
    /// The files for HTTPS, when it was asked for.
    ///
    /// # Errors
    ///
    /// When one of the two is missing.
    pub(crate) fn resolve(self) -> Result<Option<Config>> {
        match (self.tls_cert, self.tls_key) {
            (Some(certificate), Some(key)) => {
                Ok(Some(Config { certificate: std::path::absolute(certificate)?, key: std::path::absolute(key)? }))
            }
            (None, None) => Ok(None),
            _ => bail!("HTTPS needs both a certificate (tls-cert) and its key (tls-key)"),
        }
    }
}

/// How TLS is spoken with the certificate of these files.
///
/// # Errors
///
/// When the certificate or its key cannot be used.
pub(super) fn server_config(files: &Config) -> Result<ServerConfig> {
    let resolver = Arc::new(Files::open(files.certificate.clone(), files.key.clone())?);
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    // WebSockets are an upgrade of HTTP/1.1.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A certificate from two files, read anew when they have changed.
#[derive(Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    certified: Arc<CertifiedKey>,
    modified: [Option<SystemTime>; 2],
    looked: Instant,
}

impl Files {
    fn open(certificate: PathBuf, key: PathBuf) -> Result<Self> {
        // Before they are read: a change in between is then seen at the next look.
        let modified = [&certificate, &key].map(|path| modified(path));
        let certified = Arc::new(load(&certificate, &key)?);
        Ok(Self { certificate, key, current: Mutex::new(Current { certified, modified, looked: Instant::now() }) })
    }

    fn current(&self, now: Instant) -> Arc<CertifiedKey> {
        let mut current = self.current.lock();
        if now.duration_since(current.looked) >= CHECK_INTERVAL {
            current.looked = now;
            let modified = [&self.certificate, &self.key].map(|path| modified(path));
            if modified != current.modified {
                match load(&self.certificate, &self.key) {
                    Ok(certified) => {
                        tracing::info!("the certificate was replaced");
                        current.certified = Arc::new(certified);
                        current.modified = modified;
                    }
                    // Perhaps only one of the two is there yet. The old one serves until both fit.
                    Err(error) => tracing::warn!("the new certificate is not used: {error:#}"),
                }
            }
        }
        Arc::clone(&current.certified)
    }
}

impl ResolvesServerCert for Files {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current(Instant::now()))
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn load(certificate: &Path, key: &Path) -> Result<CertifiedKey> {
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("reading the certificate {}", certificate.display()))?;
    ensure!(!chain.is_empty(), "there is no certificate in {}", certificate.display());
    let secret = PrivateKeyDer::from_pem_file(key).with_context(|| format!("reading the key {}", key.display()))?;
    CertifiedKey::from_der(chain, secret, &ring::default_provider())
        .with_context(|| format!("{} and {} do not belong together", certificate.display(), key.display()))
}
