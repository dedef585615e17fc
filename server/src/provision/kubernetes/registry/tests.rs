use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{Response, header},
};
use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinSet};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A server that answers as a test wants it to, and counts who connects.
struct Server {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    _serving: JoinSet<()>,
}

impl Server {
    async fn start(answer: impl Fn(Request) -> Response<Body> + Clone + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&requests);
        let router = Router::new().fallback(move |request: Request| {
            counted.fetch_add(1, Ordering::Relaxed);
            let answer = answer(request);
            async move { answer }
        });
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, requests, _serving: serving }
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    fn image(&self) -> Reference {
        Reference::parse(&format!("{}/team/app:1", self.address)).unwrap()
    }
}

/// A registry client for which these servers are listed as plain HTTP, and no others.
fn listing(servers: &[&Server]) -> Registry {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listed: Vec<Authority> = servers.iter().map(|server| server.address.to_string().parse().unwrap()).collect();
    Registry::new(&listed, &[], TIMEOUT).unwrap()
}

async fn digest(registry: &Registry, image: &Reference) -> Result<String, RegistryError> {
    registry.open(image, None)?.digest(image.tag()).await
}

fn response(status: u16, headers: &[(HeaderName, &str)], body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(name, *value);
    }
    response.body(body.into()).unwrap()
}

fn redirect(to: &str) -> Response<Body> {
    response(307, &[(header::LOCATION, to)], "")
}

fn challenge(realm: &str) -> Response<Body> {
    response(401, &[(header::WWW_AUTHENTICATE, &format!("Bearer realm=\"{realm}\",service=\"r\""))], "")
}

/// A body that never ends.
fn endless() -> Body {
    Body::from_stream(futures_util::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(bytes::Bytes::from(vec![b' '; 65_536]))
    }))
}

/// The URLs that lead to an address of this machine, though not one of them is listed.
fn ways_to(address: SocketAddr) -> Vec<String> {
    let port = address.port();
    let mut ways = vec![format!("http://{address}/")];
    for host in ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"] {
        ways.push(format!("https://{host}:{port}/"));
    }
    ways
}

