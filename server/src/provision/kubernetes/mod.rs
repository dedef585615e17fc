//! Weavers as Kubernetes pods.
//!
//! One watch on the namespace's weaver pods keeps what is known of each; the reconciler is told of every change, and at
//! rest nothing is asked. Pods have deterministic names, so making one that is there already is no mistake. What a pod
//! looks like is in [`pod`]; what is read from one, with the reason in words, is in [`observation`]; what an image is, in
//! [`image`]. Agents prove who they are with a projected service-account token, which the API server reviews.

mod image;
mod observation;
mod pod;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use futures_util::StreamExt as _;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    core::v1::Pod,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
    runtime::{
        WatchStreamExt as _,
        wait::{await_condition, conditions::is_deleted},
        watcher,
    },
};
use loom_api::{Secret, WeaverId};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout,
};

use super::{PodObservation, PodSpec, ProvisionError, Provisioner, ResolvedImage};
use crate::config::KubernetesConfig;
use image::Images;

/// How long a pod may take to be gone after it was deleted; then the reconciler tries again.
const DELETION: Duration = Duration::from_secs(60);
/// Seconds a pod's processes have to end by themselves. The host kills what is left before.
const GRACE_SECONDS: u32 = 5;
/// Where the API server says which pod a token belongs to (TokenReview's `extra`).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
/// See [`POD_NAME`].
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// The backend.
pub struct Kubernetes {
    client: Client,
    pods: Api<Pod>,
    config: KubernetesConfig,
    /// The authorities that agents trust for the server's certificate, in PEM.
    authorities: Option<String>,
    seen: Arc<Seen>,
    images: Images,
    /// Ends the watch when it is dropped.
    _watching: JoinSet<()>,
}

/// What the watch has seen.
struct Seen {
    pods: Mutex<HashMap<WeaverId, PodObservation>>,
    /// All pods have been listed once.
    listed: watch::Sender<bool>,
}

impl Seen {
    fn pods(&self) -> MutexGuard<'_, HashMap<WeaverId, PodObservation>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listed(&self) {
        // The sender is ours.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }
}

impl Kubernetes {
    /// Connects by the kubeconfig, or by the service account of the pod that the server runs in, and begins to watch.
    /// `changes` gets each weaver whose pod has changed.
    ///
    /// # Errors
    ///
    /// When there is no cluster to be reached, or not the namespace.
    pub async fn start(config: KubernetesConfig, changes: mpsc::Sender<WeaverId>) -> Result<Self> {
        let client = Client::try_default()
            .await
            .context("no Kubernetes cluster is configured: set KUBECONFIG, or run in a pod with a service account")?;
        check_namespace(&client, &config.namespace).await?;
        let authorities = match &config.agent_ca {
            Some(path) => Some(std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?),
            None => None,
        };
        let pods = Api::namespaced(client.clone(), &config.namespace);
        let seen = Arc::new(Seen { pods: Mutex::default(), listed: watch::Sender::new(false) });
        let mut watching = JoinSet::new();
        watching.spawn(follow(pods.clone(), Arc::clone(&seen), changes));
        let images = Images::new(client.clone(), &config);
        Ok(Self { client, pods, config, authorities, seen, images, _watching: watching })
    }

    /// The pod as the API server has it now.
    async fn get(&self, weaver: WeaverId) -> Result<Option<Pod>, ProvisionError> {
        let pod = self.pods.get_opt(&pod::name(weaver)).await.context("asking for a pod")?;
        Ok(pod.filter(|pod| pod::weaver(pod) == Some(weaver)))
    }
}

/// The namespace is the administrator's to make.
async fn check_namespace(client: &Client, namespace: &str) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    match pods.list_metadata(&kube::api::ListParams::default().limit(1)).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 403 => {
            bail!("this server's account may not list the pods of the namespace {namespace}: {}", status.message)
        }
        Err(error) => return Err(error).context("the Kubernetes API server cannot be used"),
    }
    // Reading namespaces needs a right of its own; without it, creating a pod will say the same.
    let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client.clone());
    if let Ok(None) = namespaces.get_opt(namespace).await {
        bail!("there is no namespace {namespace}; make it with: kubectl create namespace {namespace}");
    }
    Ok(())
}

/// Keeps `seen` up to date, for ever.
async fn follow(pods: Api<Pod>, seen: Arc<Seen>, changes: mpsc::Sender<WeaverId>) {
    let config = watcher::Config::default().labels(pod::SELECTOR);
    let mut events = std::pin::pin!(watcher(pods, config).default_backoff());
    let mut listing = HashMap::new();
    while let Some(event) = events.next().await {
        let changed: HashSet<WeaverId> = match event {
            Ok(watcher::Event::Init) => {
                listing.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(pod)) => {
                listing.extend(observation::of(&pod).map(|seen| (seen.weaver, seen)));
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                let before = std::mem::replace(&mut *seen.pods(), std::mem::take(&mut listing));
                seen.listed.send_replace(true);
                let after = seen.pods();
                before.keys().chain(after.keys()).copied().collect()
            }
            Ok(watcher::Event::Apply(pod)) => match observation::of(&pod) {
                Some(observed) => {
                    let weaver = observed.weaver;
                    let before = seen.pods().insert(weaver, observed.clone());
                    if before.as_ref() == Some(&observed) {
                        continue;
                    }
                    HashSet::from([weaver])
                }
                None => continue,
            },
            Ok(watcher::Event::Delete(pod)) => match pod::weaver(&pod) {
                Some(weaver) => {
                    seen.pods().remove(&weaver);
                    HashSet::from([weaver])
                }
                None => continue,
            },
            Err(error) => {
                tracing::warn!("the watch on pods broke and is made anew: {error}");
                continue;
            }
        };
        for weaver in changed {
            // The reconciler is gone when the server ends.
            let _ = changes.send(weaver).await;
        }
    }
}

