//! Loom on a real cluster: how long people wait beside a bare pod, many weavers at once, and what a thousand cost the
//! server.

use std::{
    io::{BufRead as _, BufReader},
    process::{ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, api::metrics, cluster::registry, eventually, namespace::Namespace, processes, system::TIMEOUT,
    system::free_port, system::output_with_input, tools,
};
use serde_json::{Value, json};

use crate::product::{Running, mebibytes, memory, new_until_prompt, print_times, processor_seconds};

/// How often each start is timed.
const ITERATIONS: usize = 10;
/// Real weavers made at once.
const AT_ONCE: usize = 200;
/// Weavers whose pods are KWOK's.
const MANY: usize = 1000;
/// How long the server is watched at rest.
const IDLE_PERIOD: Duration = Duration::from_secs(60);
/// For what takes minutes.
const LONG: Duration = Duration::from_secs(900);

/// Runs every group whose name contains `filter`.
pub(crate) fn measure(filter: &str) -> Result<()> {
    let wanted = |name: &str| name.contains(filter);
    if wanted("kubernetes-starts") {
        starts()?;
    }
    if wanted("kubernetes-at-once") {
        many_at_once()?;
    }
    if wanted("kubernetes-thousand") {
        a_thousand()?;
    }
    Ok(())
}

fn starts() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let namespace = system.namespace().context("a namespace")?;
    // Both images are on the node from here on.
    let first = system.new_weaver(&[])?;
    system.run(&["delete", "--yes", &first.id])?;

    let mut api = Api::open(namespace)?;
    let bare =
        (0..ITERATIONS).map(|number| api.start_bare_pod(&format!("bare-{number}"))).collect::<Result<Vec<_>>>()?;
    let mut weavers = Vec::new();
    let mut stages = Vec::new();
    for number in 0..ITERATIONS {
        let name = format!("timed-{number}");
        let (terminal, elapsed) = new_until_prompt(&system, &name)?;
        weavers.push(elapsed);
        drop(terminal);
        stages.push(system.json(&["events", &name, "--json"])?);
        system.run(&["delete", "--yes", &name])?;
    }
    print_times("bare pod, same image: create to Running", bare);
    print_times("loom new until its prompt is there", weavers);
    for (from, to, what) in [
        ("created", "started", "  of it: image looked up, pod made"),
        ("started", "agent_connected", "  of it: scheduled, sidecar runs and registers"),
        ("agent_connected", "ready", "  of it: the user's container and program run"),
    ] {
        print_times(what, stages.iter().map(|events| between(events, from, to)).collect::<Result<_>>()?);
    }
    system.stop()
}

