//! Weavers as Kubernetes pods.
//!
//! One watch on the namespace's weaver pods, and one on what Kubernetes says of them ([`watch`]), keep what is known of
//! each; the reconciler is told of every change, and at rest nothing is asked. Pods have deterministic names, so making
//! one that is there already is no mistake. What a pod looks like is in [`pod`]; what is read from one, with the reason
//! in words, is in [`observation`]; what an image is, in [`image`]. Agents prove who they are with a projected
//! service-account token, which the API server reviews.

mod config;
mod image;
mod observation;
mod pod;
mod pull;
mod registry;
pub mod rights;
mod watch;

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use axum::http::Request;
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    core::v1::Pod,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
    client::{Body, ClientBuilder},
};
use loom_api::{Secret, WeaverId};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::mpsc, task::JoinSet};
use tower::util::MapRequestLayer;

use super::{PodInfo, PodObservation, PodSpec, ProvisionError, Provisioner, ResolvedImage, authorities};
pub use config::{Config, DEFAULT_IMAGE, Settings};
use image::Images;
pub use registry::Authority;
use watch::PodCache;

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
    config: Config,
    /// The authorities that agents trust for the server's certificate, in PEM.
    authorities: Option<String>,
    seen: Arc<PodCache>,
    images: Images,
    /// Ends the watches when it is dropped.
    _watching: JoinSet<()>,
}

impl Kubernetes {
    /// Connects by the kubeconfig, or by the service account of the pod that the server runs in, and begins to watch.
    /// `changes` gets each weaver whose pod has changed. While the API server cannot be reached, what exists goes on, and
    /// what is new waits.
    ///
    /// # Errors
    ///
    /// When no cluster is configured, or it has not the namespace.
    pub async fn start(config: Config, requests: &Counter, changes: mpsc::Sender<WeaverId>) -> Result<Self> {
        let client = connect(requests).await?;
        match Self::check(&client, &config).await {
            Err(error) if !is_answer(&error) => {
                tracing::warn!("{}; nothing was checked", in_words(error));
            }
            checked => checked?,
        }
        let authorities = config.agent_ca.as_deref().map(authorities::read).transpose()?;
        let pods = Api::namespaced(client.clone(), &config.namespace);
        let seen = Arc::new(PodCache::default());
        let mut watching = JoinSet::new();
        watching.spawn(watch::pods(pods.clone(), Arc::clone(&seen), changes.clone()));
        watching.spawn(watch::events(Api::namespaced(client.clone(), &config.namespace), Arc::clone(&seen), changes));
        let images = Images::new(client.clone(), &config)?;
        Ok(Self { client, pods, config, authorities, seen, images, _watching: watching })
    }

    async fn check(client: &Client, config: &Config) -> Result<()> {
        check_namespace(client, &config.namespace).await?;
        for right in rights::missing(client, config).await? {
            tracing::warn!("this server may not {right}, which it needs {}", right.why);
        }
        Ok(())
    }

    /// The pod as the API server has it now.
    async fn get(&self, weaver: WeaverId) -> Result<Option<Pod>, ProvisionError> {
        let pod = self.pods.get_opt(&pod::name(weaver)).await.map_err(failure)?;
        Ok(pod.filter(|pod| pod::weaver(pod) == Some(weaver)))
    }
}

/// Connects to the cluster of the kubeconfig, or to the one that the server runs in; `requests` counts what is asked of
/// its API server.
///
/// # Errors
///
/// When neither is there.
pub async fn connect(requests: &Counter) -> Result<Client> {
    let config = kube::Config::infer()
        .await
        .context("no Kubernetes cluster is configured: set KUBECONFIG, or run in a pod with a service account")?;
    let requests = requests.clone();
    let count = MapRequestLayer::new(move |request: Request<Body>| {
        requests.inc();
        request
    });
    Ok(ClientBuilder::try_from(config)
        .context("the cluster's configuration cannot be used")?
        .with_layer(&count)
        .build())
}

