//! What a pod's status means, in words that its user can act on.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Event, Pod, PodStatus};
use loom_api::WeaverId;

use super::{pod, pull};
use crate::provision::{PodInfo, PodObservation, PodPhase};

/// How much of a message of Kubernetes or a container runtime is shown, in characters.
const MAX_MESSAGE: usize = 400;

/// What is seen of a weaver's pod; nothing when it is not one.
pub(super) fn of(pod: &Pod) -> Option<PodObservation> {
    let weaver = pod::weaver(pod)?;
    let empty = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&empty);
    let (phase, mut reason, exit_code) = judge(status);
    let is_leaving = pod.metadata.deletion_timestamp.is_some();
    if is_leaving && !phase.is_final() {
        // What it waited for does not matter any more.
        reason = disruption(status);
    }
    Some(PodObservation { weaver, phase, reason, exit_code, is_leaving })
}

/// Where a pod runs, and what.
pub(super) fn info(pod: &Pod) -> PodInfo {
    let empty = PodStatus::default();
    let status = pod.status.as_ref().unwrap_or(&empty);
    let user = container(status.container_statuses.as_deref(), pod::WEAVER);
    let image_digest = user.and_then(|user| user.image_id.split_once('@')).map(|(_, digest)| digest.to_owned());
    PodInfo {
        // The API server sets it when it takes a pod.
        phase: status.phase.clone(),
        ip: status.pod_ip.clone(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        image_digest,
    }
}

/// What an event tells of a weaver's pod that its state does not.
pub(super) fn progress(event: &Event) -> Option<(WeaverId, String)> {
    let weaver = pod::named(event.involved_object.name.as_deref()?)?;
    let message = event.message.as_deref().unwrap_or_default();
    let is_sandbox_image = message.contains("sandbox image") || message.contains("pull image");
    let of_user = event.involved_object.field_path.as_deref() == Some("spec.containers{weaver}");
    let words = match event.reason.as_deref()? {
        "Pulling" if of_user => "its node pulls the image".to_owned(),
        "Pulled" if of_user => match pull_time(message) {
            Some(time) => format!("its node pulled the image in {time}"),
            None => "its node has the image".to_owned(),
        },
        "FailedCreatePodSandBox" if is_sandbox_image => {
            format!(
                "its node cannot prepare it yet: its own image for pods cannot be pulled: {}",
                pull::failure(message).cause
            )
        }
        "FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox" => {
            format!("its node cannot prepare it yet: {}", bounded(message))
        }
        _ => return None,
    };
    Some((weaver, words))
}

/// The time in the kubelet's words: `Successfully pulled image "…" in 9.4s (9.4s including waiting). …`.
fn pull_time(message: &str) -> Option<&str> {
    let (_, rest) = message.strip_prefix("Successfully pulled image")?.rsplit_once(" in ")?;
    rest.split(' ').next()
}

fn judge(status: &PodStatus) -> (PodPhase, Option<String>, Option<i32>) {
    let user = container(status.container_statuses.as_deref(), pod::WEAVER);
    let agent = container(status.init_container_statuses.as_deref(), pod::AGENT);
    // The pod's own end comes before its containers': evicted, past its deadline, its node shut down.
    if status.phase.as_deref() == Some("Failed")
        && let Some(reason) = &status.reason
    {
        let message = status.message.as_deref().unwrap_or_default();
        return (PodPhase::Failed, Some(pod_reason(reason, message)), None);
    }
    if status.phase.as_deref() == Some("Failed")
        && let Some(reason) = disruption(status)
    {
        return (PodPhase::Failed, Some(reason), None);
    }
    if let Some(ended) = user.and_then(|user| user.state.as_ref()?.terminated.as_ref()) {
        return ended_phase(ended);
    }
    for (image, status) in [("the image of Loom's agent", agent), ("the image", user)] {
        let state = status.and_then(|status| status.state.as_ref());
        if let Some((reason, is_final)) = state.and_then(|state| waiting(state, image)) {
            return (if is_final { PodPhase::Failed } else { PodPhase::Pending }, Some(reason), None);
        }
    }
    match status.phase.as_deref() {
        Some("Running") if user.is_some_and(is_running) => (PodPhase::Running, None, None),
        Some("Succeeded") => (PodPhase::Succeeded, None, Some(0)),
        Some("Failed") => (PodPhase::Failed, Some("its pod failed".to_owned()), None),
        _ => (PodPhase::Pending, unscheduled(status), None),
    }
}

fn container<'a>(statuses: Option<&'a [ContainerStatus]>, name: &str) -> Option<&'a ContainerStatus> {
    statuses?.iter().find(|status| status.name == name)
}

fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

fn ended_phase(ended: &ContainerStateTerminated) -> (PodPhase, Option<String>, Option<i32>) {
    match (ended.reason.as_deref(), ended.exit_code) {
        (Some("OOMKilled"), _) => {
            (PodPhase::Failed, Some("it ran out of memory: its limit was reached".to_owned()), None)
        }
        (Some("StartError" | "ContainerCannotRun"), _) => {
            let message = ended.message.as_deref().map_or("no reason was given", bounded);
            (PodPhase::Failed, Some(format!("its container cannot be started: {message}")), None)
        }
        (_, 0) => (PodPhase::Succeeded, None, Some(0)),
        (_, code) => (PodPhase::Failed, None, Some(code)),
    }
}

