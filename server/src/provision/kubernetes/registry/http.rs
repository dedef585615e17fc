//! HTTP to servers that strangers name.
//!
//! A server is asked when it has HTTPS and a public address, or when the operator has listed it. That is decided anew for
//! every URL: the registry's, each redirect's and the token server's. A name is resolved once, and the addresses that
//! were looked at are the ones that are connected to.

use std::{error::Error as _, io, net::IpAddr, str::FromStr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, LOCATION},
    redirect,
};

use super::{
    RegistryError,
    address::{self, NoPublicAddress, PublicOnly},
};

/// Redirects that are followed for one request.
pub(super) const MAX_REDIRECTS: usize = 5;
/// How much of an answer that says no is kept for the log, in bytes.
const MAX_REFUSAL: usize = 1024;
/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection is kept for the next request. Reading one image takes several.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that the operator has listed, as HOST or HOST:PORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    host: String,
    port: Option<u16>,
}

impl FromStr for Authority {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || format!("{text:?} is not HOST or HOST:PORT");
        // A scheme without a port of its own, so that none is added or left out; hosts as in the URLs to compare with.
        let url = Url::parse(&format!("http://{text}/")).with_context(wrong)?;
        let port = match text.rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => Some(port.parse().with_context(wrong)?),
            _ => None,
        };
        let host = url.host_str().with_context(wrong)?.to_owned();
        let is_plain = !text.contains(['/', '@', '?', '#', '\\']) && url.path() == "/";
        ensure!(is_plain, wrong());
        Ok(Self { host, port })
    }
}

impl Authority {
    /// Whether a URL leads here. Without a port, the one of the URL's scheme is meant.
    fn is_of(&self, url: &Url) -> bool {
        let default = if url.scheme() == "http" { 80 } else { 443 };
        url.host_str() == Some(&self.host) && url.port_or_known_default() == Some(self.port.unwrap_or(default))
    }
}

/// What a server answered.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

pub(super) struct Http {
    /// For servers that anybody may name: connects to public addresses only.
    public: Client,
    /// For those that the operator has listed.
    listed: Client,
    plain_http: Vec<Authority>,
    private: Vec<Authority>,
}

