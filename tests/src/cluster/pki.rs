//! The cluster's certificates, by `openssl`; they live as long as the cluster.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{NODE, run};

/// Name, subject and names of each certificate.
const CERTIFICATES: [(&str, &str, &str); 7] = [
    ("apiserver", "/CN=kube-apiserver", "IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"),
    ("admin", "/O=system:masters/CN=admin", "DNS:admin"),
    ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "DNS:apiserver"),
    ("node", "/O=system:nodes/CN=system:node:node0", "DNS:node0"),
    ("controllers", "/CN=system:kube-controller-manager", "DNS:controllers"),
    ("proxy", "/CN=system:kube-proxy", "DNS:proxy"),
    ("scheduler", "/CN=system:kube-scheduler", "DNS:scheduler"),
];

/// Creates the CA, a certificate for each part, and the key that signs service account tokens.
pub(super) fn make(directory: &Path) -> Result<()> {
    authority(directory)?;
    let accounts = file(directory, "accounts", "key");
    key(&accounts)?;
    run("openssl", &["ec", "-in", &accounts, "-pubout", "-out", &file(directory, "accounts", "pub")])?;
    for (name, subject, names) in CERTIFICATES {
        leaf(directory, name, subject, &format!("{names},IP:{NODE}"))?;
    }
    Ok(())
}

/// Creates a CA, `ca.crt` and `ca.key`.
fn authority(directory: &Path) -> Result<()> {
    let (secret, certificate) = (file(directory, "ca", "key"), file(directory, "ca", "crt"));
    key(&secret)?;
    let subject = ["-days", "30", "-subj", "/CN=loom-test", "-out", &certificate];
    run("openssl", &[&["req", "-x509", "-new", "-key", &secret], &subject[..]].concat())
}

/// Makes a certificate of that authority, for `names` as `subjectAltName` has them.
fn leaf(directory: &Path, name: &str, subject: &str, names: &str) -> Result<()> {
    let part = |extension: &str| file(directory, name, extension);
    key(&part("key"))?;
    run("openssl", &["req", "-new", "-key", &part("key"), "-subj", subject, "-out", &part("csr")])?;
    fs::write(part("ext"), format!("subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n"))?;
    let (authority, secret) = (file(directory, "ca", "crt"), file(directory, "ca", "key"));
    let (request, extensions, certificate) = (part("csr"), part("ext"), part("crt"));
    let mut sign = vec!["x509", "-req", "-in", &request, "-CA", &authority, "-CAkey", &secret, "-CAcreateserial"];
    sign.extend(["-days", "30", "-extfile", &extensions, "-out", &certificate]);
    run("openssl", &sign)
}

/// Makes an authority, and a certificate of it for a Loom server of these names, in the new folder `pki` of `directory`.
pub(crate) fn for_server(directory: &Path, names: &str) -> Result<PathBuf> {
    let folder = directory.join("pki");
    fs::create_dir(&folder)?;
    authority(&folder)?;
    leaf(&folder, "server", "/CN=loom-server", names)?;
    Ok(folder)
}

/// An authority with certificates for Loom servers, in a directory of its own.
#[derive(Debug)]
pub struct Authority {
    directory: tempfile::TempDir,
}

impl Authority {
    /// A new one.
    pub fn new() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("loom-pki-").tempdir()?;
        authority(directory.path())?;
        Ok(Self { directory })
    }

    /// Its certificate's file.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// The files of a certificate for `names`, as `subjectAltName` has them, and of its key.
    pub fn server(&self, name: &str, names: &str) -> Result<[PathBuf; 2]> {
        leaf(self.directory.path(), name, "/CN=loom-server", names)?;
        Ok(["crt", "key"].map(|extension| self.directory.path().join(format!("{name}.{extension}"))))
    }

    /// The same, but the certificate expired at the end of 2020.
    pub fn expired_server(&self, name: &str, names: &str) -> Result<[PathBuf; 2]> {
        let files = self.server(name, names)?;
        let directory = self.directory.path();
        let part = |name: &str, extension: &str| file(directory, name, extension);
        let (index, config) = (part("index", "txt"), part("ca", "conf"));
        fs::write(&index, "")?;
        let shown = directory.display();
        fs::write(
            &config,
            format!(
                "[ca]\ndefault_ca=loom\n[loom]\ndatabase={index}\nnew_certs_dir={shown}\nrand_serial=yes\n\
                 default_md=sha256\npolicy=names\n[names]\ncommonName=supplied\n"
            ),
        )?;
        let (authority, secret) = (part("ca", "crt"), part("ca", "key"));
        let (request, extensions, certificate) = (part(name, "csr"), part(name, "ext"), part(name, "crt"));
        let mut sign = vec!["ca", "-batch", "-notext", "-config", &config, "-cert", &authority, "-keyfile", &secret];
        sign.extend(["-startdate", "20200101000000Z", "-enddate", "20201231235959Z"]);
        sign.extend(["-in", &request, "-extfile", &extensions, "-out", &certificate]);
        run("openssl", &sign)?;
        Ok(files)
    }
}

fn key(path: &str) -> Result<()> {
    run("openssl", &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path])
}

fn file(directory: &Path, name: &str, extension: &str) -> String {
    directory.join(format!("{name}.{extension}")).to_string_lossy().into_owned()
}
