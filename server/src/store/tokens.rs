//! Bearer tokens: how they are made, whose they are, and how they end.
//!
//! Only their hashes are kept. Whatever takes a right away (a token, a user, a membership) also advances the identity
//! revision in the same transaction, so that a running server notices, also when another process did it.

use jiff::{SignedDuration, Timestamp};
use loom_api::{
    OrgId, Secret, UserId, WeaverId,
    login::{Organisation, TokenInfo, TokenKind, User},
};
use sqlx::{Sqlite, Transaction};

use super::{Store, millis, parsed, timestamp};
use crate::secrets::{hash, new_token};

/// The last use of a token is written down at most this often.
const USE_NOTED: SignedDuration = SignedDuration::from_mins(1);
/// The end of a login is moved at most this often.
const RENEWAL: SignedDuration = SignedDuration::from_hours(1);
/// The most tokens of one user.
const MAX_TOKENS: u32 = 200;

/// Whose a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenOwner {
    /// A user's, with the organisations that the user is a member of.
    User(User, Vec<Organisation>),
    /// A user who may do nothing until an operator says otherwise.
    Suspended(User),
    /// The agent's of a weaver.
    Agent(WeaverId),
}

/// A token that is good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its number, never used twice.
    pub id: i64,
    /// What a user's token is for.
    pub kind: Option<TokenKind>,
    pub owner: TokenOwner,
    pub expires_at: Option<Timestamp>,
    last_used_at: Option<Timestamp>,
    /// The identity revision at which it was looked up.
    pub revision: i64,
}

/// Why a token was not made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The user has as many as it may.
    #[error("a user may have {MAX_TOKENS} tokens at a time")]
    TooMany,
    /// The token that it was to be exchanged for, or the user, has gone meanwhile.
    #[error("the token is unknown, expired or revoked")]
    Gone,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

#[derive(sqlx::FromRow)]
struct TokenRow {
    id: i64,
    kind: String,
    user_id: Option<String>,
    weaver_id: Option<String>,
    expires_at: Option<i64>,
    last_used_at: Option<i64>,
    user_name: Option<String>,
    suspended_at: Option<i64>,
    revision: i64,
}

/// A user's token in a list: number, user, name, kind, when it was made, ends, and was last used.
type ListedToken = (i64, String, String, String, i64, Option<i64>, Option<i64>);

impl Store {
    /// Makes a token of a user's.
    pub async fn add_user_token(
        &self,
        user: UserId,
        name: &str,
        kind: TokenKind,
        expires_at: Option<Timestamp>,
    ) -> Result<Secret, TokenError> {
        let mut transaction = self.begin_write().await?;
        let token = insert(&mut transaction, user, name, kind, expires_at).await?;
        transaction.commit().await?;
        Ok(token)
    }

    /// Exchanges a sign-in token for a login, which ends the former.
    pub async fn exchange_sign_in(
        &self,
        user: UserId,
        sign_in: i64,
        name: &str,
        expires_at: Timestamp,
    ) -> Result<Secret, TokenError> {
        let mut transaction = self.begin_write().await?;
        if !delete(&mut transaction, sign_in, Some(user)).await? {
            return Err(TokenError::Gone);
        }
        let token = insert(&mut transaction, user, name, TokenKind::Login, Some(expires_at)).await?;
        transaction.commit().await?;
        Ok(token)
    }

    /// Makes the token of a weaver's agent; the one it had before ends, with all that was opened with it.
    pub async fn replace_agent_token(&self, weaver: WeaverId) -> sqlx::Result<Secret> {
        let token = new_token();
        let mut transaction = self.begin_write().await?;
        let replaced = sqlx::query("DELETE FROM tokens WHERE weaver_id = ?")
            .bind(weaver.to_string())
            .execute(&mut *transaction)
            .await?;
        sqlx::query("INSERT INTO tokens (hash, name, kind, weaver_id, created_at) VALUES (?, 'agent', 'agent', ?, ?)")
            .bind(hash(token.expose()))
            .bind(weaver.to_string())
            .bind(millis(Timestamp::now()))
            .execute(&mut *transaction)
            .await?;
        if replaced.rows_affected() > 0 {
            advance_revision(&mut transaction).await?;
        }
        transaction.commit().await?;
        Ok(token)
    }

    /// Whose a bearer token is. It is looked up by its hash, so the comparison tells nothing about the token.
    pub async fn token(&self, token: &str) -> sqlx::Result<Option<Token>> {
        self.token_with_hash(&hash(token)).await
    }