#[async_trait]
impl Provisioner for Kubernetes {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn warnings(&self) -> &[String] {
        &[]
    }

    async fn resolve(&self, image: &str) -> Result<Option<ResolvedImage>, ProvisionError> {
        self.images.resolve(image).await.map(Some)
    }

    async fn ensure(&self, spec: &PodSpec) -> Result<(), ProvisionError> {
        self.seen.listed().await;
        if self.seen.pods().contains_key(&spec.weaver) {
            return Ok(());
        }
        let pod = pod::build(spec, &self.config, self.authorities.as_deref());
        match self.pods.create(&PostParams::default(), &pod).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(()),
            // Nothing will make a pod valid that is not: no rights, no quota and no namespace can change.
            Err(kube::Error::Api(status)) if status.code == 422 => {
                Err(ProvisionError::Refused(format!("Kubernetes does not take its pod: {}", status.message)))
            }
            Err(kube::Error::Api(status)) => Err(anyhow::anyhow!("{}", status.message).into()),
            Err(error) => Err(anyhow::Error::from(error).context("the Kubernetes API server cannot be reached").into()),
        }
    }

    async fn remove(&self, weaver: WeaverId) -> Result<(), ProvisionError> {
        let Some(pod) = self.get(weaver).await? else { return Ok(()) };
        let uid = pod.uid().unwrap_or_default();
        let name = pod.name_any();
        let parameters = DeleteParams::default().grace_period(GRACE_SECONDS);
        match self.pods.delete(&name, &parameters).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            Err(error) => return Err(anyhow::Error::from(error).context("deleting a pod").into()),
        }
        timeout(DELETION, await_condition(self.pods.clone(), &name, is_deleted(&uid)))
            .await
            .context("its pod does not end; is its node gone?")?
            .context("waiting for a pod's end")?;
        Ok(())
    }

    async fn observe(&self, weaver: WeaverId) -> Result<Option<PodObservation>, ProvisionError> {
        self.seen.listed().await;
        if let Some(seen) = self.seen.pods().get(&weaver) {
            return Ok(Some(seen.clone()));
        }
        // The watch may be behind: that a pod is gone is believed from the API server only.
        Ok(self.get(weaver).await?.as_ref().and_then(observation::of))
    }

    async fn list(&self) -> Result<Vec<WeaverId>, ProvisionError> {
        self.seen.listed().await;
        Ok(self.seen.pods().keys().copied().collect())
    }

    async fn verify_credential(&self, weaver: WeaverId, credential: &Secret) -> Result<bool, ProvisionError> {
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let request = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![pod::AUDIENCE.to_owned()]),
                token: Some(credential.expose().to_owned()),
            },
            ..TokenReview::default()
        };
        let review = reviews.create(&PostParams::default(), &request).await.context("asking for a token's review")?;
        let status = review.status.unwrap_or_default();
        let for_us = status.audiences.iter().flatten().any(|audience| audience == pod::AUDIENCE);
        if status.authenticated != Some(true) || !for_us {
            return Ok(false);
        }
        let Some(bearer) = status.user.as_ref().and_then(Bearer::of) else { return Ok(false) };
        // The review still says yes while a pod is being deleted, and tokens outlive restarts: the pod itself decides.
        let Some(pod) = self.get(weaver).await? else { return Ok(false) };
        Ok(bearer.account == pod::account(&self.config)
            && bearer.pod == pod.name_any()
            && Some(bearer.uid) == pod.uid().as_deref()
            && pod.metadata.deletion_timestamp.is_none()
            && observation::of(&pod).is_some_and(|seen| !seen.phase.is_final()))
    }
}

/// Who a token says its bearer is.
struct Bearer<'a> {
    account: &'a str,
    pod: &'a str,
    uid: &'a str,
}

impl<'a> Bearer<'a> {
    fn of(user: &'a UserInfo) -> Option<Self> {
        let extra: &BTreeMap<String, Vec<String>> = user.extra.as_ref()?;
        let one = |name: &str| match extra.get(name).map(Vec::as_slice) {
            Some([value]) => Some(value.as_str()),
            _ => None,
        };
        Some(Self { account: user.username.as_deref()?, pod: one(POD_NAME)?, uid: one(POD_UID)? })
    }
}
