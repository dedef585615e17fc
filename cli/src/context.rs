//! What every command starts from: the settings, and the client for the server.
//!
//! A setting comes from the command line, else from `LOOM_*` in the environment, else from
//! `$XDG_CONFIG_HOME/loom/config.toml`, else it has its default. All are read before anything starts, and an unknown key
//! is an error. The default server is that of the last `loom login`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use loom_api::{Secret, client::Client};
use serde::Deserialize;

use crate::{
    cli::GlobalArgs,
    credentials::Credentials,
    error::{CliError, Exit},
};

const SETTINGS_FILE: &str = "config.toml";

/// The settings from the file and the environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) server_url: Option<String>,
    /// The image of new weavers; by default the server's.
    pub(crate) image: Option<String>,
    /// The organisation of new weavers, by name or id; by default the personal one.
    pub(crate) org: Option<String>,
    /// The lifetime of new weavers, in the form of `--ttl`.
    pub(crate) ttl: Option<String>,
    /// The keys that detach from a terminal, in the form of `--detach-keys`.
    pub(crate) detach_keys: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) settings: Settings,
    /// From `LOOM_TOKEN`; takes precedence over stored tokens.
    token: Option<Secret>,
    /// `$XDG_CONFIG_HOME/loom`; `None` if neither that variable nor `HOME` is set.
    directory: Option<PathBuf>,
}

impl Context {
    /// Reads the settings.
    ///
    /// # Errors
    ///
    /// When the settings file cannot be read or has an unknown key.
    pub(crate) fn load(flags: &GlobalArgs) -> Result<Self, CliError> {
        Self::from_parts(flags, |name| env::var(name).ok())
    }

    fn from_parts(flags: &GlobalArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Self, CliError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let directory = configuration_directory(&variable);
        let file = match &directory {
            Some(directory) => read_settings(&directory.join(SETTINGS_FILE))?,
            None => Settings::default(),
        };
        let settings = Settings {
            server_url: flags.server_url.clone().or_else(|| variable("LOOM_SERVER_URL")).or(file.server_url),
            image: variable("LOOM_IMAGE").or(file.image),
            org: variable("LOOM_ORG").or(file.org),
            ttl: variable("LOOM_TTL").or(file.ttl),
            detach_keys: variable("LOOM_DETACH_KEYS").or(file.detach_keys),
        };
        let token = variable("LOOM_TOKEN").map(|token| Secret::from(token.trim().to_owned()));
        Ok(Self { settings, token, directory })
    }

    /// The server's URL, without a trailing slash.
    ///
    /// # Errors
    ///
    /// When no setting names one and there was no login.
    pub(crate) fn server_url(&self) -> Result<String, CliError> {
        let url = match &self.settings.server_url {
            Some(url) => Some(url.clone()),
            None => self.credentials()?.default_server().map(str::to_owned),
        };
        let url = url.ok_or_else(|| {
            CliError::new(Exit::NOT_LOGGED_IN, "no server is known: you have not logged in yet")
                .hint("log in with: loom login --server-url https://YOUR-SERVER")
        })?;
        Ok(url.trim_end_matches('/').to_owned())
    }

    /// The bearer token for the server.
    pub(crate) fn token(&self) -> Result<Secret, CliError> {
        let url = self.server_url()?;
        let kept = match &self.token {
            Some(token) => Some(token.clone()),
            None => self.credentials()?.token(&url),
        };
        kept.ok_or_else(|| {
            CliError::new(Exit::NOT_LOGGED_IN, format!("not logged in to {url}"))
                .hint("log in with: loom login (or set LOOM_TOKEN)")
        })
    }

    /// Whether the token comes from `LOOM_TOKEN`.
    pub(crate) const fn token_is_from_environment(&self) -> bool {
        self.token.is_some()
    }

    /// The CA certificates (PEM) that the user trusts for the server, besides the system's.
    ///
    /// # Errors
    ///
    /// When no server is known, or the credentials cannot be read.
    pub(crate) fn authorities(&self) -> Result<String, CliError> {
        let url = self.server_url()?;
        // With the token and the server in the environment, there may be no readable home directory.
        match self.credentials() {
            Ok(credentials) => Ok(credentials.authorities(&url).to_owned()),
            Err(_) if self.token.is_some() => Ok(String::new()),
            Err(error) => Err(error),
        }
    }

    /// A client with the user's token.
    pub(crate) fn client(&self) -> Result<Client, CliError> {
        Ok(Client::with_ca_certificates(&self.server_url()?, Some(self.token()?), &self.authorities()?)?)
    }