    /// Whose the bearer token with a hash is.
    pub async fn token_with_hash(&self, hash: &str) -> sqlx::Result<Option<Token>> {
        let row: Option<TokenRow> = sqlx::query_as(
            "SELECT t.id, t.kind, t.user_id, t.weaver_id, t.expires_at, t.last_used_at, u.name AS user_name, \
             u.suspended_at, (SELECT number FROM identity_revision) AS revision \
             FROM tokens t LEFT JOIN users u ON u.id = t.user_id \
             WHERE t.hash = ? AND (t.expires_at IS NULL OR t.expires_at > ?)",
        )
        .bind(hash)
        .bind(millis(Timestamp::now()))
        .fetch_optional(self.reader())
        .await?;
        let Some(row) = row else { return Ok(None) };
        let owner = match (row.user_id, row.user_name, row.weaver_id) {
            (Some(id), Some(name), None) => {
                let user = User { id: parsed(&id)?, name };
                if row.suspended_at.is_some() {
                    TokenOwner::Suspended(user)
                } else {
                    let organisations = self.organisations(user.id).await?;
                    TokenOwner::User(user, organisations)
                }
            }
            (None, _, Some(weaver)) => TokenOwner::Agent(parsed(&weaver)?),
            _ => return Err(sqlx::Error::Decode("a token belongs to a user or to an agent".into())),
        };
        Ok(Some(Token {
            id: row.id,
            kind: matches!(owner, TokenOwner::User(..) | TokenOwner::Suspended(_)).then(|| kind(&row.kind)),
            owner,
            expires_at: row.expires_at.map(timestamp).transpose()?,
            last_used_at: row.last_used_at.map(timestamp).transpose()?,
            revision: row.revision,
        }))
    }

    /// Writes down that a user's token was used, and renews a login, which lives for `login_life` after its last use.
    /// Most calls find that there is nothing to write yet.
    pub async fn note_use(&self, token: &Token, login_life: SignedDuration) -> sqlx::Result<()> {
        let Some(kind) = token.kind else { return Ok(()) };
        let now = Timestamp::now();
        let renewed = now + login_life;
        let renews = kind == TokenKind::Login && token.expires_at.is_none_or(|end| renewed > end + RENEWAL);
        let noted = token.last_used_at.is_some_and(|at| now < at + USE_NOTED);
        if noted && !renews {
            return Ok(());
        }
        let expires_at = if renews { Some(renewed) } else { token.expires_at };
        sqlx::query("UPDATE tokens SET last_used_at = ?, expires_at = ? WHERE id = ?")
            .bind(millis(now))
            .bind(expires_at.map(millis))
            .bind(token.id)
            .execute(self.writer())
            .await
            .map(drop)
    }

    /// The tokens of a user, newest first.
    pub async fn tokens(&self, user: UserId) -> sqlx::Result<Vec<TokenInfo>> {
        let all = self.listed_tokens(Some(user)).await?;
        Ok(all.into_iter().map(|(_, token)| token).collect())
    }

    /// All users' tokens, newest first, with the user's name.
    pub async fn all_tokens(&self) -> sqlx::Result<Vec<(String, TokenInfo)>> {
        self.listed_tokens(None).await
    }

