//! The cluster's processes: how each is started, and how it is found again to be ended.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::process::Signal;

use super::{API_PORT, NODE, POD_BRIDGE, PODS, SERVICES, registry};
use crate::{processes, wait::eventually};

/// For a part to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// A process of the cluster.
pub(super) struct Part {
    /// Its name, of its log and of its pid file.
    pub(super) name: &'static str,
    /// Its arguments, for the cluster's directory.
    pub(super) arguments: fn(&str) -> Vec<String>,
}

/// What the API server and its clients need.
pub(super) const CONTROL_PLANE: &[Part] = &[
    Part { name: "etcd", arguments: etcd },
    Part { name: "apiserver", arguments: apiserver },
    Part { name: "containerd", arguments: containerd },
];

/// What runs pods.
pub(super) const WORKERS: &[Part] = &[
    Part { name: "controller-manager", arguments: controller_manager },
    Part { name: "scheduler", arguments: scheduler },
    Part { name: "kubelet", arguments: kubelet },
];

/// What needs a node that is known.
pub(super) const NETWORK: &[Part] =
    &[Part { name: "proxy", arguments: proxy }, Part { name: "policies", arguments: policies }];

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn etcd(directory: &str) -> Vec<String> {
    words(&format!(
        "--data-dir {directory}/etcd --unsafe-no-fsync --log-level warn \
         --listen-client-urls http://127.0.0.1:12379 --advertise-client-urls http://127.0.0.1:12379 \
         --listen-peer-urls http://127.0.0.1:12380 --initial-advertise-peer-urls http://127.0.0.1:12380 \
         --initial-cluster default=http://127.0.0.1:12380"
    ))
}

fn apiserver(directory: &str) -> Vec<String> {
    words(&format!(
        "--etcd-servers http://127.0.0.1:12379 --secure-port {API_PORT} --advertise-address {NODE} \
         --tls-cert-file {directory}/pki/apiserver.crt --tls-private-key-file {directory}/pki/apiserver.key \
         --client-ca-file {directory}/pki/ca.crt --kubelet-certificate-authority {directory}/pki/ca.crt \
         --kubelet-client-certificate {directory}/pki/kubelet-client.crt \
         --kubelet-client-key {directory}/pki/kubelet-client.key --kubelet-preferred-address-types InternalIP \
         --service-account-issuer https://kubernetes.default.svc \
         --service-account-key-file {directory}/pki/accounts.pub \
         --service-account-signing-key-file {directory}/pki/accounts.key \
         --service-cluster-ip-range {SERVICES} --authorization-mode Node,RBAC \
         --enable-admission-plugins NodeRestriction"
    ))
}

fn controller_manager(directory: &str) -> Vec<String> {
    words(&format!(
        "--kubeconfig {directory}/controller-manager.kubeconfig --root-ca-file {directory}/pki/ca.crt \
         --service-account-private-key-file {directory}/pki/accounts.key --use-service-account-credentials \
         --leader-elect=false --bind-address 127.0.0.1 \
         --allocate-node-cidrs --cluster-cidr {PODS}"
    ))
}

fn scheduler(directory: &str) -> Vec<String> {
    words(&format!("--kubeconfig {directory}/scheduler.kubeconfig --leader-elect=false --bind-address 127.0.0.1"))
}

fn kubelet(directory: &str) -> Vec<String> {
    words(&format!(
        "--kubeconfig {directory}/kubelet.kubeconfig --config {directory}/kubelet.yaml --root-dir {directory}/kubelet \
         --hostname-override node0 --node-ip {NODE}"
    ))
}

/// Services: the API server and `loom-server` have one.
fn proxy(directory: &str) -> Vec<String> {
    words(&format!(
        "--kubeconfig {directory}/proxy.kubeconfig --proxy-mode iptables --hostname-override node0 \
         --cluster-cidr {PODS} --conntrack-max-per-core 0 --conntrack-tcp-timeout-established 0 \
         --conntrack-tcp-timeout-close-wait 0 --healthz-bind-address 127.0.0.1 --metrics-bind-address 127.0.0.1"
    ))
}

