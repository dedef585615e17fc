//! Two real image registries on the node's address: one for everybody, one behind a password.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{Cluster, NODE, TIMEOUT, parts, run};
use crate::wait::eventually;

/// The registry that everybody may pull from.
pub const OPEN: &str = "10.86.0.1:15000";
/// The registry that asks for [`USER`] and [`PASSWORD`].
pub const PRIVATE: &str = "10.86.0.1:15001";
/// Who may pull from [`PRIVATE`].
pub const USER: &str = "loom";
/// Their password.
pub const PASSWORD: &str = "pull-me";
/// The password as the registry's file wants it: bcrypt.
const HASHED: &str = "$2b$05$RMLBQRBk4Swt.9wGY9pbgOyYCsT9PwnqaaKnhoubCzhiT4cIj8Jna";

/// The name of a test image in the open registry.
#[must_use]
pub fn image(name: &str) -> String {
    format!("{OPEN}/loom/{name}:test")
}

/// The name of a test image in the registry behind a password.
#[must_use]
pub fn private_image(name: &str) -> String {
    format!("{PRIVATE}/loom/{name}:test")
}

/// Starts both, and pushes the images.
pub(super) fn start(cluster: &Cluster, images: &[PathBuf]) -> Result<()> {
    for (name, address) in [("registry", OPEN), ("private-registry", PRIVATE)] {
        let data = cluster.path("registry").join(name);
        fs::create_dir_all(&data)?;
        let mut settings = format!(
            "version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n",
            data.display()
        );
        if address == PRIVATE {
            let passwords = cluster.path("registry/passwords");
            fs::write(&passwords, format!("{USER}:{HASHED}\n"))?;
            settings.push_str(&format!("auth: {{htpasswd: {{realm: loom, path: {}}}}}\n", passwords.display()));
        }
        let file = cluster.path("registry").join(format!("{name}.yaml"));
        fs::write(&file, settings)?;
        parts::spawn(&cluster.directory, name, Command::new("docker-registry").arg("serve").arg(&file))?;
        // Plain HTTP, which containerd does for an address only when told so.
        let hosts = cluster.path("hosts").join(address);
        fs::create_dir_all(&hosts)?;
        fs::write(
            hosts.join("hosts.toml"),
            format!(
                "server = \"http://{address}\"\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
            ),
        )?;
    }
    for address in [OPEN, PRIVATE] {
        eventually(&format!("the registry at {address} on {NODE}"), TIMEOUT, || {
            cluster.check_parts()?;
            Ok(TcpStream::connect(address).is_ok().then_some(()))
        })?;
    }
    for archive in images {
        push(archive)?;
    }
    Ok(())
}

fn push(archive: &Path) -> Result<()> {
    let name = archive.file_stem().and_then(|name| name.to_str()).context("an archive's name")?;
    let source = format!("oci-archive:{}", archive.display());
    let credentials = format!("{USER}:{PASSWORD}");
    let common = ["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"];
    let (target, mut arguments) = match name.strip_prefix("private-") {
        Some(name) => (private_image(name), [&common[..], &["--dest-creds", &credentials]].concat()),
        None => (image(name), common.to_vec()),
    };
    let target = format!("docker://{target}");
    arguments.extend([source.as_str(), target.as_str()]);
    run("skopeo", &arguments)
}