    async fn listed_tokens(&self, user: Option<UserId>) -> sqlx::Result<Vec<(String, TokenInfo)>> {
        let rows: Vec<ListedToken> = sqlx::query_as(
            "SELECT t.id, u.name, t.name, t.kind, t.created_at, t.expires_at, t.last_used_at \
             FROM tokens t JOIN users u ON u.id = t.user_id \
             WHERE (? IS NULL OR t.user_id = ?) AND (t.expires_at IS NULL OR t.expires_at > ?) \
             ORDER BY t.id DESC",
        )
        .bind(user.map(|user| user.to_string()))
        .bind(user.map(|user| user.to_string()))
        .bind(millis(Timestamp::now()))
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(id, user, name, kept_kind, created_at, expires_at, last_used_at)| {
                let token = TokenInfo {
                    id,
                    name,
                    kind: kind(&kept_kind),
                    created_at: timestamp(created_at)?,
                    expires_at: expires_at.map(timestamp).transpose()?,
                    last_used_at: last_used_at.map(timestamp).transpose()?,
                };
                Ok((user, token))
            })
            .collect()
    }

    /// Ends a token of a user's; whether there was one.
    pub async fn remove_token(&self, user: UserId, id: i64) -> sqlx::Result<bool> {
        self.delete_token(id, Some(user)).await
    }

    /// Ends a token, whichever user's; whether there was one.
    pub async fn remove_any_token(&self, id: i64) -> sqlx::Result<bool> {
        self.delete_token(id, None).await
    }

    async fn delete_token(&self, id: i64, user: Option<UserId>) -> sqlx::Result<bool> {
        let mut transaction = self.begin_write().await?;
        let there_was_one = delete(&mut transaction, id, user).await?;
        transaction.commit().await?;
        Ok(there_was_one)
    }

    /// Removes users' tokens whose time is up.
    pub async fn remove_expired_tokens(&self) -> sqlx::Result<()> {
        let now = millis(Timestamp::now());
        let any: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM tokens WHERE expires_at <= ?)")
            .bind(now)
            .fetch_one(self.reader())
            .await?;
        if !any {
            return Ok(());
        }
        let mut transaction = self.begin_write().await?;
        // Looked at again by this statement, because a login may have been renewed meanwhile.
        let done = sqlx::query("DELETE FROM tokens WHERE expires_at <= ?").bind(now).execute(&mut *transaction).await?;
        if done.rows_affected() > 0 {
            advance_revision(&mut transaction).await?;
        }
        transaction.commit().await
    }

    /// Grows whenever a token, a user or a membership loses its rights.
    pub async fn identity_revision(&self) -> sqlx::Result<i64> {
        sqlx::query_scalar("SELECT number FROM identity_revision").fetch_one(self.reader()).await
    }

    /// Whether a token is (still) one that can be used.
    pub async fn has_token(&self, token: &str) -> sqlx::Result<bool> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM tokens WHERE hash = ?)")
            .bind(hash(token))
            .fetch_one(self.reader())
            .await
    }

    /// The organisations that a user is a member of, the personal one first.
    pub(super) async fn organisations(&self, user: UserId) -> sqlx::Result<Vec<Organisation>> {
        let rows: Vec<(String, String, Option<String>)> = sqlx::query_as(
            "SELECT o.id, o.name, o.owner_id FROM organisations o JOIN memberships m ON m.org_id = o.id \
             WHERE m.user_id = ? ORDER BY o.owner_id IS NULL, o.name",
        )
        .bind(user.to_string())
        .fetch_all(self.reader())
        .await?;
        rows.into_iter()
            .map(|(id, name, owner)| {
                let id: OrgId = parsed(&id)?;
                Ok(Organisation { id, name, personal: owner == Some(user.to_string()) })
            })
            .collect()
    }
}

/// Notes in a transaction that it takes a right away.
pub(super) async fn advance_revision(transaction: &mut Transaction<'_, Sqlite>) -> sqlx::Result<()> {
    sqlx::query("UPDATE identity_revision SET number = number + 1").execute(&mut **transaction).await.map(drop)
}

pub(super) async fn insert(
    transaction: &mut Transaction<'_, Sqlite>,
    user: UserId,
    name: &str,
    kind: TokenKind,
    expires_at: Option<Timestamp>,
) -> Result<Secret, TokenError> {
    let now = millis(Timestamp::now());
    let count: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM tokens WHERE user_id = ? AND (expires_at IS NULL OR expires_at > ?)")
            .bind(user.to_string())
            .bind(now)
            .fetch_one(&mut **transaction)
            .await?;
    if count >= i64::from(MAX_TOKENS) {
        return Err(TokenError::TooMany);
    }
    let token = new_token();
    let done = sqlx::query(
        "INSERT INTO tokens (hash, name, kind, user_id, created_at, expires_at) \
         SELECT ?, ?, ?, id, ?, ? FROM users WHERE id = ? AND removed_at IS NULL",
    )
    .bind(hash(token.expose()))
    .bind(name)
    .bind(kind_text(kind))
    .bind(now)
    .bind(expires_at.map(millis))
    .bind(user.to_string())
    .execute(&mut **transaction)
    .await?;
    if done.rows_affected() == 0 { Err(TokenError::Gone) } else { Ok(token) }
}

pub(super) async fn delete(
    transaction: &mut Transaction<'_, Sqlite>,
    id: i64,
    user: Option<UserId>,
) -> sqlx::Result<bool> {
    let done = sqlx::query("DELETE FROM tokens WHERE id = ? AND weaver_id IS NULL AND (? IS NULL OR user_id = ?)")
        .bind(id)
        .bind(user.map(|user| user.to_string()))
        .bind(user.map(|user| user.to_string()))
        .execute(&mut **transaction)
        .await?;
    let there_was_one = done.rows_affected() > 0;
    if there_was_one {
        advance_revision(transaction).await?;
    }
    Ok(there_was_one)
}

