//! Why a connection or a request was refused or cut, in words for the log and counted for operators.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Why a connection or a request was refused or cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("its address has as many connections as it may, and all of them are being served")]
    Address,
    #[error("there are as many connections as there may be, and all of them are being served")]
    Total,
    #[error("it waited for its client when a newer connection needed its place")]
    Displaced,
    #[error("it had not sent a request when a newer connection needed its place")]
    DisplacedNewcomer,
    #[error("the trusted proxy did not say whose it is")]
    ProxyHeader,
    #[error("the TLS handshake failed")]
    Handshake,
    #[error("what comes before the first request did not come in time")]
    HandshakeTimeout,
    #[error("it did not send a request in time")]
    RequestTimeout,
    #[error("its client took nothing of an answer for too long")]
    Stalled,
    #[error("the client's address has as many requests as it may at a time")]
    Requests,
}

impl Refusal {
    /// The value of the metric's label.
    const fn label(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Total => "total",
            Self::Displaced => "displaced",
            Self::DisplacedNewcomer => "displaced_newcomer",
            Self::ProxyHeader => "proxy_header",
            Self::Handshake => "handshake",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::RequestTimeout => "request_timeout",
            Self::Stalled => "stalled",
            Self::Requests => "requests",
        }
    }
}

/// How many connections and requests were refused or cut, by reason. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Family<Reason, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

impl Refusals {
    /// Shows the counts to operators.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Connections and requests that were refused or cut to protect others, by reason";
        registry.register("connections_refused", help, self.0.clone());
    }

    pub(super) fn count(&self, refusal: Refusal) {
        self.0.get_or_create(&Reason { reason: refusal.label() }).inc();
    }
}