/// Looks at everything that the server needs of the cluster, and prints what it found.
///
/// # Errors
///
/// When something is missing; all of it was printed.
pub async fn check(config: &Config) -> Result<()> {
    let client = connect(&Counter::default()).await?;
    let version = client.apiserver_version().await.context("the Kubernetes API server cannot be used")?;
    println!("ok       Kubernetes {}.{}", version.major, version.minor);
    let mut problems = 0;
    match check_namespace(&client, &config.namespace).await {
        Ok(()) => println!("ok       the namespace {}", config.namespace),
        Err(error) => {
            println!("MISSING  {error:#}");
            problems += 1;
        }
    }
    let missing = rights::missing(&client, config).await?;
    for right in rights::needed(config) {
        if missing.contains(&right) {
            println!("MISSING  the right to {right}, {}", right.why);
            problems += 1;
        } else {
            println!("ok       the right to {right}");
        }
    }
    match Images::new(client, config)?.resolve(&config.agent_image).await {
        Ok(image) => println!("ok       the agent's image, {}", image.pinned),
        // Its nodes may have it all the same.
        Err(error) => println!("unknown  {error}"),
    }
    match problems {
        0 => Ok(()),
        1 => bail!("one thing is missing; deploy/manifests.yaml has all rules"),
        more => bail!("{more} things are missing; deploy/manifests.yaml has all rules"),
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

#[async_trait]
impl Provisioner for Kubernetes {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn warnings(&self) -> &[String] {
        &[]
    }

    fn accepts(&self, _image: &str) -> Result<(), String> {
        Ok(())
    }

    async fn resolve(&self, image: &str) -> Result<Option<ResolvedImage>, ProvisionError> {
        self.images.resolve(image).await.map(Some)
    }

    async fn ensure(&self, spec: &PodSpec) -> Result<(), ProvisionError> {
        self.seen.listed().await?;
        if self.seen.pod(spec.weaver).is_some() {
            return Ok(());
        }
        let pod = pod::build(spec, &self.config, self.authorities.as_deref());
        match self.pods.create(&PostParams::default(), &pod).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                let own = self.get(spec.weaver).await?;
                Ok(own.map(drop).context("there is a pod of its name that Loom did not make")?)
            }
            // Nothing will make a pod valid that is not: no rights, no quota and no namespace can change.
            Err(kube::Error::Api(status)) if status.code == 422 => {
                Err(ProvisionError::Refused(format!("Kubernetes does not take its pod: {}", status.message)))
            }
            Err(error) => Err(failure(error)),
        }
    }

    async fn remove(&self, weaver: WeaverId) -> Result<bool, ProvisionError> {
        self.seen.listed().await?;
        let known = match self.seen.pod(weaver) {
            Some(known) => known,
            // One that was made a moment ago may not have been seen yet.
            None => match self.get(weaver).await? {
                Some(pod) => observation::of(&pod).context("a pod of no weaver")?,
                None => return Ok(true),
            },
        };
        if known.is_leaving {
            return Ok(false);
        }
        let parameters = DeleteParams::default().grace_period(GRACE_SECONDS);
        match self.pods.delete(&pod::name(weaver), &parameters).await {
            Ok(_) => Ok(false),
            // The watch says so, too, in a moment.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(failure(error)),
        }
    }

    async fn observe(&self, weaver: WeaverId) -> Result<Option<PodObservation>, ProvisionError> {
        self.seen.listed().await?;
        if let Some(seen) = self.seen.pod(weaver) {
            return Ok(Some(seen));
        }
        // The watch may be behind: that a pod is gone is believed from the API server only.
        Ok(self.get(weaver).await?.as_ref().and_then(observation::of))
    }

    fn pod(&self, weaver: WeaverId) -> Option<PodInfo> {
        self.seen.info(weaver)
    }

    async fn list(&self) -> Result<Vec<WeaverId>, ProvisionError> {
        self.seen.listed().await?;
        Ok(self.seen.weavers())
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
        let review = reviews.create(&PostParams::default(), &request).await.map_err(failure)?;
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

/// What the API server said, or that it said nothing.
fn failure(error: kube::Error) -> ProvisionError {
    match error {
        kube::Error::Api(status) => anyhow::anyhow!("{}", status.message).into(),
        error => anyhow::anyhow!("{}", in_words(error)).into(),
    }
}

/// Whether the API server itself said so, or what it said was judged.
fn is_answer(error: &anyhow::Error) -> bool {
    error.downcast_ref::<kube::Error>().is_none_or(|error| matches!(error, kube::Error::Api(_)))
}

/// An error that is none of the API server's.
fn in_words(error: impl Into<anyhow::Error>) -> String {
    format!("the Kubernetes API server cannot be reached: {}", error.into().root_cause())
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
