//! Disk space that is kept for what must always be possible: ending weavers and taking rights back.
//!
//! A file beside the database holds it. When the disk fills up, the file is removed, so that there is room for small
//! writes again, and everything that only adds to the database is refused until there is space.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::fs::statvfs;

/// The size of the reserve, in bytes: thousands of ends of weavers.
const RESERVE: u64 = 8 << 20;
/// With less than this free the disk counts as full.
const LOW: u64 = 4 << 20;
/// Between two looks at the disk. The look itself takes microseconds.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(super) struct Space {
    directory: PathBuf,
    is_low: Arc<AtomicBool>,
}

impl Space {
    /// The space beside a database, as it is now.
    pub(super) fn beside(database: &Path) -> Self {
        let directory = database.parent().map_or_else(|| PathBuf::from("."), Path::to_owned);
        let space = Self { directory, is_low: Arc::default() };
        space.look();
        space
    }

    pub(super) fn is_low(&self) -> bool {
        self.is_low.load(Ordering::Relaxed)
    }

    /// Looks at the disk again and again, until it is dropped.
    pub(super) async fn watch(&self) {
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            self.look();
        }
    }

    fn look(&self) {
        let file = self.directory.join("reserve");
        let held = fs::metadata(&file).map_or(0, |metadata| metadata.len());
        let free = match statvfs(&self.directory) {
            Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
            Err(error) => {
                tracing::error!("how full the disk is cannot be found out: {error}");
                return;
            }
        };
        if free < LOW {
            if !self.is_low.swap(true, Ordering::Relaxed) {
                tracing::error!("the disk is full: nothing new is taken on until there is space");
            }
            // It may never have been made.
            let _ = fs::remove_file(&file);
        } else if held < RESERVE && free >= LOW + 2 * RESERVE {
            if let Err(error) = fill(&file) {
                tracing::error!("space cannot be kept in reserve: {error}");
            } else if self.is_low.swap(false, Ordering::Relaxed) {
                tracing::info!("there is space on the disk again");
            }
        }
    }
}

/// Writes the reserve. Real bytes, not a hole: they are what is given back.
fn fill(file: &Path) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?;
    let block = vec![0x5a; 1 << 20];
    for _ in 0..RESERVE / (1 << 20) {
        file.write_all(&block)?;
    }
    file.sync_all()
}
