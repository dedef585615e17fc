//! What the server must be allowed to do in the cluster, and whether it is.

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};

use super::Config;

/// One right, as a rule of a Role or ClusterRole names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// The verb.
    pub verb: &'static str,
    /// The API group; empty for the core's.
    pub group: &'static str,
    /// The resource.
    pub resource: &'static str,
    /// The one object that is meant, if only one is.
    pub name: Option<String>,
    /// The namespace; none for what belongs to the whole cluster.
    pub namespace: Option<String>,
    /// What it is for.
    pub why: &'static str,
}

impl std::fmt::Display for Right {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        if let Some(name) = &self.name {
            write!(f, "/{name}")?;
        }
        match &self.namespace {
            Some(namespace) => write!(f, " in {namespace}"),
            None => f.write_str(" in the cluster"),
        }
    }
}

/// Everything that the server needs. The manifests in `deploy/` grant this and nothing else.
#[must_use]
pub fn needed(config: &Config) -> Vec<Right> {
    let inside = |verb, resource, why| Right {
        verb,
        group: "",
        resource,
        name: None,
        namespace: Some(config.namespace.clone()),
        why,
    };
    let mut rights = vec![
        inside("list", "pods", "to see what runs"),
        inside("watch", "pods", "to see what runs"),
        inside("get", "pods", "to be sure that a pod is gone"),
        inside("create", "pods", "to make weavers"),
        inside("delete", "pods", "to end weavers"),
        inside("list", "events", "to say what a weaver waits for"),
        inside("watch", "events", "to say what a weaver waits for"),
        Right {
            verb: "create",
            group: "authentication.k8s.io",
            resource: "tokenreviews",
            name: None,
            namespace: None,
            why: "to know which pod an agent is in",
        },
        Right {
            verb: "get",
            group: "",
            resource: "namespaces",
            name: Some(config.namespace.clone()),
            namespace: None,
            why: "to say when the namespace is missing",
        },
    ];
    rights.extend(config.pull_secrets.iter().map(|name| Right {
        name: Some(name.clone()),
        ..inside("get", "secrets", "to read images with the pull secret")
    }));
    rights
}

/// Those that the server has not.
///
/// # Errors
///
/// When the API server cannot be asked.
pub async fn missing(client: &Client, config: &Config) -> Result<Vec<Right>> {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let reviews = &reviews;
    // All at once: the server's start waits for them.
    let asked = needed(config).into_iter().map(async |right| {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(right.verb.to_owned()),
                    group: Some(right.group.to_owned()),
                    resource: Some(right.resource.to_owned()),
                    name: right.name.clone(),
                    namespace: right.namespace.clone(),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = reviews.create(&PostParams::default(), &review).await.context("asking for the server's rights")?;
        anyhow::Ok((!answer.status.is_some_and(|status| status.allowed)).then_some(right))
    });
    Ok(try_join_all(asked).await?.into_iter().flatten().collect())
}