/// The kind of a user's token, if it is good now.
pub(super) async fn kind_of_good_one(
    transaction: &mut Transaction<'_, Sqlite>,
    id: i64,
    user: UserId,
) -> sqlx::Result<Option<TokenKind>> {
    let found: Option<String> = sqlx::query_scalar(
        "SELECT t.kind FROM tokens t JOIN users u ON u.id = t.user_id WHERE t.id = ? AND t.user_id = ? \
         AND u.suspended_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > ?)",
    )
    .bind(id)
    .bind(user.to_string())
    .bind(millis(Timestamp::now()))
    .fetch_optional(&mut **transaction)
    .await?;
    Ok(found.as_deref().map(kind))
}

const fn kind_text(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::SignIn => "sign-in",
        TokenKind::Login => "login",
        TokenKind::Api | TokenKind::Unknown => "api",
    }
}

fn kind(text: &str) -> TokenKind {
    match text {
        "sign-in" => TokenKind::SignIn,
        "login" => TokenKind::Login,
        "api" => TokenKind::Api,
        _ => TokenKind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::temporary, *};

    const LIFE: SignedDuration = SignedDuration::from_hours(90 * 24);

    async fn look_up(store: &Store, token: &Secret) -> Option<Token> {
        store.token(token.expose()).await.expect("looked up")
    }

    #[tokio::test]
    async fn a_token_works_until_it_is_removed_or_has_ended() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let token = store.add_user_token(user, "ci", TokenKind::Api, None).await.expect("made");
        let found = look_up(&store, &token).await.expect("found");
        let TokenOwner::User(found_user, organisations) = found.owner else { panic!("a user's") };
        assert_eq!((found_user.id, organisations.len(), organisations[0].personal), (user, 1, true));
        assert_eq!(store.token("loom_wrong").await.expect("looked up"), None);
        let before = store.identity_revision().await.expect("read");
        assert!(store.remove_token(user, found.id).await.expect("removed"));
        assert_eq!(look_up(&store, &token).await, None);

        let past = Timestamp::now() - SignedDuration::from_secs(1);
        let ended = store.add_user_token(user, "old", TokenKind::Api, Some(past)).await.expect("made");
        assert_eq!(look_up(&store, &ended).await, None);
        store.remove_expired_tokens().await.expect("removed");
        assert_eq!(store.identity_revision().await.expect("read"), before + 2, "both ends can be noticed");
    }

    #[tokio::test]
    async fn the_number_of_a_removed_token_is_not_used_again() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let first = store.add_user_token(user, "ci", TokenKind::Api, None).await.expect("made");
        let first = look_up(&store, &first).await.expect("found").id;
        store.remove_token(user, first).await.expect("removed");
        let second = store.add_user_token(user, "ci", TokenKind::Api, None).await.expect("made");
        assert!(look_up(&store, &second).await.expect("found").id > first);
    }

    #[tokio::test]
    async fn a_login_is_renewed_by_its_use_and_a_programs_token_is_not() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let soon = Timestamp::now() + SignedDuration::from_hours(24);
        for (kind, renewed) in [(TokenKind::Login, true), (TokenKind::Api, false)] {
            let token = store.add_user_token(user, "laptop", kind, Some(soon)).await.expect("made");
            let fresh = look_up(&store, &token).await.expect("found");
            assert_eq!(fresh.last_used_at, None);
            store.note_use(&fresh, LIFE).await.expect("noted");
            let used = look_up(&store, &token).await.expect("found");
            assert!(used.last_used_at.is_some());
            assert_eq!(used.expires_at > fresh.expires_at, renewed, "{kind:?}");
            // Used again at once: nothing is written.
            store.note_use(&used, LIFE).await.expect("noted");
            assert_eq!(look_up(&store, &token).await, Some(used));
        }
    }

    #[tokio::test]
    async fn a_sign_in_token_is_exchanged_once() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        let token = store.add_user_token(user, "first sign-in", TokenKind::SignIn, None).await.expect("made");
        let sign_in = look_up(&store, &token).await.expect("found").id;
        let end = Timestamp::now() + LIFE;
        let login = store.exchange_sign_in(user, sign_in, "laptop", end).await.expect("exchanged");
        assert_eq!(look_up(&store, &login).await.expect("found").kind, Some(TokenKind::Login));
        assert_eq!(look_up(&store, &token).await, None);
        let again = store.exchange_sign_in(user, sign_in, "laptop", end).await;
        assert!(matches!(again, Err(TokenError::Gone)));
    }

    #[tokio::test]
    async fn a_user_has_a_bounded_number_of_tokens() {
        let (_directory, store) = temporary().await;
        let user = store.add_user("ada").await.expect("added");
        for _ in 0..MAX_TOKENS {
            store.add_user_token(user, "ci", TokenKind::Api, None).await.expect("made");
        }
        let another = store.add_user_token(user, "ci", TokenKind::Api, None).await;
        assert!(matches!(another, Err(TokenError::TooMany)));
    }
}