/// NetworkPolicy: kube-router as a firewall alone.
fn policies(directory: &str) -> Vec<String> {
    words(&format!(
        "--kubeconfig {directory}/admin.kubeconfig --hostname-override node0 --run-firewall=true --run-router=false \
         --run-service-proxy=false --enable-cni=false --service-cluster-ip-range {SERVICES} --health-port 0 \
         --iptables-sync-period 10s"
    ))
}

fn containerd(directory: &str) -> Vec<String> {
    words(&format!("--config {directory}/containerd.toml"))
}

/// The container runtime's settings.
pub(super) fn containerd_settings(directory: &str) -> String {
    // Without the score of the out-of-memory killer: setting one needs a capability that containers lack.
    format!(
        r#"version = 2
root = "{directory}/containerd"
state = "{directory}/run/containerd"
[grpc]
  address = "{directory}/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{directory}/hosts"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
        pause = registry::image("pause"),
    )
}

/// The kubelet's settings.
pub(super) fn kubelet_settings(directory: &str) -> String {
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {directory}/pki/ca.crt}}}}
authorization: {{mode: Webhook}}
tlsCertFile: {directory}/pki/node.crt
tlsPrivateKeyFile: {directory}/pki/node.key
containerRuntimeEndpoint: unix://{directory}/run/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: /etc/resolv.conf
clusterDNS: []
maxPods: 250
makeIPTablesUtilChains: false
podLogsDir: {directory}/log/pods
evictionHard: {{memory.available: "100Mi", nodefs.available: "1%", imagefs.available: "1%"}}
imageGCHighThresholdPercent: 100
registryPullQPS: 0
serializeImagePulls: false
"#
    )
}

/// The pods' network.
pub(super) fn cni_settings(directory: &str) -> String {
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "loom", "plugins": [{{
  "type": "bridge", "bridge": "{POD_BRIDGE}", "isGateway": true, "hairpinMode": true,
  "ipam": {{"type": "host-local", "dataDir": "{directory}/run/cni", "ranges": [[{{"subnet": "{PODS}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}
}}]}}
"#
    )
}

/// Starts a process that outlives this one, with its log and its pid file in the cluster's directory.
pub(super) fn spawn(directory: &Path, name: &str, command: &mut Command) -> Result<()> {
    let log = File::options().create(true).append(true).open(directory.join("log").join(format!("{name}.log")))?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir(directory)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let pid = child.id().cast_signed();
    let identity = format!("{pid} {}", start_time(pid).unwrap_or_default());
    Ok(fs::write(directory.join("run").join(format!("{name}.pid")), identity)?)
}

/// Stops a process that [`spawn`] started; ignores that it is gone already.
pub(super) fn stop(run: &Path, name: &str) -> Result<()> {
    let file = run.join(format!("{name}.pid"));
    if let Some(pid) = live(&file) {
        processes::signal(pid, Signal::TERM);
        if eventually(name, STOP_TIMEOUT, || Ok(live(&file).is_none().then_some(()))).is_err() {
            processes::signal(pid, Signal::KILL);
            eventually(&format!("{name} to be gone"), STOP_TIMEOUT, || Ok(live(&file).is_none().then_some(())))?;
        }
    }
    match fs::remove_file(&file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// All processes that were started, running or not.
pub(super) fn started(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".pid")?.to_owned()))
        .collect();
    names.sort();
    names
}

/// The running processes.
pub(super) fn running(run: &Path) -> Vec<String> {
    started(run).into_iter().filter(|name| live(&run.join(format!("{name}.pid"))).is_some()).collect()
}

/// The process of a pid file, if it is still the same one.
fn live(file: &Path) -> Option<i32> {
    let identity = fs::read_to_string(file).ok()?;
    let (pid, started) = identity.split_once(' ')?;
    let pid = pid.parse().ok()?;
    (start_time(pid)? == started).then_some(pid)
}

/// When a process started, in clock ticks since boot; nothing when it has ended (proc(5), fields 3 and 22 of `stat`).
fn start_time(pid: i32) -> Option<String> {
    let mut fields = processes::stat(pid)?.into_iter();
    let state = fields.next()?;
    (state != "Z").then(|| fields.nth(18))?
}
