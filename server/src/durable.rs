//! Files that whoever reads them finds whole, or does not find.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, fchown},
    path::Path,
};

use anyhow::{Context as _, Result};

use crate::fault;

/// Writes a file that only the server's user can read, and returns when it would survive a power cut.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let write = || {
        let temporary = path.with_extension("new");
        // Left by a crash.
        let _ = fs::remove_file(&temporary);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fault::point("file-written");
        fs::rename(&temporary, path)?;
        path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

/// Writes a file so that whoever reads it sees the old content or the new one. A power cut may take the new one back.
pub(crate) fn write_atomically(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    write_atomically_for(None, path, content, mode)
}

/// The same for a file that belongs to another user.
pub(crate) fn write_atomically_for(uid: Option<u32>, path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    if uid.is_some() {
        fchown(&file, uid, uid)?;
    }
    drop(file);
    fs::rename(&temporary, path).with_context(|| format!("writing {}", path.display()))
}
