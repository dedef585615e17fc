//! The server as an operator runs it: inside the cluster, from the chart in `deploy/`, with no more rights than that
//! grants, and with the network policy enforced.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver, api, cluster, cluster::registry, eventually, namespace::Namespace, system::TIMEOUT, tools,
};

/// The server's fixed address among the cluster's services: there is no DNS in the test cluster.
const ADDRESS: &str = "10.96.0.77";

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/helm/loom")
}

fn helm(arguments: &[&str]) -> Result<String> {
    let output = Command::new(tools::find("helm")?).args(arguments).output()?;
    ensure!(output.status.success(), "helm {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn the_chart_is_sound_and_the_manifests_are_made_from_it() -> Result<()> {
    let chart = chart().to_string_lossy().into_owned();
    helm(&["lint", "--strict", &chart])?;
    let rendered = helm(&["template", "loom", &chart, "--namespace", "loom-system"])?;
    let manifests = fs::read_to_string(Path::new(&chart).join("../../manifests.yaml"))?;
    assert!(
        rendered == manifests,
        "deploy/manifests.yaml is behind the chart: target/tools/helm template loom deploy/helm/loom --namespace \
         loom-system > deploy/manifests.yaml"
    );
    Ok(())
}

/// The server in the cluster, and a user of it who is logged in.
struct Deployed {
    system: System,
    home: Namespace,
    weavers: Namespace,
}

impl Deployed {
    fn start() -> Result<Self> {
        let (home, weavers) = (Namespace::create()?, Namespace::create()?);
        let system =
            System::of_another_server(&format!("https://{ADDRESS}"), &format!("IP:{ADDRESS},DNS:loom-server"))?;
        let from = |key: &str, file: &str| format!("--from-file={key}={}", system.path("pki").join(file).display());
        let (certificate, key, authority) =
            (from("tls.crt", "server.crt"), from("tls.key", "server.key"), from("ca.crt", "ca.crt"));
        home.kubectl(&["create", "secret", "generic", "loom-server-tls", &certificate, &key, &authority])?;
        let values = format!(
            "publicUrl: https://{ADDRESS}\n\
             server: {{image: '{}', storage: {{enabled: false}}, service: {{clusterIP: {ADDRESS}}}}}\n\
             agent: {{image: '{}', url: 'https://{ADDRESS}'}}\n\
             weavers: {{namespace: {}, createNamespace: false, image: '{}', requestCpuMillicores: 20, \
             requestMemoryMb: 64, plainHttpRegistries: ['{}']}}\n",
            registry::image("server"),
            registry::image("agent"),
            weavers.name(),
            registry::image("weaver"),
            registry::OPEN,
        );
        let file = system.path("values.yaml").to_string_lossy().into_owned();
        fs::write(&file, values)?;
        let chart = chart().to_string_lossy().into_owned();
        let manifests = helm(&["template", "loom", &chart, "--namespace", home.name(), "--values", &file])?;
        // Some of it belongs to the weavers' namespace, which each object names.
        home.apply_anywhere(&manifests)?;
        home.kubectl(&["rollout", "status", "deployment/loom-server", "--timeout=60s"])?;
        eventually("the service to lead to the server", TIMEOUT, || {
            Ok(TcpStream::connect((ADDRESS, 443)).is_ok().then_some(()))
        })?;
        let deployed = Self { system, home, weavers };
        deployed.log_in()?;
        Ok(deployed)
    }

    fn in_server(&self, arguments: &[&str]) -> Result<String> {
        self.home.kubectl(&[&["exec", "deployment/loom-server", "--", "loom-server"], arguments].concat())
    }

    fn log_in(&self) -> Result<()> {
        let token = self.in_server(&["user", "add", "alice"])?;
        let output = self.system.output_with_input(&["login", "--token", "-"], token.trim().as_bytes())?;
        ensure!(output.status.success(), "login: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn pod_address(&self, weaver: &Weaver) -> Result<String> {
        let pod = self.weavers.pod(weaver)?.context("the weaver's pod")?;
        Ok(pod["status"]["podIP"].as_str().context("an address")?.to_owned())
    }

    /// Whether a program in the weaver can connect somewhere.
    fn reaches(&self, weaver: &Weaver, address: &str, port: u16) -> Result<bool> {
        let script = format!("import socket; socket.create_connection(('{address}', {port}), 2)");
        Ok(self.system.output(&["exec", &weaver.id, "--", "python3", "-c", &script])?.status.success())
    }
}

#[test]
fn the_server_runs_in_the_cluster_and_weavers_reach_only_what_they_should() -> Result<()> {
    let deployed = Deployed::start()?;
    let system = &deployed.system;
    let checked = deployed.in_server(&["check"])?;
    assert!(!checked.contains("MISSING"), "{checked}");

    let (weaver, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");

    // A listener on every address of a weaver, which its own user reaches and another weaver does not.
    let serve = "nohup python3 -m http.server 8123 >/dev/null 2>&1 & sleep 0.1";
    system.run(&["ssh", &other.id, "--", serve])?;
    let address = deployed.pod_address(&other)?;
    eventually("the listener", TIMEOUT, || Ok(deployed.reaches(&other, "127.0.0.1", 8123)?.then_some(())))?;
    ensure!(!deployed.reaches(&weaver, &address, 8123)?, "a weaver reaches another");
    for (address, port, what) in [
        ("10.96.0.1", 443, "the cluster's API server"),
        (cluster::NODE, 10250, "the node's kubelet"),
        (cluster::NODE, 16443, "the API server at the node"),
        ("169.254.169.254", 80, "the metadata address"),
    ] {
        ensure!(!deployed.reaches(&weaver, address, port)?, "a weaver reaches {what}");
    }
    let outside = TcpListener::bind((cluster::OUTSIDE, 0))?;
    ensure!(deployed.reaches(&weaver, cluster::OUTSIDE, outside.local_addr()?.port())?, "no way to the outside");
    // Without the policy the same program gets through, so it was the policy that kept it back.
    deployed.weavers.kubectl(&["delete", "networkpolicy", "--all"])?;
    eventually("the policy to be gone", TIMEOUT, || Ok(deployed.reaches(&weaver, &address, 8123)?.then_some(())))?;

    let metrics = deployed.metrics()?;
    for name in ["loom_weavers{status=\"Running\"} 2", "loom_weavers_start_seconds", "loom_reconcile_lag_seconds"] {
        assert!(metrics.contains(name), "no {name} in {metrics}");
    }
    for weaver in [&weaver, &other] {
        system.run(&["delete", "--yes", &weaver.id])?;
    }
    eventually("the pods to be gone", TIMEOUT, || Ok(deployed.weavers.pods()?.is_empty().then_some(())))?;
    deployed.weavers.kubectl(&["delete", "rolebinding", "loom-server"])?;
    let error = deployed.in_server(&["check"]).err().context("nothing is missing without the role")?;
    assert!(error.to_string().contains("8 things are missing"), "{error}");
    Ok(())
}

impl Deployed {
    fn metrics(&self) -> Result<String> {
        let address = self.home.kubectl(&[
            "get",
            "pods",
            "--selector=app.kubernetes.io/name=loom-server",
            "--output=jsonpath={.items[0].status.podIP}",
        ])?;
        api::metrics(&format!("{address}:9090"))
    }
}
