//! What is known of the weavers' pods without asking: two watches, one on the pods and one on what Kubernetes says of
//! them in events.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::StreamExt as _;
use k8s_openapi::{api::core::v1, apimachinery::pkg::apis::meta::v1::MicroTime, jiff::Timestamp};
use kube::{
    Api,
    runtime::{WatchStreamExt as _, utils::Backoff, watcher},
};
use loom_api::WeaverId;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{mpsc, watch};

use super::{observation, pod};
use crate::provision::{PodInfo, PodObservation, PodPhase, ProvisionError};

/// The longest pause before a watch that broke is made anew: so long the news of an outage's end may take.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// What the watches have seen.
pub(super) struct PodCache {
    known: Mutex<Known>,
    listing: watch::Sender<Listing>,
}

/// Whether all pods are known.
enum Listing {
    /// They were not asked for yet.
    Pending,
    /// The API server did not say, at the last try.
    Failed(String),
    /// They were listed once, and are watched since.
    Done,
}

#[derive(Default)]
struct Known {
    pods: HashMap<WeaverId, SeenPod>,
    /// The newest thing that an event tells of each pod on its way; for pods only.
    progress: HashMap<WeaverId, Progress>,
}

struct SeenPod {
    observation: PodObservation,
    info: PodInfo,
}

impl SeenPod {
    /// Nothing when the pod is not a weaver's.
    fn of(pod: &v1::Pod) -> Option<Self> {
        Some(Self { observation: observation::of(pod)?, info: observation::info(pod) })
    }
}

struct Progress {
    at: Option<Timestamp>,
    words: String,
}

impl Default for PodCache {
    fn default() -> Self {
        Self { known: Mutex::default(), listing: watch::Sender::new(Listing::Pending) }
    }
}

impl PodCache {
    /// Waits until all pods are known.
    ///
    /// # Errors
    ///
    /// When the API server cannot be asked; then all that it lists later is told as a change.
    pub(super) async fn listed(&self) -> Result<(), ProvisionError> {
        let mut listing = self.listing.subscribe();
        let settled = listing.wait_for(|listing| !matches!(listing, Listing::Pending)).await;
        match settled.as_deref() {
            Ok(Listing::Failed(error)) => Err(anyhow::anyhow!("{error}").into()),
            // The sender is ours.
            _ => Ok(()),
        }
    }

    /// Where the pod of a weaver runs, and what.
    pub(super) fn info(&self, weaver: WeaverId) -> Option<PodInfo> {
        Some(self.known().pods.get(&weaver)?.info.clone())
    }

    /// The pod of a weaver.
    pub(super) fn pod(&self, weaver: WeaverId) -> Option<PodObservation> {
        let known = self.known();
        let mut pod = known.pods.get(&weaver)?.observation.clone();
        // A pod's own state says more, when it says something.
        if pod.phase == PodPhase::Pending && pod.reason.is_none() && !pod.is_leaving {
            pod.reason = known.progress.get(&weaver).map(|progress| progress.words.clone());
        }
        Some(pod)
    }

    /// Every weaver that has a pod.
    pub(super) fn weavers(&self) -> Vec<WeaverId> {
        self.known().pods.keys().copied().collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock()
    }

    /// Takes in what is now known of a pod; the weaver, when it changes something for the reconciler.
    fn put(&self, pod: SeenPod) -> Option<WeaverId> {
        let (weaver, observation) = (pod.observation.weaver, pod.observation.clone());
        let before = self.known().pods.insert(weaver, pod);
        before.is_none_or(|before| before.observation != observation).then_some(weaver)
    }

    /// Replaces what is known of all pods; the weavers that this changes something for.
    fn replace(&self, pods: HashMap<WeaverId, SeenPod>) -> HashSet<WeaverId> {
        let mut known = self.known();
        let changed = known.pods.keys().chain(pods.keys()).copied().collect();
        known.progress.retain(|weaver, _| pods.contains_key(weaver));
        known.pods = pods;
        self.listing.send_replace(Listing::Done);
        changed
    }
}

/// The usual pauses between two tries, jittered and growing, but never longer than [`MAX_PAUSE`].
#[derive(Default)]
struct Pauses(watcher::DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(MAX_PAUSE))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Watches the pods, for ever; `changes` gets each weaver whose pod has changed.
pub(super) async fn pods(pods: Api<v1::Pod>, seen: Arc<PodCache>, changes: mpsc::Sender<WeaverId>) {
    let config = watcher::Config::default().labels(pod::SELECTOR);
    let mut events = std::pin::pin!(watcher(pods, config).backoff(Pauses::default()));
    let mut listing = HashMap::new();
    while let Some(event) = events.next().await {
        let changed = match event {
            Ok(watcher::Event::Init) => {
                listing.clear();
                HashSet::new()
            }
            Ok(watcher::Event::InitApply(pod)) => {
                listing.extend(SeenPod::of(&pod).map(|pod| (pod.observation.weaver, pod)));
                HashSet::new()
            }
            Ok(watcher::Event::InitDone) => seen.replace(std::mem::take(&mut listing)),
            Ok(watcher::Event::Apply(pod)) => SeenPod::of(&pod).and_then(|pod| seen.put(pod)).into_iter().collect(),
            Ok(watcher::Event::Delete(pod)) => {
                let weaver = pod::weaver(&pod);
                if let Some(weaver) = weaver {
                    let mut known = seen.known();
                    known.pods.remove(&weaver);
                    known.progress.remove(&weaver);
                }
                weaver.into_iter().collect()
            }
            Err(error) => {
                tracing::warn!("the watch on pods broke and is made anew: {error}");
                seen.listing.send_if_modified(|listing| {
                    let is_first = !matches!(listing, Listing::Done);
                    if is_first {
                        *listing = Listing::Failed(super::in_words(error));
                    }
                    is_first
                });
                HashSet::new()
            }
        };
        for weaver in changed {
            // The reconciler is gone when the server ends.
            let _ = changes.send(weaver).await;
        }
    }
}

/// Watches what Kubernetes says of the pods, for ever; `changes` gets each weaver that there is news of.
pub(super) async fn events(events: Api<v1::Event>, seen: Arc<PodCache>, changes: mpsc::Sender<WeaverId>) {
    let config = watcher::Config::default().fields("involvedObject.kind=Pod");
    let mut events = std::pin::pin!(watcher(events, config).backoff(Pauses::default()));
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(watcher::Event::InitApply(event) | watcher::Event::Apply(event)) => event,
            Ok(_) => continue,
            Err(error) => {
                // Weavers run without it; only their reasons are poorer.
                tracing::warn!("the watch on events broke and is made anew: {error}");
                continue;
            }
        };
        let Some((weaver, words)) = observation::progress(&event) else { continue };
        let at = time(&event);
        let is_news = {
            let mut known = seen.known();
            // Events are told again whenever the watch is made anew, and outlive their pods.
            let older = known.progress.get(&weaver).is_some_and(|earlier| at <= earlier.at);
            let has_pod = known.pods.contains_key(&weaver);
            if has_pod && !older {
                known.progress.insert(weaver, Progress { at, words });
            }
            has_pod && !older
        };
        if is_news {
            let _ = changes.send(weaver).await;
        }
    }
}

/// When an event happened last.
fn time(event: &v1::Event) -> Option<Timestamp> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.clone());
    let micro = |time: MicroTime| time.0;
    series
        .map(micro)
        .or_else(|| event.last_timestamp.clone().map(|time| time.0))
        .or_else(|| event.event_time.clone().map(micro))
}
