//! What operators do with users, organisations and tokens, on the data directory. A server that runs on it notices what
//! ends within a second.

use anyhow::{Context as _, Result, ensure};
use clap::Subcommand;
use jiff::Timestamp;
use loom_api::{Secret, login::TokenKind};

use crate::{config::Settings, names::is_dns_label, sign_in, store::Store};

/// Manages users.
#[derive(Debug, Subcommand)]
pub enum User {
    /// Adds a user, and prints a token that signs in once.
    Add {
        /// The user's name: lower-case letters, digits and dashes.
        name: String,
    },
    /// Lists users.
    List,
    /// Prints another token that signs in once, for a user who has lost every other way in.
    Token {
        /// The user's name.
        name: String,
    },
    /// Takes all rights of a user's away until `resume`; the user's weavers go on running.
    Suspend {
        /// The user's name.
        name: String,
    },
    /// Gives a suspended user's rights back.
    Resume {
        /// The user's name.
        name: String,
    },
    /// Removes a user for good, with tokens, devices, memberships and the weavers in the personal organisation.
    ///
    /// Weavers in other organisations stay. The name is not free again, so that nobody is taken for its former owner.
    Remove {
        /// The user's name.
        name: String,
    },
}

/// Manages organisations, whose members share their weavers.
#[derive(Debug, Subcommand)]
pub enum Org {
    /// Makes an organisation.
    Create {
        /// Its name: lower-case letters, digits and dashes.
        name: String,
    },
    /// Lists organisations with their members.
    List,
    /// Makes a user a member.
    AddMember {
        /// The organisation's name.
        org: String,
        /// The user's name.
        user: String,
    },
    /// Ends a membership; the weavers that the user made there stay.
    RemoveMember {
        /// The organisation's name.
        org: String,
        /// The user's name.
        user: String,
    },
}

/// Manages users' tokens.
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Lists tokens, and when each was last used.
    List {
        /// Only this user's.
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
    },
    /// Ends a token, and everything that was opened with it.
    Revoke {
        /// Its number in the list.
        id: i64,
    },
}

/// A command of an operator's.
#[derive(Debug)]
pub enum Command {
    /// About users.
    User(User),
    /// About organisations.
    Org(Org),
    /// About tokens.
    Token(Token),
}

/// Does what the operator asks for.
///
/// # Errors
///
/// Says what is wrong with the settings or the command.
pub async fn run(settings: Settings, command: Command) -> Result<()> {
    let config = settings.resolve()?;
    let path = config.data_dir.join("loom.db");
    ensure!(path.exists(), "there is no server's database at {}; name its directory with --data-dir", path.display());
    let store = Store::open(&path).await.with_context(|| format!("opening {}", path.display()))?;
    let done = match command {
        Command::User(command) => user(&store, command).await,
        Command::Org(command) => org(&store, command).await,
        Command::Token(command) => token(&store, command).await,
    };
    // The token in the file may have been revoked, or its user removed. Before the first user is made, it is not spent.
    if store.has_users().await? {
        sign_in::remove_spent_file(&store, &config.data_dir).await;
    }
    store.close().await;
    done
}

async fn user(store: &Store, command: User) -> Result<()> {
    match command {
        User::Add { name } => {
            label("user", &name)?;
            let print = |token: &Secret| {
                println!("{}", token.expose());
                Ok(())
            };
            store.add_user_with_token(&name, sign_in::NAME, print).await?;
        }
        User::List => {
            let mut rows = vec![["NAME", "ADDED", "STATE"].map(str::to_owned)];
            for user in store.users().await? {
                let state =
                    user.suspended_at.map_or_else(|| "active".to_owned(), |at| format!("suspended {}", day(at)));
                rows.push([user.name, day(user.created_at), state]);
            }
            print(&rows);
        }
        User::Token { name } => {
            let user = store.user_named(&name).await?;
            println!("{}", store.add_user_token(user, sign_in::NAME, TokenKind::SignIn, None).await?.expose());
        }
        User::Suspend { name } => store.suspend_user(&name).await?,
        User::Resume { name } => store.resume_user(&name).await?,
        User::Remove { name } => store.remove_user(&name).await?,
    }
    Ok(())
}

async fn org(store: &Store, command: Org) -> Result<()> {
    match command {
        Org::Create { name } => {
            label("organisation", &name)?;
            store.add_org(&name).await?;
        }
        Org::List => {
            let mut rows = vec![["NAME", "KIND", "MEMBERS"].map(str::to_owned)];
            for org in store.orgs().await? {
                let kind = if org.personal { "personal" } else { "shared" };
                rows.push([org.name, kind.to_owned(), org.members.join(", ")]);
            }
            print(&rows);
        }
        Org::AddMember { org, user } => store.add_member(&org, &user).await?,
        Org::RemoveMember { org, user } => store.remove_member(&org, &user).await?,
    }
    Ok(())
}

async fn token(store: &Store, command: Token) -> Result<()> {
    match command {
        Token::List { user } => {
            if let Some(user) = &user {
                store.user_named(user).await?;
            }
            let mut rows = vec![["ID", "USER", "NAME", "KIND", "LAST USED", "ENDS"].map(str::to_owned)];
            for (owner, token) in store.all_tokens().await? {
                if user.as_ref().is_some_and(|user| *user != owner) {
                    continue;
                }
                let kind = match token.kind {
                    TokenKind::SignIn => "sign-in",
                    TokenKind::Login => "login",
                    TokenKind::Api | TokenKind::Unknown => "api",
                };
                let time = |at: Option<Timestamp>| at.map_or_else(|| "never".to_owned(), minute);
                let (used, ends) = (time(token.last_used_at), time(token.expires_at));
                rows.push([token.id.to_string(), owner, token.name, kind.to_owned(), used, ends]);
            }
            print(&rows);
        }
        Token::Revoke { id } => {
            ensure!(store.remove_any_token(id).await?, "there is no token {id}; see: loom-server token list");
        }
    }
    Ok(())
}

fn label(what: &str, name: &str) -> Result<()> {
    ensure!(is_dns_label(name), "{name:?} cannot be the name of a {what}: use lower-case letters, digits and dashes");
    Ok(())
}

fn day(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d").to_string()
}

fn minute(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M").to_string()
}

/// Prints a table whose columns are as wide as their widest cell.
fn print<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Names come from clients; a terminal must not obey them.
            let cell: String = cell.chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect();
            line.push_str(&format!("{cell:width$}  "));
        }
        println!("{}", line.trim_end());
    }
}
