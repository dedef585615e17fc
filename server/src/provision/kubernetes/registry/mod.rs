//! What a registry says of an image: the part of the OCI distribution specification that reading one takes.
//!
//! Users choose the registry, so nothing that it answers is trusted: [`http`] decides which servers are asked at all, and
//! reads no answer without a bound; digests are checked; and what goes wrong is said in words of our own
//! ([`RegistryError`]), because a foreign server's would reach a user's terminal.

mod address;
mod challenge;
mod http;
mod reference;
#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::Result;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use loom_api::Secret;
use reqwest::{
    Method, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue},
};
use serde::{Deserialize, de::DeserializeOwned};

use challenge::Challenge;
pub use http::Authority;
use http::{Answer, Http};
pub(super) use reference::Reference;

/// The largest manifest or index that is read; the specification has registries take 4 MiB.
const MAX_MANIFEST: usize = 4 << 20;
/// The largest image configuration that is read.
const MAX_CONFIG: usize = 1 << 20;
/// The largest answer of a token server that is read.
const MAX_TOKEN: usize = 64 << 10;
/// Manifests of one image, and lists of images for several platforms.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Where a registry says what a tag stands for.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Why an image could not be read. None quotes what a registry said.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum RegistryError {
    #[error("the image's name is not one")]
    InvalidName,
    #[error("there is no such image")]
    NoSuchImage,
    #[error("the registry wants other credentials, or there is no such image")]
    NoAccess,
    /// The same for a name that does not resolve: whether a private name exists is not a user's to find out.
    #[error(
        "its registry has no public address (the server's operator can allow a private one: kubernetes-private-registries)"
    )]
    NotPublic,
    #[error("its registry refers to a server without HTTPS or without a public address, which is not asked")]
    RefersElsewhere,
    #[error("the registry cannot be reached: {0}")]
    Unreachable(&'static str),
    #[error("the registry answered with the status {0}")]
    Status(u16),
    #[error("the registry's answer is too large")]
    TooLarge,
    #[error("the registry's answer cannot be understood: {0}")]
    Malformed(&'static str),
    #[error("the image is not made for linux/{0}")]
    OtherPlatform(&'static str),
}

impl RegistryError {
    /// Whether another try would end the same.
    pub(super) const fn is_final(&self) -> bool {
        match self {
            Self::Status(status) => *status < 500 && *status != 429,
            // A name that does not resolve may do so in a moment.
            Self::NotPublic | Self::Unreachable(_) => false,
            _ => true,
        }
    }
}

/// Who to be for a registry.
#[derive(Debug, Clone)]
pub(super) struct Credentials {
    pub(super) username: String,
    pub(super) password: Secret,
}

/// Asks registries.
pub(super) struct Registry {
    http: Http,
}

impl Registry {
    /// `plain_http` are asked over HTTP instead of HTTPS; those and `private` may have addresses that are not public.
    /// `patience` is how long a registry may take for one answer.
    pub(super) fn new(plain_http: &[Authority], private: &[Authority], patience: Duration) -> Result<Self> {
        Ok(Self { http: Http::new(plain_http, private, patience)? })
    }

    /// Begins to read an image.
    pub(super) fn open(
        &self,
        reference: &Reference,
        credentials: Option<Credentials>,
    ) -> Result<Reading<'_>, RegistryError> {
        let scheme = if self.http.is_plain(reference.registry()) { "http" } else { "https" };
        let base = format!("{scheme}://{}/v2/{}/", reference.registry(), reference.repository());
        let base = Url::parse(&base).map_err(|_| RegistryError::InvalidName)?;
        if base.path() != format!("/v2/{}/", reference.repository()) || !base.username().is_empty() {
            return Err(RegistryError::InvalidName);
        }
        Ok(Reading {
            http: &self.http,
            base,
            repository: reference.repository().to_owned(),
            credentials,
            authorization: None,
        })
    }
}

/// One image that is being read, with the authorisation that its registry asked for.
pub(super) struct Reading<'a> {
    http: &'a Http,
    /// Up to the repository: `https://HOST/v2/REPOSITORY/`.
    base: Url,
    repository: String,
    credentials: Option<Credentials>,
    authorization: Option<HeaderValue>,
}

