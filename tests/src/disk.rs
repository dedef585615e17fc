//! Small file systems in memory, which only an administrator may mount.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

/// A mounted tmpfs, until it is dropped.
pub struct Disk(tempfile::TempDir);

impl Disk {
    /// Mounts one with the options of mount(8), such as `size=512m` or `noexec`. Everybody may enter it.
    pub fn mount(options: &str) -> Result<Self> {
        let disk = Self(tempfile::Builder::new().prefix("loom-disk-").tempdir_in("/tmp")?);
        let options = format!("mode=711,{options}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(disk.path()).status()?;
        ensure!(status.success(), "mounting a tmpfs: {status}");
        Ok(disk)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Writes until nothing more fits.
    pub fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.filler())?;
        let block = vec![1; 64 << 10];
        while file.write_all(&block).is_ok() {}
        Ok(())
    }

    /// Takes back what filled it.
    pub fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}
