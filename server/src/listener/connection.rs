//! One connection from its first byte to its last: whose it is, TLS, and HTTP with deadlines.

use std::{
    convert::Infallible,
    error::Error as _,
    io,
    net::IpAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    body::{Body, HttpBody as _},
    http::{Request, Response, StatusCode},
    response::IntoResponse as _,
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use loom_api::ErrorCode;
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{
    ClientAddress, Config, ProxySays,
    address::forwarded_for,
    body::{AnswerBody, RequestBody},
    places::{Place, Places},
    proxy_protocol,
    refusal::{Refusal, Refusals},
    stream::Stream,
};
use crate::problem::Problem;

/// How long a client may take for its TLS handshake, and a proxy for its PROXY header: three round trips, with a
/// packet lost in each and repeated twice (1 s and 2 s after, RFC 6298 §2).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the head of a connection's first request may take from then on: it is one packet or two.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may be idle between two requests, the next one's head included: longer than proxies keep
/// theirs (60 s in nginx and in AWS's load balancers), so that they never send a request into a closing connection.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// The largest head of a request, in bytes, and what is buffered of a connection each way; a token, a URL and the
/// headers of several proxies take about 4 KiB.
const BUFFER_SIZE: usize = 16 << 10;
/// Connections at a time that have not sent a whole request yet. The oldest gives way, so at 10,000 new ones a second
/// each still has 0.1 s; all of them, with half a head and TLS, take less than 64 MiB.
const NEWCOMERS: usize = 1024;
/// How many of them one address may have, unfinished TLS handshakes included: a user has a few, an office that comes
/// back after an outage some dozens. So it takes 16 addresses to push others' newcomers out.
const NEWCOMERS_PER_ADDRESS: usize = 64;

/// What all connections of a listener share.
pub(super) struct Front {
    tls: Option<TlsAcceptor>,
    config: Config,
    connections: Places,
    newcomers: Places,
    /// Requests that came by way of proxies, whose connections many clients share.
    requests: Places,
    refusals: Refusals,
}

impl Front {
    pub(super) fn new(tls: Option<TlsAcceptor>, config: &Config, refusals: Refusals) -> Self {
        let (all, per_address) = (config.max_connections, config.max_connections_per_address);
        Self {
            tls,
            config: config.clone(),
            connections: Places::new(all, per_address),
            newcomers: Places::new(NEWCOMERS.min(all.div_ceil(2)), NEWCOMERS_PER_ADDRESS),
            requests: Places::new(usize::MAX, per_address),
            refusals,
        }
    }

    /// Takes a connection's places, those of others if it must; nothing when it is turned away.
    pub(super) fn admit(self: &Arc<Self>, peer: IpAddr, router: Router) -> Option<Exchange> {
        let admitted = self.take_places(peer, router);
        admitted.inspect_err(|refusal| self.note(peer, *refusal, "a connection was turned away")).ok()
    }

    fn note(&self, peer: IpAddr, refusal: Refusal, what: &str) {
        self.refusals.count(refusal);
        tracing::debug!(%peer, "{what}: {refusal}");
    }

    fn take_places(self: &Arc<Self>, peer: IpAddr, router: Router) -> Result<Exchange, Refusal> {
        let proxied = self.config.trusts(peer);
        let network = (!proxied).then(|| ClientAddress(peer).network());
        let place = self.connections.take(network)?;
        let newcomer = self.newcomers.take(network)?;
        Ok(Exchange {
            front: Arc::clone(self),
            router,
            client: peer,
            proxied,
            place: Arc::new(place),
            newcomer: Mutex::new(Some(newcomer)),
            begun: AtomicBool::new(false),
            patient: Arc::default(),
        })
    }
}

/// The place of a request's connection. It is not free for another before this is dropped.
#[derive(Clone)]
pub struct HeldPlace(#[expect(dead_code, reason = "it is only held")] Arc<Place>);

/// The requests of one connection, and their answers.
pub(super) struct Exchange {
    front: Arc<Front>,
    router: Router,
    client: IpAddr,
    /// Each request says who its client is.
    proxied: bool,
    place: Arc<Place>,
    /// Until the first request is complete.
    newcomer: Mutex<Option<Place>>,
    /// A whole head has come.
    begun: AtomicBool,
    /// The answer may be taken as slowly as the client likes.
    patient: Arc<AtomicBool>,
}

impl Exchange {
    /// Serves the connection to its end, or until it is upgraded to a WebSocket, which goes on by itself.
    pub(super) async fn serve(self, stream: TcpStream, stop: CancellationToken) {
        let (peer, place, newcomer) =
            (self.client, self.place.given_away(), self.newcomer().as_ref().map(Place::given_away));
        let newcomer = newcomer.unwrap_or_default();
        let front = Arc::clone(&self.front);
        let result = tokio::select! {
            result = self.open(stream, stop) => result,
            () = place.cancelled() => Err(Refusal::Displaced.into()),
            () = newcomer.cancelled() => Err(Refusal::DisplacedNewcomer.into()),
        };
        if let Err(reason) = result {
            if let Some(refusal) = reason.downcast_ref::<Refusal>() {
                front.refusals.count(*refusal);
            }
            tracing::debug!(%peer, "a connection was ended: {reason:#}");
        }
    }

    /// Learns whose connection it is, and shakes hands.
    async fn open(mut self, mut stream: TcpStream, stop: CancellationToken) -> Result<()> {
        let front = Arc::clone(&self.front);
        let handshake = async {
            if self.proxied && front.config.proxies_send == ProxySays::ProxyProtocol {
                self.proxied = false;
                if let Some(client) = proxy_protocol::read(&mut stream).await.context(Refusal::ProxyHeader)? {
                    self.client = client.to_canonical();
                    let network = ClientAddress(self.client).network();
                    self.place.join(network)?;
                    self.newcomer().as_ref().map_or(Ok(()), |newcomer| newcomer.join(network))?;
                }
            }
            match &front.tls {
                Some(tls) => Ok(Ok(tls.accept(stream).await.context(Refusal::Handshake)?)),
                None => anyhow::Ok(Err(stream)),
            }
        };
        let Some(opened) = stop.run_until_cancelled(timeout(HANDSHAKE_TIMEOUT, handshake)).await else { return Ok(()) };
        match opened.context(Refusal::HandshakeTimeout)?? {
            Ok(encrypted) => Box::pin(self.run(encrypted, stop)).await,
            Err(clear) => Box::pin(self.run(clear, stop)).await,
        }
    }

    async fn run(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        stop: CancellationToken,
    ) -> Result<()> {
        let this = Arc::new(self);
        let stream = Stream::new(stream, Arc::clone(&this.patient), Arc::clone(&this.place));
        let service = {
            let this = Arc::clone(&this);
            service_fn(move |request| Arc::clone(&this).answer(request))
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .max_buf_size(BUFFER_SIZE)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let (mut connection, mut first_head) = (pin!(connection), pin!(sleep(FIRST_HEAD_TIMEOUT)));
        let (mut stopping, mut first) = (false, true);
        loop {
            tokio::select! {
                result = connection.as_mut() => return result.map_err(refusal_or_failure),
                () = first_head.as_mut(), if first => {
                    first = false;
                    if !this.begun.load(Ordering::Relaxed) {
                        return Err(Refusal::RequestTimeout.into());
                    }
                }
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    async fn answer(self: Arc<Self>, mut request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        self.begun.store(true, Ordering::Relaxed);
        let client = ClientAddress(if self.proxied {
            forwarded_for(request.headers(), self.client, |address| self.front.config.trusts(address))
        } else {
            self.client
        });
        request.extensions_mut().insert(client);
        request.extensions_mut().insert(HeldPlace(Arc::clone(&self.place)));
        let counted = self.proxied.then(|| self.front.requests.take(Some(client.network()))).transpose();
        let Ok(counted) = counted else {
            self.front.note(client.0, Refusal::Requests, "a request was refused");
            let message = format!("too many requests at a time from the address {}", client.0);
            let problem = Problem::new(ErrorCode::TooManyRequests, message);
            return Ok(problem.hint("wait until others are answered, then try again").into_response());
        };
        if let Some(counted) = &counted {
            counted.keep();
        }
        let complete = {
            let this = Arc::clone(&self);
            move || this.requested()
        };
        let request = request.map(|body| Body::new(RequestBody::new(body, complete)));
        let response = self.router.clone().oneshot(request).await?;
        self.requested();
        let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        self.patient.store(upgraded || response.body().size_hint().exact().is_none(), Ordering::Relaxed);
        if upgraded {
            self.place.leave_network();
            return Ok(response);
        }
        Ok(response.map(|body| Body::new(AnswerBody::new(body, Arc::clone(&self.place), counted))))
    }

    /// The connection no longer waits for its client.
    fn requested(&self) {
        self.place.keep();
        drop(self.newcomer().take());
    }

    fn newcomer(&self) -> MutexGuard<'_, Option<Place>> {
        self.newcomer.lock()
    }
}

/// Why a connection ended, if [`Stream`] said why.
fn refusal_or_failure(error: hyper::Error) -> anyhow::Error {
    let refusal =
        error.source().and_then(|error| error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref::<Refusal>());
    match refusal.copied() {
        Some(refusal) => refusal.into(),
        None => error.into(),
    }
}