impl Http {
    pub(super) fn new(plain_http: &[Authority], private: &[Authority], patience: Duration) -> Result<Self> {
        let client = || {
            Client::builder()
                .user_agent(concat!("loom-server/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(CONNECT_TIMEOUT)
                .timeout(patience)
                .pool_idle_timeout(IDLE_TIMEOUT)
                .redirect(redirect::Policy::none())
                // A proxy would resolve names by itself.
                .no_proxy()
        };
        Ok(Self {
            public: client().dns_resolver(PublicOnly).build()?,
            listed: client().build()?,
            plain_http: plain_http.to_vec(),
            private: private.to_vec(),
        })
    }

    /// Whether a registry, as HOST or HOST:PORT, is asked over plain HTTP.
    pub(super) fn is_plain(&self, registry: &str) -> bool {
        Url::parse(&format!("http://{registry}/")).is_ok_and(|url| self.is_listed_as_plain(&url))
    }

    fn is_listed_as_plain(&self, url: &Url) -> bool {
        self.plain_http.iter().any(|listed| listed.is_of(url))
    }

    /// Asks a server, and those that it redirects to. At most `limit` bytes of a body are read.
    pub(super) async fn ask(
        &self,
        method: Method,
        mut url: Url,
        mut headers: HeaderMap,
        limit: usize,
    ) -> Result<Answer, RegistryError> {
        let mut response = self.once(&method, &url, &headers).await?;
        for _ in 0..MAX_REDIRECTS {
            if !response.status().is_redirection() {
                return read(response, limit).await;
            }
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.ok_or(RegistryError::Malformed("it redirects to nowhere"))?;
            if next.origin() != url.origin() {
                headers.remove(AUTHORIZATION);
            }
            url = next;
            response = self.once(&method, &url, &headers).await.map_err(RegistryError::from_reference)?;
        }
        Err(RegistryError::Malformed("it redirects for ever"))
    }

    async fn once(&self, method: &Method, url: &Url, headers: &HeaderMap) -> Result<Response, RegistryError> {
        let client = self.client(url)?;
        let request = client.request(method.clone(), url.clone()).headers(headers.clone());
        request.send().await.map_err(|error| unreachable(&error))
    }

    /// The client for a URL, if it may be asked at all.
    fn client(&self, url: &Url) -> Result<&Client, RegistryError> {
        let is_listed = self.is_listed_as_plain(url) || self.private.iter().any(|listed| listed.is_of(url));
        if is_listed && (url.scheme() == "https" || self.is_listed_as_plain(url)) {
            return Ok(&self.listed);
        }
        // An address instead of a name is not resolved, so it is looked at here.
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        if url.scheme() != "https" || host.parse::<IpAddr>().is_ok_and(|address| !address::is_public(address)) {
            tracing::info!(url = ?url.as_str(), "no image is read from here: it has no HTTPS, or no public address");
            return Err(RegistryError::NotPublic);
        }
        Ok(&self.public)
    }
}

impl RegistryError {
    /// What an error means for a server that the registry named, and not the user.
    pub(super) fn from_reference(error: Self) -> Self {
        if error == Self::NotPublic { Self::RefersElsewhere } else { error }
    }
}

/// Reads an answer's body, up to a limit. What a server says beside its refusal goes to the log.
async fn read(mut response: Response, limit: usize) -> Result<Answer, RegistryError> {
    let status = response.status();
    let limit = if status.is_success() { limit } else { MAX_REFUSAL };
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(&error))? {
        if body.len() + chunk.len() > limit {
            if status.is_success() {
                return Err(RegistryError::TooLarge);
            }
            break;
        }
        body.extend_from_slice(&chunk);
    }
    if !status.is_success() && status != StatusCode::UNAUTHORIZED {
        let said = String::from_utf8_lossy(&body);
        tracing::info!(url = ?response.url().as_str(), status = status.as_u16(), ?said, "a registry refused");
    }
    Ok(Answer { status, headers: std::mem::take(response.headers_mut()), body })
}

/// Why there was no answer. The error's own words can quote the other side, as a certificate's names; they are for the
/// log.
fn unreachable(error: &reqwest::Error) -> RegistryError {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<NoPublicAddress>() {
            return RegistryError::NotPublic;
        }
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            return RegistryError::Unreachable("it refuses connections");
        }
        cause = error.source();
    }
    let causes: Vec<String> = anyhow::Chain::new(error).map(ToString::to_string).collect();
    tracing::info!(?causes, "a registry cannot be reached");
    RegistryError::Unreachable(match error {
        error if error.is_timeout() => "it does not answer",
        error if error.is_connect() => "there is no secure connection to it",
        _ => "the connection was lost",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_server_is_a_host_and_a_port() {
        let is_of = |listed: &str, url: &str| listed.parse::<Authority>().unwrap().is_of(&Url::parse(url).unwrap());
        assert!(is_of("r.example", "https://r.example/v2/") && is_of("R.example:443", "https://r.example/v2/"));
        assert!(is_of("10.0.0.1:5000", "http://10.0.0.1:5000/v2/") && is_of("[fd00::1]:80", "http://[fd00::1]/"));
        assert!(is_of("[fd00::1]", "https://[fd00::1]/") && is_of("r.example:80", "http://r.example/"));
        assert!(!is_of("r.example", "https://r.example:8443/") && !is_of("r.example:80", "https://r.example/"));
        assert!(!is_of("example", "https://r.example/"));
        for wrong in ["", "https://r.example", "r.example/a", "a@b", "r.example:", "r.example:port", "a b"] {
            assert!(wrong.parse::<Authority>().is_err(), "{wrong}");
        }
    }
}