/// As much of a message as is shown.
fn bounded(message: &str) -> &str {
    message.char_indices().nth(MAX_MESSAGE).map_or(message, |(end, _)| &message[..end])
}

/// Why a container waits, and whether it waits in vain. `image` is what its image is called.
fn waiting(state: &ContainerState, image: &str) -> Option<(String, bool)> {
    let waiting = state.waiting.as_ref()?;
    let message = waiting.message.as_deref().unwrap_or_default();
    match waiting.reason.as_deref()? {
        reason @ ("ErrImagePull" | "ImagePullBackOff" | "RegistryUnavailable") => {
            // Between two tries the kubelet repeats what the last one said behind the image's name. Kubelets before
            // Kubernetes 1.32 do not, and what was known before is still so.
            let message = if reason == "ImagePullBackOff" { message.split_once("\": ")?.1 } else { message };
            let pull::Failure { cause, is_final } = pull::failure(message);
            Some((format!("{image} cannot be pulled: {cause}"), is_final))
        }
        "InvalidImageName" => Some((format!("{image} has a name that is not the name of an image"), true)),
        "CreateContainerConfigError" => Some((format!("its container cannot be made: {}", bounded(message)), true)),
        reason @ ("CreateContainerError" | "RunContainerError" | "CrashLoopBackOff") => {
            Some((format!("its container does not start ({reason}): {}", bounded(message)), false))
        }
        // On its way: creating, or waiting for the container before it.
        _ => None,
    }
}

/// Why no node has taken the pod.
fn unscheduled(status: &PodStatus) -> Option<String> {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let scheduled = conditions.iter().find(|condition| condition.type_ == "PodScheduled")?;
    let message = scheduled.message.as_deref().filter(|_| scheduled.status == "False")?;
    Some(format!("no node takes it: {}", bounded(message)))
}

fn pod_reason(reason: &str, message: &str) -> String {
    let message = bounded(message);
    match reason {
        "Evicted" => format!("its node evicted it: {message}"),
        "DeadlineExceeded" => "its pod reached the longest life a weaver can have".to_owned(),
        _ => format!("its pod failed ({reason}): {message}"),
    }
}

