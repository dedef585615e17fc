//! What an image is, from its registry: the digest that its name stands for now, and the program that it runs.
//!
//! The host is PID 1 in the user's container, so Kubernetes does not start the image's own program; the agent does, and
//! has to be told which. The pod is then pinned to the digest that this was read from.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::timeout;

use super::{
    Config,
    registry::{Credentials, Reference, Registry, RegistryError},
};
use crate::provision::{ProvisionError, ResolvedImage};

/// How long a registry may take for one answer, and one try to read an image.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long all tries together may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(20);
/// Before the second and the third try.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];
/// Images that are remembered by their digests.
const MAX_CACHED: usize = 1024;

/// Reads images, with the pull secrets that their pods use.
pub(super) struct Images {
    secrets: Api<Secret>,
    pull_secrets: Vec<String>,
    registry: Registry,
    one_try: Duration,
    all_tries: Duration,
    /// The program of each image that was read, by digest: a digest never changes its meaning.
    commands: Mutex<HashMap<String, Vec<String>>>,
}

impl Images {
    pub(super) fn new(client: kube::Client, config: &Config) -> Result<Self> {
        Self::with_patience(client, config, ATTEMPT_TIMEOUT, LOOKUP_TIMEOUT)
    }

    fn with_patience(client: kube::Client, config: &Config, one_try: Duration, all_tries: Duration) -> Result<Self> {
        Ok(Self {
            secrets: Api::namespaced(client, &config.namespace),
            pull_secrets: config.pull_secrets.clone(),
            registry: Registry::new(&config.plain_http_registries, &config.private_registries, one_try)?,
            one_try,
            all_tries,
            commands: Mutex::default(),
        })
    }

    /// Finds out what an image is.
    ///
    /// # Errors
    ///
    /// [`ProvisionError::Refused`] when the registry says no, or says nothing at several tries.
    pub(super) async fn resolve(&self, image: &str) -> Result<ResolvedImage, ProvisionError> {
        let reference = Reference::parse(image).map_err(|error| refused(image, &error))?;
        let credentials = self.credentials(reference.registry()).await?;
        let mut last = RegistryError::Unreachable("it does not answer");
        let tries = async {
            let mut pauses = PAUSES.into_iter();
            loop {
                last = match timeout(self.one_try, self.read(&reference, credentials.clone())).await {
                    Ok(Ok(resolved)) => return Some(resolved),
                    Ok(Err(error)) if error.is_final() => {
                        last = error;
                        return None;
                    }
                    Ok(Err(error)) => error,
                    Err(_) => RegistryError::Unreachable("it does not answer"),
                };
                tokio::time::sleep(pauses.next()?).await;
            }
        };
        let resolved = timeout(self.all_tries, tries).await.ok().flatten();
        resolved.ok_or_else(|| refused(image, &last))
    }

    async fn read(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<ResolvedImage, RegistryError> {
        let mut reading = self.registry.open(reference, credentials)?;
        let digest = match reference.digest() {
            Some(digest) => digest.to_owned(),
            None => reading.digest(reference.tag()).await?,
        };
        let pinned = reference.pinned(&digest);
        if let Some(command) = self.commands.lock().get(&digest).cloned() {
            return Ok(ResolvedImage { pinned, command });
        }
        let command = reading.command(&digest).await?;
        let mut commands = self.commands.lock();
        if commands.len() >= MAX_CACHED {
            commands.clear();
        }
        commands.insert(digest, command.clone());
        Ok(ResolvedImage { pinned, command })
    }

    /// Who to be for a registry: from the first pull secret that knows it.
    async fn credentials(&self, registry: &str) -> Result<Option<Credentials>, ProvisionError> {
        for name in &self.pull_secrets {
            let secret = self.secrets.get_opt(name).await.with_context(|| format!("reading the pull secret {name}"))?;
            let Some(data) = secret.and_then(|secret| secret.data?.remove(".dockerconfigjson")) else {
                tracing::warn!("there is no pull secret {name} of the type kubernetes.io/dockerconfigjson");
                continue;
            };
            // Its content is nobody's to read in an error.
            let config: DockerConfig = serde_json::from_slice(&data.0)
                .map_err(|_| anyhow::anyhow!("the pull secret {name} cannot be read"))?;
            if let Some(credentials) = config.credentials(registry) {
                return Ok(Some(credentials));
            }
        }
        Ok(None)
    }
}

fn refused(image: &str, error: &RegistryError) -> ProvisionError {
    let way_out = match error {
        RegistryError::NoSuchImage => "look at its name and its tag",
        _ => "with a command (loom new --image … -- CMD) it need not be",
    };
    ProvisionError::Refused(format!("the image {image} cannot be read: {error}; {way_out}"))
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
    fn credentials(&self, registry: &str) -> Option<Credentials> {
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
            return Some(Credentials { username: username.clone(), password: password.clone().into() });
        }
        let decoded = String::from_utf8(STANDARD.decode(auth.auth.as_ref()?).ok()?).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(Credentials { username: username.to_owned(), password: password.to_owned().into() })
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Instant};

    use axum::http::{Request, Response};
    use kube::client::Body;

    use super::*;
    use crate::provision::kubernetes::pod;

    #[tokio::test]
    async fn all_tries_together_end_in_time_and_say_that_nobody_answered() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Connections are made, and nobody takes them.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let registry = silent.local_addr().unwrap().to_string();
        let plain_http_registries = vec![registry.parse().unwrap()];
        let config = Config { plain_http_registries, pull_secrets: Vec::new(), ..pod::tests::config() };
        let cluster = tower::service_fn(|_: Request<Body>| async {
            Err::<Response<Body>, _>(std::io::Error::other("the cluster is not asked"))
        });
        let (one_try, all_tries) = (Duration::from_millis(400), Duration::from_millis(600));
        let images = Images::with_patience(kube::Client::new(cluster, "weavers"), &config, one_try, all_tries).unwrap();
        let start = Instant::now();
        let error = images.resolve(&format!("{registry}/team/app:1")).await.unwrap_err().to_string();
        assert!(error.contains("cannot be reached: it does not answer"), "{error}");
        // Three tries with their pauses take 2.7 s.
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }

    #[test]
    fn pull_secrets_are_found_by_registry() {
        let config: DockerConfig = serde_json::from_str(
            r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpw"}, "r.example:5000": {"username": "a", "password": "b"}}}"#,
        )
        .unwrap();
        let found = |registry: &str| {
            let Credentials { username, password } = config.credentials(registry)?;
            Some(format!("{username}:{}", password.expose()))
        };
        assert_eq!(found("index.docker.io").as_deref(), Some("u:p"));
        assert_eq!(found("r.example:5000").as_deref(), Some("a:b"));
        assert_eq!(found("r.example"), None);
    }
}