impl Reading<'_> {
    /// The digest that a tag stands for now.
    pub(super) async fn digest(&mut self, tag: &str) -> Result<String, RegistryError> {
        let path = format!("manifests/{tag}");
        // Registries that count pulls do not count this.
        let answer = self.get(Method::HEAD, &path, 0).await?;
        if let Some(digest) = answer.headers.get(CONTENT_DIGEST) {
            let digest = digest.to_str().ok().filter(|digest| is_digest(digest));
            return Ok(digest.ok_or(RegistryError::Malformed("its digest is not one"))?.to_owned());
        }
        let answer = self.get(Method::GET, &path, MAX_MANIFEST).await?;
        Ok(digest_of(&answer.body))
    }

    /// The program of the image with this digest: its ENTRYPOINT and CMD.
    pub(super) async fn command(&mut self, digest: &str) -> Result<Vec<String>, RegistryError> {
        let mut manifest: Manifest = self.manifest(digest).await?;
        if manifest.config.is_none() {
            let architecture = architecture();
            let own = manifest.manifests.into_iter().find(|entry| entry.is_for("linux", architecture));
            let own = own.ok_or(RegistryError::OtherPlatform(architecture))?;
            manifest = self.manifest(&own.digest).await?;
        }
        let config = manifest.config.ok_or(RegistryError::Malformed("its manifest names no configuration"))?;
        let config: ImageConfig = self.content("blobs", &config.digest, MAX_CONFIG).await?;
        Ok(config.config.command())
    }

    async fn manifest(&mut self, digest: &str) -> Result<Manifest, RegistryError> {
        self.content("manifests", digest, MAX_MANIFEST).await
    }

    /// What a digest stands for; it is checked that it does.
    async fn content<T: DeserializeOwned>(
        &mut self,
        kind: &str,
        digest: &str,
        limit: usize,
    ) -> Result<T, RegistryError> {
        if !is_digest(digest) {
            return Err(RegistryError::Malformed("a digest is not one"));
        }
        let answer = self.get(Method::GET, &format!("{kind}/{digest}"), limit).await?;
        if digest_of(&answer.body) != digest {
            return Err(RegistryError::Malformed("its content does not have the digest that it should"));
        }
        serde_json::from_slice(&answer.body).map_err(|_| RegistryError::Malformed("its description of the image"))
    }

    /// Asks for something of the repository's, with the authorisation that the registry asks for.
    async fn get(&mut self, method: Method, path: &str, limit: usize) -> Result<Answer, RegistryError> {
        let url = self.base.join(path).map_err(|_| RegistryError::InvalidName)?;
        let mut answer = self.ask(&method, &url, limit).await?;
        if answer.status == StatusCode::UNAUTHORIZED && self.authorization.is_none() {
            self.authorization = Some(self.authorize(&answer.headers).await?);
            answer = self.ask(&method, &url, limit).await?;
        }
        match answer.status {
            StatusCode::OK => Ok(answer),
            StatusCode::NOT_FOUND => Err(RegistryError::NoSuchImage),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(RegistryError::NoAccess),
            other => Err(RegistryError::Status(other.as_u16())),
        }
    }

    async fn ask(&self, method: &Method, url: &Url, limit: usize) -> Result<Answer, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(MANIFEST_TYPES));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        self.http.ask(method.clone(), url.clone(), headers, limit).await
    }

    /// Gets what a registry's challenge asks for: a token, or the credentials themselves.
    async fn authorize(&self, headers: &HeaderMap) -> Result<HeaderValue, RegistryError> {
        match Challenge::of(headers) {
            Some(Challenge::Basic) => self.basic().ok_or(RegistryError::NoAccess),
            Some(Challenge::Bearer { realm, service }) => self.token(&realm, service.as_deref()).await,
            None => Err(RegistryError::NoAccess),
        }
    }

    fn basic(&self) -> Option<HeaderValue> {
        let Credentials { username, password } = self.credentials.as_ref()?;
        let encoded = STANDARD.encode(format!("{username}:{}", password.expose()));
        secret_header(&format!("Basic {encoded}"))
    }

    async fn token(&self, realm: &str, service: Option<&str>) -> Result<HeaderValue, RegistryError> {
        let mut url = Url::parse(realm).map_err(|_| RegistryError::Malformed("its token server is not a URL"))?;
        url.query_pairs_mut()
            .extend_pairs(service.map(|service| ("service", service)))
            .append_pair("scope", &format!("repository:{}:pull", self.repository));
        let mut headers = HeaderMap::new();
        headers.extend(self.basic().map(|basic| (AUTHORIZATION, basic)));
        let answer = self.http.ask(Method::GET, url, headers, MAX_TOKEN).await;
        let answer = answer.map_err(RegistryError::from_reference)?;
        match answer.status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(RegistryError::NoAccess),
            other => return Err(RegistryError::Status(other.as_u16())),
        }
        let token: Token = serde_json::from_slice(&answer.body).map_err(|_| RegistryError::Malformed("its token"))?;
        let token = token.token.or(token.access_token).unwrap_or_default();
        secret_header(&format!("Bearer {token}")).ok_or(RegistryError::Malformed("its token"))
    }
}

fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The name of this machine's architecture in images: weavers run on nodes like the server's.
const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

fn digest_of(content: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, content);
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A manifest, which names a configuration, or an index, which names manifests (image-spec, manifest.md and
/// image-index.md).
#[derive(Deserialize)]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

impl Descriptor {
    fn is_for(&self, os: &str, architecture: &str) -> bool {
        self.platform.as_ref().is_some_and(|platform| platform.os == os && platform.architecture == architecture)
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

/// What a token server answers.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}
