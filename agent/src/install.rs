//! `install DIR`: copies the binary to where the user's container finds it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::Context as _;

/// Copies the running executable to `DIR/loom-agent` atomically.
///
/// # Errors
///
/// When the executable cannot be read or the directory cannot be written.
pub fn install(directory: &Path) -> anyhow::Result<()> {
    let target = directory.join("loom-agent");
    let temporary = directory.join(format!(".loom-agent.{}", std::process::id()));
    let result = copy(&temporary).and_then(|()| fs::rename(&temporary, &target));
    if result.is_err() {
        // Report the first error; this one may only mean that the temporary file was never created.
        let _ = fs::remove_file(&temporary);
    }
    result.with_context(|| format!("cannot install the agent as {}", target.display()))?;
    // Makes the rename durable.
    File::open(directory).and_then(|directory| directory.sync_all()).context("cannot flush the directory")
}

fn copy(temporary: &Path) -> io::Result<()> {
    let mut source = File::open("/proc/self/exe")?;
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o755).open(temporary)?;
    io::copy(&mut source, &mut target)?;
    // Independent of the umask: any user of the container must be able to execute it.
    target.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    target.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_copy_is_whole_executable_and_alone() {
        let directory = tempfile::tempdir().unwrap();
        install(directory.path()).unwrap();
        install(directory.path()).unwrap();
        let target = directory.path().join("loom-agent");
        assert_eq!(fs::read(&target).unwrap(), fs::read("/proc/self/exe").unwrap());
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_directory_is_told() {
        let error = install(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/loom-agent"), "{error}");
    }
}
