//! A namespace of the test cluster, for one system's weavers: Pod Security *restricted* is enforced in it.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    Weaver,
    cluster::{self, pki, registry},
    system::TIMEOUT,
    tools,
    wait::eventually,
};

/// One namespace; it is deleted with everything in it when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    kube: PathBuf,
    kubeconfig: PathBuf,
}

impl Namespace {
    /// A new namespace when `backend` is `kubernetes`.
    pub(crate) fn wanted(backend: Option<&str>) -> Result<Option<Self>> {
        match backend {
            None | Some("local") => Ok(None),
            Some("kubernetes") => Self::create().map(Some),
            Some(other) => bail!("there is no backend {other} for tests"),
        }
    }

    /// A new namespace.
    pub fn create() -> Result<Self> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let kubeconfig = std::env::var_os("KUBECONFIG").context(
            "there is no cluster for the tests: run `cargo xtask test`, or `cargo xtask cluster up` and set KUBECONFIG",
        )?;
        let namespace = Self {
            name: format!("loom-{now}-{}-{count}", std::process::id()),
            kube: tools::find("kube")?,
            kubeconfig: kubeconfig.into(),
        };
        namespace.make()?;
        Ok(namespace)
    }

    /// Makes it, as when it was deleted meanwhile.
    pub fn make(&self) -> Result<()> {
        let name = &self.name;
        self.kubectl_anywhere(
            &["apply", "-f", "-"],
            &format!(
                "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {{pod-security.kubernetes.io/enforce: restricted}}\n"
            ),
        )?;
        eventually("the namespace's service account", TIMEOUT, || {
            Ok(self.kubectl(&["get", "serviceaccount", "default"]).is_ok().then_some(()))
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs kubectl in the namespace; what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_anywhere(&[&["--namespace", &self.name], arguments].concat(), "")
    }

    /// Makes or changes what a manifest says.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.kubectl_anywhere(&["--namespace", &self.name, "apply", "-f", "-"], manifest).map(drop)
    }

    /// Makes or changes what a manifest says, in the namespaces that it says.
    pub fn apply_anywhere(&self, manifest: &str) -> Result<()> {
        self.kubectl_anywhere(&["apply", "-f", "-"], manifest).map(drop)
    }

    fn kubectl_anywhere(&self, arguments: &[&str], input: &str) -> Result<String> {
        cluster::kubectl(&self.kube, &self.kubeconfig, arguments, input)
    }

    /// The weavers' pods.
    pub fn pods(&self) -> Result<Vec<Value>> {
        let list = self.kubectl(&["get", "pods", "--selector", "app=loom-weaver", "--output", "json"])?;
        let list: Value = serde_json::from_str(&list)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// The pod of a weaver, if there is one.
    pub fn pod(&self, weaver: &Weaver) -> Result<Option<Value>> {
        Ok(self.pods()?.into_iter().find(|pod| pod["metadata"]["labels"]["weaver-id"] == weaver.id.as_str()))
    }

    pub(crate) fn pod_uid(&self, weaver: &Weaver) -> Result<Option<String>> {
        Ok(self.pod(weaver)?.and_then(|pod| pod["metadata"]["uid"].as_str().map(str::to_owned)))
    }

    pub(crate) fn delete_pod(&self, weaver: &Weaver) -> Result<()> {
        let name = format!("weaver-{}", weaver.id.trim_start_matches("W-"));
        self.kubectl(&["delete", "pod", &name, "--grace-period=0", "--force"]).map(drop)
    }

    /// The settings of a server in front of this namespace, with a certificate in `directory` for the node's address.
    pub(crate) fn server_settings(&self, directory: &Path, port: u16) -> Result<Vec<(String, String)>> {
        let certificates = pki::for_server(directory, &format!("IP:127.0.0.1,IP:{}", cluster::NODE))?;
        let file = |name: &str| certificates.join(name).to_string_lossy().into_owned();
        let settings = [
            ("KUBECONFIG", self.kubeconfig.to_string_lossy().into_owned()),
            ("LOOM_SERVER_BACKEND", "kubernetes".to_owned()),
            ("LOOM_SERVER_TLS_CERT", file("server.crt")),
            ("LOOM_SERVER_TLS_KEY", file("server.key")),
            ("LOOM_SERVER_PUBLIC_URL", format!("https://127.0.0.1:{port}")),
            ("LOOM_SERVER_DEFAULT_IMAGE", registry::image("weaver")),
            ("LOOM_SERVER_KUBERNETES_PLAIN_HTTP_REGISTRIES", format!("{},{}", registry::OPEN, registry::PRIVATE)),
            ("LOOM_SERVER_KUBERNETES_NAMESPACE", self.name.clone()),
            ("LOOM_SERVER_KUBERNETES_AGENT_IMAGE", registry::image("agent")),
            ("LOOM_SERVER_KUBERNETES_AGENT_URL", format!("https://{}:{port}", cluster::NODE)),
            ("LOOM_SERVER_KUBERNETES_AGENT_CA", file("ca.crt")),
            // The node is small, and tests run side by side.
            ("LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", "20".to_owned()),
            ("LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", "64".to_owned()),
        ];
        Ok(settings.map(|(name, value)| (name.to_owned(), value)).into())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The cluster goes on deleting by itself; a test that failed has more to tell than this.
        let _ = self.kubectl_anywhere(&["delete", "namespace", &self.name, "--wait=false", "--now"], "");
    }
}