    /// A client without a token.
    pub(crate) fn anonymous_client(&self) -> Result<Client, CliError> {
        Ok(Client::with_ca_certificates(&self.server_url()?, None, &self.authorities()?)?)
    }

    /// See [`Credentials::read`].
    pub(crate) fn credentials(&self) -> Result<Credentials, CliError> {
        match &self.directory {
            Some(directory) => Credentials::read(directory),
            None => Ok(Credentials::default()),
        }
    }

    /// The directory of settings and credentials.
    pub(crate) fn directory(&self) -> Result<&Path, CliError> {
        self.directory.as_deref().ok_or_else(|| {
            CliError::failure("no directory for settings: neither XDG_CONFIG_HOME nor HOME is set")
                .hint("set HOME, or give the token in LOOM_TOKEN and the server in LOOM_SERVER_URL")
        })
    }
}

/// `$XDG_CONFIG_HOME/loom`, else `~/.config/loom`. The XDG Base Directory Specification says to ignore relative paths.
fn configuration_directory(variable: &impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(base.join("loom"))
}

fn read_settings(path: &Path) -> Result<Settings, CliError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Settings::default()),
        Err(error) => return Err(CliError::usage(format!("cannot read {}: {error}", path.display()))),
    };
    toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
        CliError::usage(format!("cannot use {}: line {line}: {}", path.display(), error.message()))
            .hint("known settings: server_url, image, org, ttl, detach_keys")
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn load(directory: &Path, flag: Option<&str>, variables: &[(&str, &str)]) -> Result<Context, CliError> {
        let home = directory.to_str().expect("UTF-8");
        let mut all: HashMap<&str, &str> = variables.iter().copied().collect();
        all.insert("XDG_CONFIG_HOME", home);
        let flags = GlobalArgs { server_url: flag.map(str::to_owned) };
        Context::from_parts(&flags, |name| all.get(name).map(|value| (*value).to_owned()))
    }

    fn configured(text: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("loom")).expect("made");
        fs::write(directory.path().join("loom/config.toml"), text).expect("written");
        directory
    }

    #[test]
    fn flags_override_the_environment_which_overrides_the_file() {
        let directory = configured("server_url = \"https://file.example/\"\nttl = \"2\"\n");
        let url = |flag, variables: &[(&str, &str)]| {
            load(directory.path(), flag, variables).expect("loads").server_url().expect("a server")
        };
        let environment = [("LOOM_SERVER_URL", "https://env.example")];
        assert_eq!(url(Some("https://flag.example"), &environment), "https://flag.example");
        assert_eq!(url(None, &environment), "https://env.example");
        assert_eq!(url(None, &[("LOOM_SERVER_URL", "")]), "https://file.example");
        let settings = load(directory.path(), None, &[("LOOM_TTL", "3")]).expect("loads").settings;
        assert_eq!((settings.ttl.as_deref(), settings.image), (Some("3"), None));
    }

    #[test]
    fn the_last_login_names_the_server_when_nothing_else_does() {
        let directory = configured("");
        let context = load(directory.path(), None, &[]).expect("loads");
        assert_eq!(context.server_url().expect_err("none").exit(), Exit::NOT_LOGGED_IN);
        let mut credentials = context.credentials().expect("readable");
        credentials.remember("https://login.example", "secret".to_owned().into());
        credentials.write(context.directory().expect("one")).expect("written");
        assert_eq!(context.server_url().expect("a server"), "https://login.example");
        assert_eq!(context.token().expect("a token").expose(), "secret");
    }

    #[test]
    fn the_token_in_the_environment_wins() {
        let directory = configured("server_url = \"https://a.example\"");
        let context = load(directory.path(), None, &[("LOOM_TOKEN", "from-env\n")]).expect("loads");
        assert_eq!(context.token().expect("a token").expose(), "from-env");
        let context = load(directory.path(), None, &[]).expect("loads");
        let error = context.token().expect_err("none");
        assert_eq!(error.exit(), Exit::NOT_LOGGED_IN);
        assert!(error.lines(false).contains("loom login"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_a_usage_error_that_names_it_and_its_line() {
        let directory = configured("ttl = \"4\"\nserver = \"https://x.example\"\n");
        let error = load(directory.path(), None, &[]).expect_err("an error");
        assert_eq!(error.exit(), Exit::USAGE);
        let text = error.lines(false);
        assert!(text.contains("line 2") && text.contains("`server`") && text.contains("server_url"), "{text}");
    }
}
