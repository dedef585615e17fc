//! Images without Docker and without a registry: an OCI archive (image-spec 1.1, image layout in a tar) from tars of
//! files. The same input gives the same bytes.

use std::{
    fs,
    io::{self, Read as _},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result};
use ring::digest::{Context as Hash, SHA256};
use serde_json::{Value, json};

use crate::tools;

/// The time that every file and image has: the same files are then the same image.
pub(crate) const EPOCH: &str = "1767225600"; // 2026-01-01
const CREATED: &str = "2026-01-01T00:00:00Z";

/// What an image runs.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) user: &'static str,
    pub(crate) directory: &'static str,
}

/// Writes an image of one layer, the uncompressed tar `layer`, to `archive`. The layer is moved into it.
pub(crate) fn write(archive: &Path, layer: &Path, runs: &Runs) -> Result<()> {
    let directory = archive.with_extension("oci");
    // What an interrupted build left.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(directory.join("blobs/sha256"))?;
    let layer = Blob::take(&directory, "application/vnd.oci.image.layer.v1.tar", layer)?;
    let mut env = vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    env.extend(runs.env.iter().cloned());
    let config = json!({
        "created": CREATED,
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Entrypoint": runs.entrypoint, "Cmd": runs.command, "Env": env, "User": runs.user,
            "WorkingDir": runs.directory,
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    });
    let config = Blob::add(&directory, "application/vnd.oci.image.config.v1+json", &bytes(&config))?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config.descriptor(), "layers": [layer.descriptor()],
    });
    let manifest = Blob::add(&directory, media_type, &bytes(&manifest))?;
    fs::write(directory.join("index.json"), bytes(&json!({"schemaVersion": 2, "manifests": [manifest.descriptor()]})))?;
    fs::write(directory.join("oci-layout"), bytes(&json!({"imageLayoutVersion": "1.0.0"})))?;
    tar(&directory, archive)?;
    Ok(fs::remove_dir_all(&directory)?)
}

/// Packs a directory's files, in order, owned by root, at [`EPOCH`].
pub(crate) fn tar(directory: &Path, archive: &Path) -> Result<()> {
    let temporary = archive.with_extension("part");
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=posix"])
        .args(["--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"])
        .arg(format!("--mtime=@{EPOCH}"))
        .arg("--file")
        .arg(&temporary)
        .args(["--create", "--directory"])
        .arg(directory)
        .arg(".");
    tools::run(&mut tar).with_context(|| format!("packing {}", directory.display()))?;
    Ok(fs::rename(temporary, archive)?)
}

/// Something in the archive that is known by its hash.
struct Blob {
    media_type: &'static str,
    digest: String,
    size: u64,
}

impl Blob {
    fn add(directory: &Path, media_type: &'static str, content: &[u8]) -> Result<Self> {
        let file = directory.join("content");
        fs::write(&file, content).with_context(|| format!("writing {}", file.display()))?;
        Self::take(directory, media_type, &file)
    }

    /// Moves a file into the image.
    fn take(directory: &Path, media_type: &'static str, file: &Path) -> Result<Self> {
        let hex = sha256(file).with_context(|| format!("reading {}", file.display()))?;
        let size = fs::metadata(file)?.len();
        fs::rename(file, directory.join("blobs/sha256").join(&hex))?;
        Ok(Self { media_type, digest: format!("sha256:{hex}"), size })
    }

    fn descriptor(&self) -> Value {
        json!({"mediaType": self.media_type, "digest": self.digest, "size": self.size})
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256(file: &Path) -> io::Result<String> {
    let mut file = fs::File::open(file)?;
    let mut hash = Hash::new(&SHA256);
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            length => hash.update(&chunk[..length]),
        }
    }
    Ok(hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// This machine's, as Go and therefore image-spec calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
