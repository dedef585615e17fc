//! The first way in: a token that signs in once, in a file that only the server's user can read.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::Result;
use loom_api::Secret;

use crate::{durable, fault, store::Store};

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
    let path = data.join(FILE);
    // The file comes first: a user whose token nobody knows could never sign in.
    let keep = |token: &Secret| {
        durable::write(&path, token.expose().as_bytes())?;
        fault::point("sign-in-token-written");
        Ok(())
    };
    store.add_user_with_token("admin", NAME, keep).await?;
    fault::point("first-user-made");
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