/// Why Kubernetes itself ends a pod, from the condition that it sets before (`DisruptionTarget`).
fn disruption(status: &PodStatus) -> Option<String> {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let target =
        conditions.iter().find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")?;
    let message = bounded(target.message.as_deref().unwrap_or_default());
    Some(match target.reason.as_deref().unwrap_or_default() {
        "DeletionByPodGC" => format!("its node is gone: {message}"),
        "DeletionByTaintManager" => format!("its node is not to be used any more, or does not answer: {message}"),
        "EvictionByEvictionAPI" => format!("it was evicted, as when a node is drained: {message}"),
        "PreemptionByScheduler" => format!("a pod of higher priority has taken its place: {message}"),
        reason => format!("Kubernetes ends its pod ({reason}): {message}"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(status: serde_json::Value) -> (PodPhase, Option<String>, Option<i32>) {
        judge(&serde_json::from_value(status).unwrap())
    }

    #[test]
    fn a_pod_without_a_status_waits() {
        assert_eq!(judged(json!({})), (PodPhase::Pending, None, None));
    }

    #[test]
    fn what_is_missing_on_the_nodes_is_said() {
        let (phase, reason, _) = judged(json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available: 1 Insufficient cpu."}
        ]}));
        assert_eq!(phase, PodPhase::Pending);
        assert!(reason.unwrap().contains("Insufficient cpu"));
    }

    #[test]
    fn an_image_that_is_not_there_is_final_and_a_slow_registry_is_not() {
        let waiting = |reason: &str, message: &str| {
            judged(json!({"phase": "Pending", "containerStatuses": [{
                "name": "weaver", "ready": false, "restartCount": 0, "image": "", "imageID": "",
                "state": {"waiting": {"reason": reason, "message": message}}
            }]}))
        };
        let pulling = |message: &str| waiting("ErrImagePull", message);
        assert_eq!(pulling("failed to resolve reference: example.org/a: not found").0, PodPhase::Failed);
        assert_eq!(pulling("dial tcp: lookup example.invalid: no such host").0, PodPhase::Failed);
        let slow = pulling("dial tcp: i/o timeout");
        assert_eq!(slow.0, PodPhase::Pending);
        assert!(slow.1.as_ref().is_some_and(|reason| !reason.contains("dial")), "{slow:?}");
        assert_eq!(
            waiting("ImagePullBackOff", "Back-off pulling image \"a\": ErrImagePull: dial tcp: i/o timeout"),
            slow
        );
        assert_eq!(waiting("ImagePullBackOff", "Back-off pulling image \"a\""), (PodPhase::Pending, None, None));
    }

    #[test]
    fn the_agents_image_is_told_from_the_users_and_long_messages_are_cut() {
        let (_, reason, _) = judged(json!({"phase": "Pending", "initContainerStatuses": [{
            "name": "agent", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": {"waiting": {"reason": "ErrImagePull", "message": "a: not found"}}
        }]}));
        assert_eq!(reason.unwrap(), "the image of Loom's agent cannot be pulled: there is no such image");
        let (_, reason, _) = judged(json!({"phase": "Pending", "containerStatuses": [{
            "name": "weaver", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": {"waiting": {"reason": "RunContainerError", "message": "ä".repeat(10_000)}}
        }]}));
        assert!(reason.unwrap().chars().count() < 500);
    }

    #[test]
    fn ends_have_their_code_or_their_reason() {
        let ended = |reason: &str, code: i32| {
            judged(json!({"phase": "Running", "containerStatuses": [{
                "name": "weaver", "ready": false, "restartCount": 0, "image": "", "imageID": "",
                "state": {"terminated": {"reason": reason, "exitCode": code}}
            }]}))
        };
        assert_eq!(ended("Completed", 0), (PodPhase::Succeeded, None, Some(0)));
        assert_eq!(ended("Error", 7), (PodPhase::Failed, None, Some(7)));
        let (phase, reason, code) = ended("OOMKilled", 137);
        assert_eq!((phase, code), (PodPhase::Failed, None));
        assert!(reason.unwrap().contains("memory"));
        let (_, reason, _) = judged(json!({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}));
        assert!(reason.unwrap().contains("low on disk"));
    }

    #[test]
    fn who_ends_a_pod_is_said_and_no_longer_what_it_waited_for() {
        let conditions = json!([
            {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"},
            {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC", "message": "PodGC: node no longer exists"},
        ]);
        let (phase, reason, _) = judged(json!({"phase": "Failed", "conditions": conditions}));
        assert_eq!(phase, PodPhase::Failed);
        assert_eq!(reason.unwrap(), "its node is gone: PodGC: node no longer exists");
        let leaving = json!({
            "metadata": {
                "name": "weaver-01890000-0000-7000-8000-000000000000", "deletionTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"weaver-id": "01890000-0000-7000-8000-000000000000"},
            },
            "status": {"phase": "Pending", "conditions": conditions},
        });
        let seen = of(&serde_json::from_value(leaving).unwrap()).unwrap();
        assert!(seen.is_leaving && seen.reason.unwrap().contains("its node is gone"));
    }

    #[test]
    fn where_a_pod_runs_is_known_as_soon_as_kubernetes_knows() {
        let at = |spec: serde_json::Value, status: serde_json::Value| {
            info(&serde_json::from_value(json!({"metadata": {}, "spec": spec, "status": status})).unwrap())
        };
        let pending = at(json!({"containers": []}), json!({"phase": "Pending"}));
        assert_eq!(pending, PodInfo { phase: Some("Pending".to_owned()), ..PodInfo::default() });
        let digest = format!("sha256:{}", "a".repeat(64));
        let running = at(
            json!({"containers": [], "nodeName": "node-1"}),
            json!({"phase": "Running", "podIP": "10.1.2.3", "containerStatuses": [{
                "name": "weaver", "ready": true, "restartCount": 0, "image": "a", "imageID": format!("r.example/a@{digest}"),
            }]}),
        );
        let [phase, ip, node, image_digest] =
            ["Running", "10.1.2.3", "node-1", &digest].map(|text| Some(text.to_owned()));
        assert_eq!(running, PodInfo { phase, ip, node, image_digest });
    }

    #[test]
    fn pulling_is_told_with_its_time_and_other_pods_are_nobodys() {
        let event = |name: &str, reason: &str, message: &str| {
            let event = json!({
                "metadata": {}, "reason": reason, "message": message,
                "involvedObject": {"kind": "Pod", "name": name, "fieldPath": "spec.containers{weaver}"},
            });
            progress(&serde_json::from_value(event).unwrap()).map(|(_, words)| words)
        };
        let name = "weaver-01890000-0000-7000-8000-000000000000";
        let pulled = "Successfully pulled image \"a in b\" in 9.4s (9.5s including waiting). Image size: 7 bytes.";
        assert_eq!(event(name, "Pulled", pulled).unwrap(), "its node pulled the image in 9.4s");
        assert_eq!(event(name, "Pulled", "Container image already present").unwrap(), "its node has the image");
        assert!(event(name, "FailedMount", "no disk").unwrap().contains("no disk"));
        let sandbox = "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to get sandbox image \
            \"r.example/pause:3.10\": failed to pull image: 403 Forbidden - Server message: denied: call 555";
        let words = event(name, "FailedCreatePodSandBox", sandbox).unwrap();
        assert!(words.contains("credentials") && !words.contains("555"), "{words}");
        assert_eq!(event(name, "Created", ""), None);
        assert_eq!(event("postgres-0", "Pulling", ""), None);
    }
}
