//! Backends that run weavers. The reconciler asks for what should be, looks at what is, and repeats itself; so every
//! method here may be called at any time and again.

mod authorities;
pub mod kubernetes;
pub mod local;

use std::path::Path;

use async_trait::async_trait;
use loom_api::{Secret, WeaverId, weaver::ResourceSpec};

/// What a backend needs to know of a weaver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// The weaver; its pod is named by it.
    pub weaver: WeaverId,
    /// The image, by its digest where that is known.
    pub image: String,
    pub resources: ResourceSpec,
}

/// What an image's name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The image by its digest.
    pub pinned: String,
    /// What it runs: its ENTRYPOINT and CMD. Empty when it names nothing.
    pub command: Vec<String>,
}

/// How far a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodPhase {
    /// Being made.
    Pending,
    /// Its processes run.
    Running,
    /// The main program ended with code 0.
    Succeeded,
    /// It could not be made, or ended otherwise.
    Failed,
}

impl PodPhase {
    /// Whether the pod has ended.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }
}

/// A pod as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodObservation {
    /// Whose it is.
    pub weaver: WeaverId,
    pub phase: PodPhase,
    /// Why, in words.
    pub reason: Option<String>,
    /// The main program's exit code, or 128 plus the signal.
    pub exit_code: Option<i32>,
    /// Whether it is being removed, by us or by somebody else.
    pub is_leaving: bool,
}

/// A pod as the API shows it. Unlike [`PodObservation`], nothing is decided by it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodInfo {
    /// The phase in the backend's own words.
    pub phase: Option<String>,
    pub ip: Option<String>,
    pub node: Option<String>,
    /// The digest of the image that it runs.
    pub image_digest: Option<String>,
}

/// Why a backend did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// It never will: trying again is of no use.
    #[error("{0}")]
    Refused(String),
    /// It may later.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

/// One way of running weavers.
#[async_trait]
pub trait Provisioner: Send + Sync + 'static {
    /// Its name in the API: `local` or `kubernetes`.
    fn name(&self) -> &'static str;

    /// What it cannot isolate here, in words; empty when nothing.
    fn warnings(&self) -> &[String];

    /// Says without asking anybody whether weavers can be made from an image of this name.
    ///
    /// # Errors
    ///
    /// Why not, in words.
    fn accepts(&self, image: &str) -> Result<(), String>;

    /// Says whether weavers can clone the `file://` repository at this path.
    ///
    /// # Errors
    ///
    /// Why not, in words.
    fn accepts_file(&self, _path: &Path) -> Result<(), String> {
        Err("weavers do not see the server's files: a file:// repository needs the local backend".to_owned())
    }

    /// Finds out what an image is; nothing on a backend without images.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn resolve(&self, image: &str) -> Result<Option<ResolvedImage>, ProvisionError>;

    /// Makes the pod of a weaver, or finds that it is there.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn ensure(&self, spec: &PodSpec) -> Result<(), ProvisionError>;

    /// Ends the pod of a weaver. Whether nothing of it is left; if something is, its end is a change that is told.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn remove(&self, weaver: WeaverId) -> Result<bool, ProvisionError>;

    /// The pod of a weaver, if there is one.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn observe(&self, weaver: WeaverId) -> Result<Option<PodObservation>, ProvisionError>;

    /// What is known of a weaver's pod without asking anybody: lists call this for every weaver.
    fn pod(&self, weaver: WeaverId) -> Option<PodInfo>;

    /// All weavers that have a pod.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn list(&self) -> Result<Vec<WeaverId>, ProvisionError>;

    /// Whether a credential proves that its bearer is the agent in the weaver's pod. On the local backend it is used
    /// up.
    ///
    /// # Errors
    ///
    /// [`ProvisionError`].
    async fn verify_credential(&self, weaver: WeaverId, credential: &Secret) -> Result<bool, ProvisionError>;
}
