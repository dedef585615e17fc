//! What an image is, from its registry: the digest that its name stands for now, and the program that it runs.
//!
//! The host is PID 1 in the user's container, so Kubernetes does not start the image's own program; the agent does, and
//! has to be told which. The pod is then pinned to the digest that this was read from.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context as TaskContext, Poll},
    time::Duration,
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use oci_client::{
    Client, Reference,
    client::{ClientConfig, ClientProtocol},
    errors::{OciDistributionError, OciErrorCode},
    secrets::RegistryAuth,
};
use serde::Deserialize;
use tokio::{io::AsyncWrite, time::timeout};

use super::Config;
use crate::provision::{ProvisionError, ResolvedImage};

/// How long one try to read an image may take.
const TRY: Duration = Duration::from_secs(10);
/// Before the second and the third try.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// The largest image configuration that is read, in bytes.
const MAX_CONFIG: usize = 1 << 20;
/// What is said of an image that its registry does not have.
const NO_SUCH_IMAGE: &str = "there is no such image";
/// What is said of one that its registry does not show.
const NO_ACCESS: &str = "the registry wants other credentials, or there is no such image";
/// Images that are remembered by their digests.
const REMEMBERED: usize = 1024;

/// Reads images, with the pull secrets that their pods use.
pub(super) struct Images {
    secrets: Api<Secret>,
    pull_secrets: Vec<String>,
    plain_http: Vec<String>,
    /// The program of each image that was read, by digest: a digest never changes its meaning.
    commands: Mutex<HashMap<String, Vec<String>>>,
}

impl Images {
    pub(super) fn new(client: kube::Client, config: &Config) -> Self {
        Self {
            secrets: Api::namespaced(client, &config.namespace),
            pull_secrets: config.pull_secrets.clone(),
            plain_http: config.plain_http_registries.clone(),
            commands: Mutex::default(),
        }
    }

    /// Finds out what an image is.
    ///
    /// # Errors
    ///
    /// [`ProvisionError::Refused`] when the registry says no, or says nothing at several tries.
    pub(super) async fn resolve(&self, image: &str) -> Result<ResolvedImage, ProvisionError> {
        let reference: Reference = image.parse().map_err(|error| refused(image, &format!("{error}")))?;
        let auth = self.auth(reference.resolve_registry()).await?;
        let mut pauses = PAUSES.into_iter();
        loop {
            let problem = match timeout(TRY, self.read(&reference, &auth)).await {
                Ok(Ok(resolved)) => return Ok(resolved),
                Ok(Err(error)) if is_final(&error) => return Err(refused(image, &in_words(&error))),
                Ok(Err(error)) => in_words(&error),
                Err(_) => format!("the registry did not answer within {} s", TRY.as_secs()),
            };
            match pauses.next() {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(refused(image, &problem)),
            }
        }
    }

