//! What handlers share. Nothing below the routes knows it: each part holds only what it uses.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::{
    admission::Admission, agents::Hub, api::completion::Changes, config::Config, device_limits::DeviceLimits,
    events::Events, metrics::Metrics, provision::Provisioner, reconcile::Reconciler, relay::Relay, secrets::Secrets,
    sessions::Sessions, store::Store, streams::Streams,
};

/// What handlers share. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Shared>);

impl AppState {
    pub fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }
}

/// What an [`AppState`] refers to.
pub struct Shared {
    pub config: Config,
    /// The server's address for people and agents.
    pub url: String,
    pub secrets: Arc<Secrets>,
    pub store: Store,
    pub metrics: Arc<Metrics>,
    pub events: Events,
    pub provisioner: Arc<dyn Provisioner>,
    /// What brings rows and pods together.
    pub reconciler: Reconciler,
    /// The agents' links.
    pub agents: Arc<Hub>,
    /// Streams that agents are to dial back.
    pub streams: Streams,
    pub relay: Arc<Relay>,
    /// Connections that people have opened.
    pub sessions: Arc<Sessions>,
    /// Who may reach which weaver.
    pub admission: Arc<Admission>,
    /// What each address may do about device logins.
    pub device_limits: DeviceLimits,
    /// Requests that change something, which run to their end also without their clients.
    pub changes: Changes,
    /// The server is stopping.
    pub stopping: CancellationToken,
}

impl std::ops::Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}
