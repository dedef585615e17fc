//! The cluster's certificates, by `openssl`; they live as long as the cluster.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{NODE, run};

/// Name, subject and names of each certificate.
const LEAVES: [(&str, &str, &str); 7] = [
    ("apiserver", "/CN=kube-apiserver", "IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"),
    ("admin", "/O=system:masters/CN=admin", "DNS:admin"),
    ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "DNS:apiserver"),
    ("node", "/O=system:nodes/CN=system:node:node0", "DNS:node0"),
    ("controllers", "/CN=system:kube-controller-manager", "DNS:controllers"),
    ("proxy", "/CN=system:kube-proxy", "DNS:proxy"),
    ("scheduler", "/CN=system:kube-scheduler", "DNS:scheduler"),
];

/// Makes the authority, one certificate for each part, and the key that signs service accounts' tokens.
pub(super) fn make(directory: &Path) -> Result<()> {
    authority(directory)?;
    let accounts = file(directory, "accounts", "key");
    key(&accounts)?;
    run("openssl", &["ec", "-in", &accounts, "-pubout", "-out", &file(directory, "accounts", "pub")])?;
    for (name, subject, names) in LEAVES {
        leaf(directory, name, subject, &format!("{names},IP:{NODE}"))?;
    }
    Ok(())
}

/// Makes an authority, `ca.crt` and `ca.key`.
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

fn key(path: &str) -> Result<()> {
    run("openssl", &["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path])
}

fn file(directory: &Path, name: &str, extension: &str) -> String {
    directory.join(format!("{name}.{extension}")).to_string_lossy().into_owned()
}
