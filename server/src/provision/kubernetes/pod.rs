//! What a weaver's pod looks like. It passes Pod Security *restricted*, and no secret stands in it.
//!
//! ```text
//! init container "agent" (restartPolicy: Always, so it goes on beside the other): loom-agent sidecar
//!     its postStart hook copies loom-agent into the volume "loom-bin" before the other container starts
//! container "weaver": the user's image, with /loom/bin/loom-agent host as PID 1
//! volumes: loom-bin, loom-run (the host's socket), workspace, home; loom-token for the agent alone
//! ```

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, EmptyDirVolumeSource, EnvVar, ExecAction, Lifecycle, LifecycleHandler,
        LocalObjectReference, Pod, PodSecurityContext, PodSpec as KubePodSpec, ProjectedVolumeSource,
        ResourceRequirements, SeccompProfile, SecurityContext, ServiceAccountTokenProjection, Toleration, Volume,
        VolumeMount, VolumeProjection,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{ResourceExt as _, api::ObjectMeta};
use loom_api::{WeaverId, weaver::ResourceSpec};

use super::config::{Config, Taint};
use crate::provision::PodSpec;

/// Finds all weaver pods.
pub(super) const SELECTOR: &str = "app=loom-weaver";
/// Whom the agent's token is for.
pub(super) const AUDIENCE: &str = "loom";
/// The user's container.
pub(super) const WEAVER: &str = "weaver";
/// The agent's container.
pub(super) const AGENT: &str = "agent";
/// The label with the weaver's id.
const WEAVER_ID: &str = "weaver-id";
/// Everything runs as this user and group: images need not know of it.
const UID: i64 = 1000;
/// The service account of weaver pods. It needs no rights.
const ACCOUNT: &str = "default";
/// Where the agent finds its token.
const TOKEN_DIRECTORY: &str = "/var/run/secrets/loom";
/// How long a token is good; the kubelet replaces it in time.
const TOKEN_SECONDS: i64 = 3600;
/// A pod ends by itself after the longest life that a weaver can have, even when no server lives: 48 hours and a bit.
const BACKSTOP_SECONDS: i64 = 48 * 3600 + 600;

/// The pod's name.
pub(super) fn name(weaver: WeaverId) -> String {
    format!("weaver-{}", weaver.uuid())
}

/// The weaver whose pod has this name.
pub(super) fn named(name: &str) -> Option<WeaverId> {
    format!("W-{}", name.strip_prefix("weaver-")?).parse().ok()
}

/// Whose pod it is, by its label.
pub(super) fn weaver(pod: &Pod) -> Option<WeaverId> {
    let weaver: WeaverId = pod.labels().get(WEAVER_ID)?.parse().ok()?;
    // A pod with another name is not one that the server made.
    (pod.metadata.name.as_deref() == Some(&name(weaver))).then_some(weaver)
}

/// The user name of weaver pods' service account.
pub(super) fn account(config: &Config) -> String {
    format!("system:serviceaccount:{}:{ACCOUNT}", config.namespace)
}

/// The pod of a weaver.
pub(super) fn build(spec: &PodSpec, config: &Config, authorities: Option<&str>) -> Pod {
    let id = spec.weaver.to_string();
    let labels = [("app", "loom-weaver"), (WEAVER_ID, &id), ("app.kubernetes.io/managed-by", "loom-server")];
    Pod {
        metadata: ObjectMeta {
            name: Some(name(spec.weaver)),
            labels: Some(labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
            ..ObjectMeta::default()
        },
        spec: Some(KubePodSpec {
            init_containers: Some(vec![agent(spec, config, authorities)]),
            containers: vec![user(spec, config)],
            volumes: Some(volumes(spec.resources)),
            restart_policy: Some("Never".to_owned()),
            active_deadline_seconds: Some(BACKSTOP_SECONDS),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            service_account_name: Some(ACCOUNT.to_owned()),
            // The server's grace period is shorter; this one is for who deletes the pod by hand.
            termination_grace_period_seconds: Some(15),
            node_selector: (!config.node_selector.is_empty()).then(|| config.node_selector.clone()),
            tolerations: (!config.tolerations.is_empty()).then(|| config.tolerations.iter().map(toleration).collect()),
            runtime_class_name: config.runtime_class.clone(),
            image_pull_secrets: (!config.pull_secrets.is_empty())
                .then(|| config.pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() }).collect()),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(UID),
                run_as_group: Some(UID),
                fs_group: Some(UID),
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            ..KubePodSpec::default()
        }),
        status: None,
    }
}