/// The time between two kinds of a weaver's events.
fn between(events: &Value, from: &str, to: &str) -> Result<Duration> {
    let at = |kind: &str| -> Result<f64> {
        let event = events.as_array().into_iter().flatten().find(|event| event["kind"] == kind);
        let time = event.and_then(|event| event["at"].as_str()).with_context(|| format!("no event {kind}"))?;
        let output = Command::new("date").args(["-d", time, "+%s.%N"]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    Ok(Duration::from_secs_f64((at(to)? - at(from)?).max(0.0)))
}

/// The cluster's API, by `kubectl proxy`: a start of kubectl for each request would be measured too.
struct Api {
    _proxy: Running,
    _watch: Running,
    lines: BufReader<ChildStdout>,
    pods: String,
}

impl Api {
    fn open(namespace: &Namespace) -> Result<Self> {
        let port = free_port()?;
        let kubectl = || -> Result<Command> {
            let mut command = Command::new(tools::find("kube")?);
            command.arg("kubectl").arg("--kubeconfig").arg(namespace.kubeconfig()).stdin(Stdio::null());
            Ok(command)
        };
        let proxy = kubectl()?.args(["proxy", &format!("--port={port}")]).stdout(Stdio::null()).spawn()?;
        let mut watch = kubectl()?
            .args(["get", "pods", "--watch", "--namespace", namespace.name()])
            .args(["--output", "jsonpath={.metadata.name} {.status.phase}{\"\\n\"}"])
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(watch.stdout.take().context("standard output was piped")?);
        let pods = format!("http://127.0.0.1:{port}/api/v1/namespaces/{}/pods", namespace.name());
        let api = Self { _proxy: Running(proxy), _watch: Running(watch), lines, pods };
        eventually("kubectl proxy", TIMEOUT, || Ok(api.request("GET", "", "").is_ok().then_some(())))?;
        Ok(api)
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Result<()> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail", "--noproxy", "*", "--request", method, "--output", "/dev/null"]);
        curl.args(["--header", "Content-Type: application/json", "--data", "@-", &format!("{}{path}", self.pods)]);
        let output = output_with_input(curl, body.as_bytes())?;
        ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn make_bare_pod(&self, name: &str) -> Result<()> {
        let security = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": "bare"}},
            "spec": {
                "restartPolicy": "Never", "automountServiceAccountToken": false, "enableServiceLinks": false,
                "terminationGracePeriodSeconds": 0,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{
                    "name": "weaver", "image": registry::image("weaver"), "command": ["sleep", "1000"],
                    "securityContext": security,
                }],
            },
        });
        self.request("POST", "", &pod.to_string())
    }

    fn start_bare_pod(&mut self, name: &str) -> Result<Duration> {
        let start = Instant::now();
        self.make_bare_pod(name)?;
        let wanted = format!("{name} Running");
        loop {
            let mut line = String::new();
            ensure!(self.lines.read_line(&mut line)? > 0, "the watch on pods ended");
            if line.trim() == wanted {
                break;
            }
        }
        let elapsed = start.elapsed();
        self.request("DELETE", &format!("/{name}?gracePeriodSeconds=0"), "")?;
        Ok(elapsed)
    }
}

/// How many pods of a namespace run.
fn count_running(namespace: &Namespace, selector: &str) -> Result<usize> {
    let phases =
        namespace.kubectl(&["get", "pods", "--selector", selector, "--output", "jsonpath={.items[*].status.phase}"])?;
    Ok(phases.split(' ').filter(|phase| *phase == "Running").count())
}

/// Has the API make weavers, one request after another, without waiting for any.
fn create(system: &System, count: usize) -> Result<()> {
    (0..count).try_for_each(|_| system.create_weaver(&json!({"command": ["sleep", "100000"]})).map(drop))
}

fn count(system: &System, status: &str) -> Result<usize> {
    let list = system.json(&["ps", "--json"])?;
    Ok(list.as_array().into_iter().flatten().filter(|weaver| weaver["status"] == status).count())
}

fn delete_all(system: &System) -> Result<()> {
    for weaver in system.json(&["ps", "--json"])?.as_array().into_iter().flatten() {
        let path = format!("/api/weavers/{}", weaver["id"].as_str().unwrap_or_default());
        system.request(Some(&system.admin_token()?), "DELETE", &path, None)?;
    }
    eventually("the pods to be gone", LONG, || Ok((system.count_pods()? == 0).then_some(())))
}

fn many_at_once() -> Result<()> {
    let system = System::start_on_kubernetes(&[
        ("LOOM_SERVER_MAX_WEAVERS", "1000"),
        ("LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", "1"),
        ("LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", "1"),
    ])?;
    let namespace = system.namespace().context("a namespace")?;
    let api = Api::open(namespace)?;
    let start = Instant::now();
    (0..AT_ONCE).try_for_each(|number| api.make_bare_pod(&format!("bare-{number}")))?;
    eventually("the bare pods", LONG, || Ok((count_running(namespace, "app=bare")? == AT_ONCE).then_some(())))?;
    println!("{AT_ONCE} bare pods made at once, all of them run after: {:.1} s", start.elapsed().as_secs_f64());
    namespace.kubectl(&["delete", "pods", "--selector", "app=bare"])?;
    drop(api);
    let start = Instant::now();
    create(&system, AT_ONCE)?;
    println!("{AT_ONCE} weavers asked for, one request after another: {:.1} s", start.elapsed().as_secs_f64());
    eventually("all to run", LONG, || Ok((count(&system, "Running")? == AT_ONCE).then_some(())))?;
    println!("{AT_ONCE} weavers made at once, all of them run after: {:.1} s", start.elapsed().as_secs_f64());
    let server = system.server_pid().context("the server runs")?;
    println!("server memory with {AT_ONCE} weavers, all connected: {}", mebibytes(memory(server)?.resident));
    let [sidecars, hosts, server] =
        at_rest(|| Ok([agents_seconds("sidecar")?, agents_seconds("host")?, processor_seconds(server)?]))?;
    println!(
        "at rest, processor time a minute: all sidecars {sidecars:.2} s, all hosts {hosts:.2} s, the server {server:.2} s"
    );
    let start = Instant::now();
    delete_all(&system)?;
    println!("all of them gone after: {:.1} s", start.elapsed().as_secs_f64());
    system.stop()
}

