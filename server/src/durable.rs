//! Files that are whole or not there, also after a crash.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
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