#[test]
fn entrypoint_and_cmd_are_one_command() {
    let command = |text: &str| serde_json::from_str::<ImageConfig>(text).unwrap().config.command();
    assert_eq!(command(r#"{"config": {"Entrypoint": ["/run.sh"], "Cmd": ["serve"]}}"#), ["/run.sh", "serve"]);
    assert_eq!(command(r#"{"config": {"Entrypoint": null, "Cmd": ["bash"]}}"#), ["bash"]);
    assert!(command(r#"{"architecture": "amd64"}"#).is_empty());
}

#[tokio::test]
async fn an_image_is_read_with_a_token_through_an_index_and_a_redirect() {
    let config = r#"{"config": {"Entrypoint": ["/app"], "Cmd": ["--serve"]}}"#;
    let manifest = format!(r#"{{"config": {{"digest": "{}"}}}}"#, digest_of(config.as_bytes()));
    let entry = |architecture: &str, digest: &str| {
        format!(r#"{{"digest": "{digest}", "platform": {{"os": "linux", "architecture": "{architecture}"}}}}"#)
    };
    let other = format!("sha256:{}", "0".repeat(64));
    let own = entry(architecture(), &digest_of(manifest.as_bytes()));
    let index = format!(r#"{{"manifests": [{}, {own}]}}"#, entry("s390x", &other));
    let index_digest = digest_of(index.as_bytes());

    let storage_authorization = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&storage_authorization);
    let storage = Server::start(move |request| {
        *seen.lock() = Some(request.headers().contains_key(AUTHORIZATION));
        response(200, &[], config)
    })
    .await;
    let (blob, documents) = (format!("http://{}/blob", storage.address), [index.clone(), manifest]);
    let server = Server::start(move |request| {
        let (path, host) = (request.uri().path(), request.headers()[header::HOST].to_str().unwrap());
        if path == "/token" {
            assert_eq!(request.uri().query(), Some("service=r&scope=repository%3Ateam%2Fapp%3Apull"));
            assert_eq!(request.headers()[AUTHORIZATION], "Basic dTpw");
            return response(200, &[], r#"{"token": "t"}"#);
        }
        if request.headers().get(AUTHORIZATION).is_none_or(|value| value != "Bearer t") {
            return challenge(&format!("http://{host}/token"));
        }
        if path.starts_with("/v2/team/app/blobs/") {
            return redirect(&blob);
        }
        let found = documents.iter().find(|document| path.ends_with(&digest_of(document.as_bytes())));
        match found {
            Some(document) => response(200, &[], document.clone()),
            None if path == "/v2/team/app/manifests/1" => {
                response(200, &[(CONTENT_DIGEST, &digest_of(documents[0].as_bytes()))], "")
            }
            None => response(404, &[], ""),
        }
    })
    .await;

    let registry = listing(&[&server, &storage]);
    let credentials = Credentials { username: "u".to_owned(), password: "p".to_owned().into() };
    let mut reading = registry.open(&server.image(), Some(credentials)).unwrap();
    assert_eq!(reading.digest("1").await.unwrap(), index_digest);
    assert_eq!(reading.command(&index_digest).await.unwrap(), ["/app", "--serve"]);
    assert_eq!(*storage_authorization.lock(), Some(false), "the token is the registry's alone");
    assert_eq!(reading.digest("2").await, Err(RegistryError::NoSuchImage));
}

#[tokio::test]
async fn a_registry_without_a_public_address_is_not_asked_unless_it_is_listed() {
    let inside = Server::start(|_| response(200, &[(CONTENT_DIGEST, &digest_of(b""))], "")).await;
    let port = inside.address.port();
    let nothing_listed = listing(&[]);
    for host in ["127.0.0.1", "localhost", "2130706433.", "0x7f.1", "127.1"] {
        let Ok(image) = Reference::parse(&format!("{host}:{port}/team/app:1")) else { continue };
        assert_eq!(digest(&nothing_listed, &image).await, Err(RegistryError::NotPublic), "{host}");
    }
    let unresolvable = Reference::parse("registry.invalid/team/app:1").unwrap();
    assert_eq!(digest(&nothing_listed, &unresolvable).await, Err(RegistryError::NotPublic));
    assert_eq!(inside.requests(), 0);
    assert!(digest(&listing(&[&inside]), &inside.image()).await.is_ok());
}

#[tokio::test]
async fn a_redirect_into_the_servers_network_is_not_followed() {
    let inside = Server::start(|_| response(200, &[], "secret")).await;
    for target in ways_to(inside.address) {
        let to = target.clone();
        let server = Server::start(move |_| redirect(&to)).await;
        let answer = digest(&listing(&[&server]), &server.image()).await;
        assert_eq!(answer, Err(RegistryError::RefersElsewhere), "{target}");
    }
    assert_eq!(inside.requests(), 0);
}

#[tokio::test]
async fn a_token_is_not_asked_for_in_the_servers_network() {
    let inside = Server::start(|_| response(200, &[], r#"{"token": "secret"}"#)).await;
    for realm in ways_to(inside.address) {
        let (asked, gentle) = (realm.clone(), realm.clone());
        let direct = Server::start(move |_| challenge(&asked)).await;
        assert_eq!(digest(&listing(&[&direct]), &direct.image()).await, Err(RegistryError::RefersElsewhere), "{realm}");
        // The token server itself may be listed, and redirect.
        let server = Server::start(move |request| match request.uri().path() {
            "/token" => redirect(&gentle),
            _ => challenge(&format!("http://{}/token", request.headers()[header::HOST].to_str().unwrap())),
        })
        .await;
        assert_eq!(digest(&listing(&[&server]), &server.image()).await, Err(RegistryError::RefersElsewhere), "{realm}");
    }
    assert_eq!(inside.requests(), 0);
}

#[tokio::test]
async fn answers_without_an_end_are_not_read_to_it() {
    let manifest = Server::start(|_| response(200, &[], endless())).await;
    assert_eq!(digest(&listing(&[&manifest]), &manifest.image()).await, Err(RegistryError::TooLarge));
    let refusal = Server::start(|_| response(500, &[], endless())).await;
    assert_eq!(digest(&listing(&[&refusal]), &refusal.image()).await, Err(RegistryError::Status(500)));
    let token = Server::start(|request| match request.uri().path() {
        "/token" => response(200, &[], endless()),
        _ => challenge(&format!("http://{}/token", request.headers()[header::HOST].to_str().unwrap())),
    })
    .await;
    assert_eq!(digest(&listing(&[&token]), &token.image()).await, Err(RegistryError::TooLarge));
    let redirects = Server::start(|_| redirect("/again")).await;
    assert!(matches!(digest(&listing(&[&redirects]), &redirects.image()).await, Err(RegistryError::Malformed(_))));
    assert_eq!(redirects.requests(), http::MAX_REDIRECTS + 1);
}

#[tokio::test]
async fn a_registry_that_does_not_answer_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let registry = Registry::new(&[address.parse().unwrap()], &[], Duration::from_millis(100)).unwrap();
    let begun = Instant::now();
    let answer = digest(&registry, &Reference::parse(&format!("{address}/a")).unwrap()).await;
    assert_eq!(answer, Err(RegistryError::Unreachable("it does not answer")));
    assert!(begun.elapsed() < TIMEOUT);
}

#[tokio::test]
async fn what_a_user_reads_quotes_no_foreign_answer() {
    const FOREIGN: &str = r#"{"errors": [{"code": "DENIED", "message": "\u001b[2Jpay here: http://evil.example"}]}"#;
    for status in [400, 401, 403, 404, 418, 429, 500] {
        let server = Server::start(move |_| response(status, &[], FOREIGN)).await;
        let error = digest(&listing(&[&server]), &server.image()).await.unwrap_err().to_string();
        assert!(!error.contains("evil") && !error.contains('\u{1b}'), "{error}");
    }
    let server = Server::start(|_| redirect("https://127.0.0.1/evil")).await;
    let error = digest(&listing(&[&server]), &server.image()).await.unwrap_err().to_string();
    assert!(!error.contains("evil") && !error.contains("127.0.0.1"), "{error}");
}

#[tokio::test]
async fn content_with_another_digest_is_not_used() {
    let server = Server::start(|_| response(200, &[], r#"{"config": {"digest": "sha256:0"}}"#)).await;
    let registry = listing(&[&server]);
    let mut reading = registry.open(&server.image(), None).unwrap();
    assert!(matches!(reading.command(&digest_of(b"other")).await, Err(RegistryError::Malformed(_))));
}