fn a_thousand() -> Result<()> {
    let metrics = format!("127.0.0.1:{}", free_port()?);
    let system = System::start_on_kubernetes(&[
        ("LOOM_SERVER_MAX_WEAVERS", "2000"),
        ("LOOM_SERVER_METRICS_LISTEN", &metrics),
        ("LOOM_SERVER_KUBERNETES_NODE_SELECTOR", "type=kwok"),
        ("LOOM_SERVER_KUBERNETES_TOLERATIONS", "kwok.x-k8s.io/node:NoSchedule"),
        ("LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", "1"),
        ("LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", "1"),
    ])?;
    let namespace = system.namespace().context("a namespace")?;
    let _kwok = start_kwok(namespace)?;
    let start = Instant::now();
    create(&system, MANY)?;
    eventually("the pods to be there", LONG, || {
        Ok((count_running(namespace, "app=loom-weaver")? == MANY).then_some(()))
    })?;
    println!("{MANY} pods of KWOK's, all of them run after: {:.1} s", start.elapsed().as_secs_f64());
    let server = system.server_pid().context("the server runs")?;
    println!("server memory with {MANY} pods: {}", mebibytes(memory(server)?.resident));
    let [requests, seconds] = at_rest(|| Ok([requests(&metrics)?, processor_seconds(server)?]))?;
    println!(
        "server at rest with {MANY} pods: {requests} requests to the API server and {seconds:.2} s of processor time a minute"
    );
    delete_all(&system)?;
    system.stop()
}

/// Requests to the Kubernetes API server until now.
fn requests(address: &str) -> Result<f64> {
    let text = metrics(address)?;
    let line = text.lines().find_map(|line| line.strip_prefix("loom_kubernetes_requests_total "));
    Ok(line.context("no count of requests")?.trim().parse()?)
}

/// The processor time of all agents of one role on this machine.
fn agents_seconds(role: &str) -> Result<f64> {
    let agents = processes::all().into_iter().filter(|process| process.has("loom-agent") && process.has(role));
    agents.map(|agent| processor_seconds(agent.pid)).sum()
}

/// What happens while nothing is asked for: by how much each figure grows in [`IDLE_PERIOD`].
fn at_rest<const N: usize>(figures: impl Fn() -> Result<[f64; N]>) -> Result<[f64; N]> {
    let before = figures()?;
    // What is measured is that nothing happens for a while.
    std::thread::sleep(IDLE_PERIOD);
    let after = figures()?;
    Ok(std::array::from_fn(|index| after[index] - before[index]))
}

/// Starts KWOK with one node of its own.
fn start_kwok(namespace: &Namespace) -> Result<Running> {
    namespace.apply_anywhere(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: kwok-0\n  labels: {type: kwok}\n  annotations: {kwok.x-k8s.io/node: fake}\n\
             spec: {taints: [{key: kwok.x-k8s.io/node, value: fake, effect: NoSchedule}]}\n",
        )?;
    let child = Command::new(tools::find("kwok")?)
        .arg("--kubeconfig")
        .arg(namespace.kubeconfig())
        .args(["--config", concat!(env!("CARGO_MANIFEST_DIR"), "/cluster/kwok/stages.yaml")])
        .args(["--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--cidr=10.87.0.0/16"])
        .args(["--node-ip=10.86.0.1", "--manage-all-nodes=false", "--node-lease-duration-seconds=40"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting kwok")?;
    Ok(Running(child))
}
