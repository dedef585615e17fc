//! What operators watch.

use std::{fmt, sync::atomic::AtomicI64, time::Duration};

use jiff::Timestamp;
use loom_api::{WeaverId, weaver::EventKind};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use crate::listener::Refusals;

/// The media type of [`Metrics::text`].
pub const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All figures. Cheap to change from anywhere.
pub struct Metrics {
    registry: Registry,
    weavers: Family<Status, Gauge>,
    agents: Gauge,
    start: Family<Stage, Histogram>,
    /// Clients that are attached to terminals.
    pub attachments: Gauge,
    /// Bytes of packets that the relay took in.
    pub relay_bytes: Counter,
    /// Connections and requests that the listeners refused or cut.
    pub refusals: Refusals,
    /// Requests to the Kubernetes API server; a watch is one.
    pub kubernetes_requests: Counter,
    /// From the time when a weaver was to be looked at to the time when it was, in seconds.
    pub reconcile_lag: Histogram,
    /// Looks at a weaver that failed and are repeated.
    pub reconcile_failures: Counter,
    /// Tasks that panicked: faults of the server's own.
    pub panics: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Status {
    status: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let mut registry = Registry::with_prefix("loom");
        let metrics = Self {
            weavers: Family::default(),
            agents: Gauge::default(),
            start: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.01, 2.0, 16))),
            attachments: Gauge::default(),
            relay_bytes: Counter::default(),
            refusals: Refusals::default(),
            kubernetes_requests: Counter::default(),
            reconcile_lag: seconds(),
            reconcile_failures: Counter::default(),
            panics: Counter::default(),
            registry: Registry::default(),
        };
        registry.register("weavers", "Weavers that have not ended, by status", metrics.weavers.clone());
        registry.register("weavers_agents", "Agents whose control link is up", metrics.agents.clone());
        registry.register(
            "weavers_start_seconds",
            "From a weaver's creation to each stage of its start",
            metrics.start.clone(),
        );
        registry.register("weavers_attachments", "Clients attached to terminals", metrics.attachments.clone());
        registry.register("relay_bytes", "Bytes of packets that the relay took in", metrics.relay_bytes.clone());
        metrics.refusals.register(&mut registry);
        registry.register(
            "kubernetes_requests",
            "Requests to the Kubernetes API server",
            metrics.kubernetes_requests.clone(),
        );
        registry.register(
            "reconcile_lag_seconds",
            "From when a weaver was to be looked at to when it was",
            metrics.reconcile_lag.clone(),
        );
        registry.register(
            "reconcile_failures",
            "Looks at a weaver that failed and are repeated",
            metrics.reconcile_failures.clone(),
        );
        registry.register("panics", "Tasks that panicked: faults of the server's own", metrics.panics.clone());
        Self { registry, ..metrics }
    }
}

impl Metrics {
    /// Takes note of a stage of a weaver's start, whose id says when it was made.
    pub fn stage(&self, weaver: WeaverId, kind: EventKind) {
        let stage = match kind {
            EventKind::Started => "started",
            EventKind::AgentConnected => "agent_connected",
            EventKind::Cloned => "cloned",
            EventKind::Ready => "ready",
            _ => return,
        };
        let Some(created) = weaver.uuid().get_timestamp() else { return };
        let (seconds, nanoseconds) = created.to_unix();
        let now = Duration::try_from(Timestamp::now().as_duration()).unwrap_or_default();
        let since = now.saturating_sub(Duration::new(seconds, nanoseconds));
        self.start.get_or_create(&Stage { stage }).observe(since.as_secs_f64());
    }

    /// All figures as OpenMetrics 1.0, with what others count: the live weavers by status, and the agents' links.
    pub fn text(&self, weavers: Vec<(String, i64)>, agents: usize) -> Result<String, fmt::Error> {
        // A status that nobody has any more is gone, not stuck at its last figure.
        self.weavers.clear();
        for (status, count) in weavers {
            self.weavers.get_or_create(&Status { status }).set(count);
        }
        self.agents.set(i64::try_from(agents).unwrap_or(i64::MAX));
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Counts a client that is attached, until what is returned is dropped.
    #[must_use]
    pub fn attached(&self) -> Attached {
        self.attachments.inc();
        Attached(self.attachments.clone())
    }
}

/// See [`Metrics::attached`].
pub struct Attached(Gauge<i64, AtomicI64>);

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.dec();
    }
}