    async fn read(&self, reference: &Reference, auth: &RegistryAuth) -> Result<ResolvedImage, OciDistributionError> {
        let client = Client::new(ClientConfig {
            protocol: ClientProtocol::HttpsExcept(self.plain_http.clone()),
            connect_timeout: Some(TRY),
            user_agent: concat!("loom-server/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        });
        let digest = match reference.digest() {
            Some(digest) => digest.to_owned(),
            None => client.fetch_manifest_digest(reference, auth).await?,
        };
        let pinned = reference.clone_with_digest(digest.clone());
        let known = self.commands.lock().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        let command = match known {
            Some(command) => command,
            None => {
                let (manifest, _) = client.pull_image_manifest(&pinned, auth).await?;
                let mut config = Bounded(Vec::new());
                client.pull_blob(&pinned, &manifest.config, &mut config).await?;
                let command = serde_json::from_slice::<ImageConfig>(&config.0)?.config.command();
                let mut commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
                if commands.len() >= REMEMBERED {
                    commands.clear();
                }
                commands.insert(digest, command.clone());
                command
            }
        };
        Ok(ResolvedImage { pinned: pinned.whole(), command })
    }

    /// Who to be for a registry: from the first pull secret that knows it.
    async fn auth(&self, registry: &str) -> Result<RegistryAuth, ProvisionError> {
        for name in &self.pull_secrets {
            let secret = self.secrets.get_opt(name).await.with_context(|| format!("reading the pull secret {name}"))?;
            let Some(data) = secret.and_then(|secret| secret.data?.remove(".dockerconfigjson")) else {
                tracing::warn!("there is no pull secret {name} of the type kubernetes.io/dockerconfigjson");
                continue;
            };
            // Its content is nobody's to read in an error.
            let config: DockerConfig = serde_json::from_slice(&data.0)
                .map_err(|_| anyhow::anyhow!("the pull secret {name} cannot be read"))?;
            if let Some(auth) = config.auth(registry) {
                return Ok(auth);
            }
        }
        Ok(RegistryAuth::Anonymous)
    }
}

fn refused(image: &str, problem: &str) -> ProvisionError {
    let way_out = match problem {
        NO_SUCH_IMAGE => "look at its name and its tag",
        _ => "with a command (loom new --image … -- CMD) it need not be",
    };
    ProvisionError::Refused(format!("the image {image} cannot be read: {problem}; {way_out}"))
}

/// Whether another try would end the same.
fn is_final(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => false,
        OciDistributionError::ServerError { code, .. } => *code < 500 && *code != 429,
        OciDistributionError::RegistryError { envelope, .. } => {
            !envelope.errors.iter().any(|error| error.code == OciErrorCode::Toomanyrequests)
        }
        _ => true,
    }
}

fn in_words(error: &OciDistributionError) -> String {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => NO_SUCH_IMAGE.to_owned(),
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => {
            NO_ACCESS.to_owned()
        }
        OciDistributionError::RegistryError { envelope, .. } => {
            let codes = || envelope.errors.iter().map(|error| &error.code);
            if codes().any(|code| matches!(code, OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown)) {
                NO_SUCH_IMAGE.to_owned()
            } else if codes().any(|code| matches!(code, OciErrorCode::Unauthorized | OciErrorCode::Denied)) {
                NO_ACCESS.to_owned()
            } else {
                envelope.errors.iter().map(|error| error.message.as_str()).collect::<Vec<_>>().join("; ")
            }
        }
        OciDistributionError::ServerError { code: 404, .. } => NO_SUCH_IMAGE.to_owned(),
        OciDistributionError::ServerError { code, .. } => format!("the registry answered {code}"),
        OciDistributionError::RequestError(error) => {
            let cause = anyhow::Chain::new(error).last().unwrap_or(error);
            format!("the registry cannot be reached: {cause}")
        }
        other => other.to_string(),
    }
}

/// The part of an image's configuration (image-spec, config.md) that says what it runs.
#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default)]
    config: Execution,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Execution {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
}

impl Execution {
    fn command(self) -> Vec<String> {
        self.entrypoint.into_iter().chain(self.cmd).flatten().collect()
    }
}

/// What `docker login` writes.
#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl DockerConfig {
    fn auth(&self, registry: &str) -> Option<RegistryAuth> {
        let host = |key: &str| {
            let key = key.trim_start_matches("https://").trim_start_matches("http://");
            key.split('/').next().unwrap_or_default().to_owned()
        };
        let same = |key: &str| {
            let key = host(key);
            // Docker's own registry goes by several names.
            key == registry || (key == "docker.io" && registry == "index.docker.io")
        };
        let auth = self.auths.iter().find(|(key, _)| same(key)).map(|(_, auth)| auth)?;
        if let (Some(username), Some(password)) = (&auth.username, &auth.password) {
            return Some(RegistryAuth::Basic(username.clone(), password.clone()));
        }
        let decoded = String::from_utf8(STANDARD.decode(auth.auth.as_ref()?).ok()?).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(RegistryAuth::Basic(username.to_owned(), password.to_owned()))
    }
}

/// A buffer that takes no more than an image's configuration may be long: a registry may send anything.
struct Bounded(Vec<u8>);

impl AsyncWrite for &mut Bounded {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.0.len() + bytes.len() > MAX_CONFIG {
            return Poll::Ready(Err(io::Error::other("the image's configuration is too large")));
        }
        self.0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entrypoint_and_cmd_are_one_command() {
        let command = |text: &str| serde_json::from_str::<ImageConfig>(text).unwrap().config.command();
        assert_eq!(command(r#"{"config": {"Entrypoint": ["/run.sh"], "Cmd": ["serve"]}}"#), ["/run.sh", "serve"]);
        assert_eq!(command(r#"{"config": {"Entrypoint": null, "Cmd": ["bash"]}}"#), ["bash"]);
        assert!(command(r#"{"architecture": "amd64"}"#).is_empty());
    }

    #[test]
    fn pull_secrets_are_found_by_registry() {
        let config: DockerConfig = serde_json::from_str(
            r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpw"}, "r.example:5000": {"username": "a", "password": "b"}}}"#,
        )
        .unwrap();
        let basic = |user: &str, password: &str| Some(RegistryAuth::Basic(user.to_owned(), password.to_owned()));
        assert_eq!(config.auth("index.docker.io"), basic("u", "p"));
        assert_eq!(config.auth("r.example:5000"), basic("a", "b"));
        assert_eq!(config.auth("r.example"), None);
    }
}
