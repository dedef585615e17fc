//! The first way in: a token that signs in once, in a file that only the server's user can read.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use loom_api::login::TokenKind;

use crate::store::Store;

/// The file, below the data directory.
const FILE: &str = "admin.token";

/// What sign-in tokens are called in lists.
pub(crate) const NAME: &str = "first sign-in";

/// Makes the user `admin` when there is none yet, with a token to sign in with.
///
/// # Errors
///
/// When the database or the file cannot be written.
pub(crate) async fn make_first_user(store: &Store, data: &Path) -> Result<()> {
    if store.has_users().await? {
        remove_spent_file(store, data).await;
        return Ok(());
    }
    let user = store.add_user("admin").await?;
    let token = store.add_user_token(user, NAME, TokenKind::SignIn, None).await?;
    let path = data.join(FILE);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("writing {}", path.display()))?;
    file.write_all(token.expose().as_bytes())?;
    tracing::info!("made the user admin; the token in {} signs in once", path.display());
    Ok(())
}

/// Removes the file with the first sign-in token once that was used.
pub(crate) async fn remove_spent_file(store: &Store, data: &Path) {
    let path = data.join(FILE);
    let removed = async {
        let token = match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            read => read?,
        };
        if !store.has_token(token.trim()).await? {
            fs::remove_file(&path)?;
        }
        anyhow::Ok(())
    };
    if let Err(error) = removed.await {
        tracing::warn!("{} could not be removed: {error:#}", path.display());
    }
}