fn agent(spec: &PodSpec, config: &Config, authorities: Option<&str>) -> Container {
    let token = format!("{TOKEN_DIRECTORY}/token");
    let mut env = vec![
        variable("LOOM_WEAVER_ID", &spec.weaver.to_string()),
        variable("LOOM_SERVER_URL", &config.agent_url),
        variable("LOOM_CREDENTIAL_FILE", &token),
        variable("LOOM_RUN_DIR", "/loom/run"),
        variable("LOOM_WORKSPACE_DIR", "/workspace"),
    ];
    if !config.agent_udp {
        env.push(variable("LOOM_UDP_BIND", "off"));
    }
    env.extend(authorities.map(|pem| variable("LOOM_SERVER_CA", pem)));
    let install = ["/usr/local/bin/loom-agent", "install", "/loom/bin"].map(str::to_owned).to_vec();
    Container {
        name: AGENT.to_owned(),
        image: Some(config.agent_image.clone()),
        command: Some(["/usr/local/bin/loom-agent", "sidecar"].map(str::to_owned).to_vec()),
        env: Some(env),
        // Beside the main container, not before it.
        restart_policy: Some("Always".to_owned()),
        // The main container starts when this hook is done, so its program is there by then.
        lifecycle: Some(Lifecycle {
            post_start: Some(LifecycleHandler {
                exec: Some(ExecAction { command: Some(install) }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        resources: Some(ResourceRequirements {
            requests: Some(quantities(ResourceSpec { cpu_millicores: 5, memory_mb: 32 })),
            limits: Some(quantities(ResourceSpec { cpu_millicores: 2000, memory_mb: 256 })),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(vec![
            mount("loom-bin", "/loom/bin", false),
            mount("loom-run", "/loom/run", false),
            mount("workspace", "/workspace", false),
            mount("loom-token", TOKEN_DIRECTORY, true),
        ]),
        security_context: Some(restricted(true)),
        ..Container::default()
    }
}

fn user(spec: &PodSpec, config: &Config) -> Container {
    let limits = spec.resources;
    let requests = ResourceSpec {
        cpu_millicores: limits.cpu_millicores.min(config.requests.cpu_millicores),
        memory_mb: limits.memory_mb.min(config.requests.memory_mb),
    };
    Container {
        name: WEAVER.to_owned(),
        image: Some(spec.image.clone()),
        command: Some(["/loom/bin/loom-agent", "host"].map(str::to_owned).to_vec()),
        working_dir: Some("/workspace".to_owned()),
        env: Some(vec![variable("LOOM_WEAVER_ID", &spec.weaver.to_string()), variable("HOME", "/home/loom")]),
        resources: Some(ResourceRequirements {
            requests: Some(with_disk(quantities(requests), 0)),
            // Each of the two volumes full, and as much in the container's own layer.
            limits: Some(with_disk(quantities(limits), 3 * volume_megabytes(limits))),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(vec![
            mount("loom-bin", "/loom/bin", true),
            mount("loom-run", "/loom/run", false),
            mount("workspace", "/workspace", false),
            mount("home", "/home/loom", false),
        ]),
        // The image's files are the user's to change.
        security_context: Some(restricted(false)),
        ..Container::default()
    }
}

fn volumes(resources: ResourceSpec) -> Vec<Volume> {
    let empty = |name: &str, limit: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(Quantity(limit.to_owned())),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    };
    let token = VolumeProjection {
        service_account_token: Some(ServiceAccountTokenProjection {
            audience: Some(AUDIENCE.to_owned()),
            expiration_seconds: Some(TOKEN_SECONDS),
            path: "token".to_owned(),
        }),
        ..VolumeProjection::default()
    };
    let workspace = format!("{}Mi", volume_megabytes(resources));
    vec![
        empty("loom-bin", "128Mi"),
        empty("loom-run", "16Mi"),
        empty("workspace", &workspace),
        empty("home", &workspace),
        Volume {
            name: "loom-token".to_owned(),
            projected: Some(ProjectedVolumeSource { sources: Some(vec![token]), default_mode: Some(0o440) }),
            ..Volume::default()
        },
    ]
}

fn restricted(read_only_root: bool) -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
        read_only_root_filesystem: Some(read_only_root),
        ..SecurityContext::default()
    }
}

fn quantities(resources: ResourceSpec) -> BTreeMap<String, Quantity> {
    [
        ("cpu".to_owned(), Quantity(format!("{}m", resources.cpu_millicores))),
        ("memory".to_owned(), Quantity(format!("{}Mi", resources.memory_mb))),
    ]
    .into()
}

/// How large the workspace may become, and the home: ten times the memory, for a repository with its build, not an
/// archive.
fn volume_megabytes(resources: ResourceSpec) -> u64 {
    u64::from(resources.memory_mb) * 10
}

/// With what the pod may put on its node's disk in all: its volumes count, too.
fn with_disk(mut quantities: BTreeMap<String, Quantity>, megabytes: u64) -> BTreeMap<String, Quantity> {
    quantities.insert("ephemeral-storage".to_owned(), Quantity(format!("{megabytes}Mi")));
    quantities
}

fn toleration(taint: &Taint) -> Toleration {
    Toleration {
        key: Some(taint.key.clone()),
        operator: Some(if taint.value.is_some() { "Equal" } else { "Exists" }.to_owned()),
        value: taint.value.clone(),
        effect: Some(taint.effect.clone()),
        ..Toleration::default()
    }
}

fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::provision::kubernetes) fn config() -> Config {
        Config {
            namespace: "loom-weavers".to_owned(),
            agent_image: "loom.test/agent:1".to_owned(),
            agent_url: "https://loom.example".to_owned(),
            agent_ca: None,
            pull_secrets: vec!["registry".to_owned()],
            plain_http_registries: Vec::new(),
            private_registries: Vec::new(),
            agent_udp: true,
            node_selector: BTreeMap::new(),
            tolerations: vec!["gpu:NoSchedule".parse().unwrap()],
            requests: ResourceSpec { cpu_millicores: 500, memory_mb: 512 },
            runtime_class: None,
        }
    }

    fn spec() -> PodSpec {
        PodSpec {
            weaver: WeaverId::generate(),
            image: "python:3.13".to_owned(),
            resources: ResourceSpec { cpu_millicores: 200, memory_mb: 1024 },
        }
    }

    #[test]
    fn a_pod_is_found_again_by_its_name_and_label() {
        let spec = spec();
        let mut pod = build(&spec, &config(), None);
        assert_eq!(weaver(&pod), Some(spec.weaver));
        pod.metadata.name = Some("weaver-of-somebody".to_owned());
        assert_eq!(weaver(&pod), None);
    }

    #[test]
    fn the_users_container_has_no_token_and_cannot_change_the_agent() {
        let pod = build(&spec(), &config(), Some("PEM"));
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let mounts = container.volume_mounts.as_ref().unwrap();
        assert!(mounts.iter().all(|mount| mount.name != "loom-token"));
        assert!(mounts.iter().any(|mount| mount.name == "loom-bin" && mount.read_only == Some(true)));
        let names: Vec<_> = container.env.as_ref().unwrap().iter().map(|variable| variable.name.as_str()).collect();
        assert_eq!(names, ["LOOM_WEAVER_ID", "HOME"]);
    }

    #[test]
    fn requests_never_exceed_limits() {
        let pod = build(&spec(), &config(), None);
        let resources = pod.spec.unwrap().containers[0].resources.clone().unwrap();
        assert_eq!(resources.requests.as_ref().unwrap()["cpu"].0, "200m");
        assert_eq!(resources.requests.as_ref().unwrap()["memory"].0, "512Mi");
        assert_eq!(resources.limits.as_ref().unwrap()["memory"].0, "1024Mi");
    }
}
