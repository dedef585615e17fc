//! Weavers as pods of a real cluster: what only Kubernetes can show. What users do is in the other files, which run on
//! both backends.

use std::{
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Write as _},
    net::TcpListener,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver, cluster::registry, eventually, fairness::ensure_fair, keys::KeyPair, namespace::Namespace,
    system::TIMEOUT,
};
use serde_json::{Value, json};

fn namespace(system: &System) -> Result<&Namespace> {
    system.namespace().context("the system runs on Kubernetes")
}

fn pod(system: &System, weaver: &Weaver) -> Result<Value> {
    namespace(system)?.pod(weaver)?.context("the weaver's pod")
}

/// Waits until the weaver's reason contains `words`; the weaver as it is then.
fn reason(system: &System, weaver: &Weaver, words: &str) -> Result<Value> {
    let mut last = Value::Null;
    eventually("the reason", TIMEOUT, || {
        last = system.describe(weaver)?;
        Ok(last["reason"].as_str().is_some_and(|reason| reason.contains(words)).then_some(()))
    })
    .with_context(|| format!("{words:?} is not the reason: {last}"))?;
    Ok(last)
}

#[test]
fn a_pod_is_restricted_pinned_and_holds_no_secret() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let weaver = system.new_weaver(&["-e", "COLOUR=green"])?;
    let pod = pod(&system, &weaver)?;
    let uuid = weaver.id.trim_start_matches("W-");
    assert_eq!(pod["metadata"]["name"], format!("weaver-{uuid}"));
    assert_eq!(pod["metadata"]["labels"]["app"], "loom-weaver");
    let text = pod.to_string();
    assert!(!text.contains("green"), "the environment stands in the pod: {text}");

    let spec = &pod["spec"];
    assert_eq!(spec["restartPolicy"], "Never");
    assert_eq!(spec["enableServiceLinks"], false);
    assert_eq!(spec["automountServiceAccountToken"], false);
    assert!(spec["activeDeadlineSeconds"].as_i64().is_some_and(|seconds| seconds > 48 * 3600));
    let container = &spec["containers"][0];
    assert_eq!(container["name"], "weaver");
    let image = container["image"].as_str().unwrap_or_default();
    assert!(image.contains("@sha256:"), "{image} is not pinned");
    assert_eq!(container["resources"]["limits"], json!({"cpu": "2", "memory": "2Gi", "ephemeral-storage": "60Gi"}));
    let mounts = container["volumeMounts"].to_string();
    assert!(!mounts.contains("loom-token") && !mounts.contains("serviceaccount"), "{mounts}");
    assert_eq!(system.run(&["exec", &weaver.id, "--", "sh", "-c", "echo $COLOUR; id -u"])?, "green\n1000\n");
    let look = "ls /var/run/secrets 2>&1; tr '\\0' '\\n' < /proc/1/environ | grep -i token";
    let output = system.output(&["exec", &weaver.id, "--", "sh", "-c", look])?;
    assert!(!String::from_utf8_lossy(&output.stdout).contains("loom"), "{output:?}");
    system.stop()
}

#[test]
fn an_image_with_an_entrypoint_of_its_own_runs_it() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let weaver = system.new_weaver(&["--image", &registry::image("postgres")])?;
    system.run(&["tunnel", "up", &weaver.id])?;
    let address = system.local_address(&weaver)?;
    let answer = eventually("the database", TIMEOUT, || Ok(system.psql(&address, 5432, "select 6 * 7").ok()))?;
    assert_eq!(answer, "42");
    system.stop()
}

#[test]
fn an_image_behind_a_password_needs_the_pull_secret_and_one_without_a_program_a_command() -> Result<()> {
    let image = registry::private_image("alone");
    let system = System::start_on_kubernetes(&[])?;
    let output = system.output(&["new", "--no-attach", "--image", &image])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("credentials"), "{output:?}");
    // With a command nobody reads the image before the node does, and the node says the same.
    let output = system.output(&["new", "--no-attach", "--image", &image, "--", "/busybox", "sleep", "1000"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be pulled"), "{output:?}");
    system.stop()?;

    let system = System::start_on_kubernetes(&[("LOOM_SERVER_KUBERNETES_PULL_SECRETS", "registry")])?;
    let server = format!("--docker-server={}", registry::PRIVATE);
    let (user, password) =
        (format!("--docker-username={}", registry::USER), format!("--docker-password={}", registry::PASSWORD));
    namespace(&system)?.kubectl(&["create", "secret", "docker-registry", "registry", &server, &user, &password])?;
    let output = system.output(&["new", "--no-attach", "--image", &image])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("names no program"), "{output:?}");
    // No shell, no passwd, nothing but one program: people come in all the same.
    let weaver = system.new_weaver(&["--image", &image, "--", "/busybox", "sleep", "1000"])?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "/busybox", "echo", "in"])?, "in\n");
    system.stop()
}

/// The longest that a server looks for an image, and some for what is around that.
const LOOK_UP: Duration = Duration::from_secs(20 + 5);
/// Plenty for an image that is refused at once, retries included.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A system that may ask these registries of the machine over plain HTTP, beside the cluster's.
fn listing(registries: &[&TcpListener]) -> Result<System> {
    let mut listed = vec![registry::OPEN.to_owned(), registry::PRIVATE.to_owned()];
    for registry in registries {
        listed.push(registry.local_addr()?.to_string());
    }
    System::start_on_kubernetes(&[("LOOM_SERVER_KUBERNETES_PLAIN_HTTP_REGISTRIES", &listed.join(","))])
}

/// What `loom new` says of an image that cannot be had, and how long it takes.
fn refusal(system: &System, registry: &TcpListener) -> Result<(String, Duration)> {
    let image = format!("{}/team/app:1", registry.local_addr()?);
    let start = Instant::now();
    let output = system.output(&["new", "--no-attach", "--image", &image])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    Ok((said, start.elapsed()))
}

#[test]
fn a_registry_that_does_not_answer_is_given_up_after_a_while() -> Result<()> {
    // Connections are made, and nobody takes them.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let system = listing(&[&silent])?;
    let (said, elapsed) = refusal(&system, &silent)?;
    assert!(said.contains("cannot be reached: it does not answer"), "{said}");
    assert!(elapsed < LOOK_UP, "it took {elapsed:?}");
    system.stop()
}

#[test]
fn a_registry_in_the_servers_network_is_not_asked_unless_the_operator_lists_it() -> Result<()> {
    let unlisted = TcpListener::bind("127.0.0.1:0")?;
    unlisted.set_nonblocking(true)?;
    let system = listing(&[])?;
    let (said, elapsed) = refusal(&system, &unlisted)?;
    assert!(said.contains("no public address") && said.contains("kubernetes-private-registries"), "{said}");
    assert!(elapsed < AT_ONCE, "it took {elapsed:?}");
    let asked = unlisted.accept().err().map(|error| error.kind());
    assert_eq!(asked, Some(ErrorKind::WouldBlock), "somebody connected");
    system.stop()
}

#[test]
fn a_registry_that_leads_into_the_servers_network_is_not_followed() -> Result<()> {
    for answer in [
        "307 Temporary Redirect\r\nLocation: https://169.254.169.254/latest/meta-data/",
        "307 Temporary Redirect\r\nLocation: http://169.254.169.254/latest/meta-data/",
        "401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"https://169.254.169.254/token\",service=\"r\"",
    ] {
        let leading = TcpListener::bind("127.0.0.1:0")?;
        let connections = leading.try_clone()?;
        // Ends with the test's process.
        std::thread::spawn(move || {
            for mut stream in connections.incoming().flatten() {
                let Ok(input) = stream.try_clone() else { continue };
                // The request's head, to its empty line.
                let head = BufReader::new(input).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
                head.for_each(drop);
                let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                // Who asked may have gone.
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        let system = listing(&[&leading])?;
        let (said, elapsed) = refusal(&system, &leading)?;
        assert!(said.contains("refers to a server without HTTPS or without a public address"), "{answer}: {said}");
        assert!(!said.contains("169.254") && elapsed < AT_ONCE, "{answer}: {elapsed:?}, {said}");
        system.stop()?;
    }
    Ok(())
}

#[test]
fn a_token_is_good_for_its_own_pod_only_and_not_after_it() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let (weaver, other) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let token_of = |weaver: &Weaver| -> Result<String> {
        let root = format!("/proc/{}/root/var/run/secrets/loom/token", system.sidecar(weaver)?.pid);
        fs::read_to_string(&root).context("the sidecar's token")
    };
    let register = |weaver: &Weaver, token: &str| -> Result<u16> {
        let keys = KeyPair::generate()?;
        let proof = keys.answer(&system.key_challenge()?)?;
        Ok(system.register_agent(weaver, token, "0.1.0", &keys.public(), &proof)?.status)
    };
    let token = token_of(&weaver)?;
    assert_eq!(register(&other, &token)?, 401, "another weaver's token");
    assert_eq!(register(&weaver, "nonsense")?, 401);
    let namespace = namespace(&system)?;
    let made = |arguments: &[&str]| -> Result<String> {
        let all = [&["create", "token", "default"], arguments].concat();
        Ok(namespace.kubectl(&all)?.trim().to_owned())
    };
    let uid = pod(&system, &weaver)?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    let name = format!("weaver-{}", weaver.id.trim_start_matches("W-"));
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", &name, "--bound-object-uid", &uid];
    assert_eq!(register(&weaver, &made(&["--audience", "loom"])?)?, 401, "a token of no pod");
    assert_eq!(register(&weaver, &made(&[&["--audience", "other"], &bound[..]].concat())?)?, 401, "another audience");
    assert_eq!(register(&weaver, &token)?, 200, "and the right one is taken, so the test says something");

    system.run(&["delete", "--yes", &weaver.id])?;
    assert!(register(&weaver, &token)? >= 400, "a deleted weaver's token");
    eventually("the pod to be gone", TIMEOUT, || Ok((!system.has_left_something(&weaver)?).then_some(())))?;
    assert!(register(&weaver, &token)? >= 400, "a token whose pod is gone");
    system.stop()
}

#[test]
fn what_no_node_can_hold_says_what_is_missing() -> Result<()> {
    let system = System::start_on_kubernetes(&[
        ("LOOM_SERVER_KUBERNETES_REQUEST_CPU_MILLICORES", "900000"),
        ("LOOM_SERVER_MAX_CPU_MILLICORES", "900000"),
        ("LOOM_SERVER_KUBERNETES_REQUEST_MEMORY_MB", "64"),
    ])?;
    let start = Instant::now();
    let weaver = system.create_weaver(&json!({"resources": {"cpu_millicores": 900_000, "memory_mb": 64}}))?;
    let described = reason(&system, &weaver, "Insufficient cpu")?;
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    assert_eq!(described["status"], "Pending", "room may come");
    system.stop()
}

#[test]
fn a_program_that_takes_too_much_memory_is_said_to_have_done_so() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let eat = json!({
        "command": ["python3", "-c", "b = bytearray(512 << 20)"], "resources": {"cpu_millicores": 1000, "memory_mb": 64}
    });
    let weaver = system.create_weaver(&eat)?;
    let described = eventually("the weaver to end", TIMEOUT, || {
        let described = system.describe(&weaver)?;
        Ok((described["status"] == "Failed").then_some(described))
    })?;
    let reason = described["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("ran out of memory"), "{reason}");
    system.stop()
}

#[test]
fn what_the_node_does_is_told_as_it_comes() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let weaver = system.new_weaver(&[])?;
    let events = system.run(&["events", &weaver.id])?;
    assert!(events.contains("its node has the image") || events.contains("its node pulled the image in"), "{events}");
    let weaver = system.create_weaver(&json!({"image": registry::image("absent"), "command": ["true"]}))?;
    let described = reason(&system, &weaver, "cannot be pulled")?;
    assert_eq!(described["status"], "Failed", "there is nothing to wait for");
    system.stop()
}

#[test]
fn a_quota_is_named_and_when_it_has_room_the_weaver_starts() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let namespace = namespace(&system)?;
    let quota = |pods: u32| {
        namespace.apply(&format!(
            "apiVersion: v1\nkind: ResourceQuota\nmetadata: {{name: few}}\nspec: {{hard: {{pods: \"{pods}\"}}}}\n"
        ))
    };
    quota(0)?;
    eventually("the quota to count", TIMEOUT, || {
        let quota = namespace.kubectl(&["get", "resourcequota", "few", "-o", "jsonpath={.status.hard.pods}"])?;
        Ok((quota == "0").then_some(()))
    })?;
    let weaver = system.create_weaver(&json!({}))?;
    let described = reason(&system, &weaver, "exceeded quota")?;
    assert_eq!(described["status"], "Pending");
    quota(5)?;
    eventually("the weaver to run", TIMEOUT, || Ok((system.describe(&weaver)?["status"] == "Running").then_some(())))?;
    system.stop()
}

#[test]
fn a_pod_of_no_weaver_is_removed_and_a_foreign_one_is_not() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let namespace = namespace(&system)?;
    let pod = |name: &str, label: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: loom-weaver, weaver-id: {label}}}}}\n\
             spec:\n  terminationGracePeriodSeconds: 0\n  securityContext: {{runAsNonRoot: true, runAsUser: 1000, seccompProfile: {{type: RuntimeDefault}}}}\n\
             \x20 containers: [{{name: a, image: \"{}\", securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}}}]\n",
            registry::image("pause")
        )
    };
    let uuid = "01890000-0000-7000-8000-000000000000";
    namespace.apply(&pod("somebodys-pod", &format!("W-{uuid}")))?;
    namespace.apply(&pod(&format!("weaver-{uuid}"), &format!("W-{uuid}")))?;
    eventually("the pod without a weaver to be removed", TIMEOUT, || {
        Ok(namespace.kubectl(&["get", "pod", &format!("weaver-{uuid}")]).is_err().then_some(()))
    })?;
    namespace.kubectl(&["get", "pod", "somebodys-pod"])?;
    namespace.kubectl(&["delete", "pod", "somebodys-pod", "--now"])?;
    system.stop()
}

#[test]
fn a_namespace_that_is_missing_is_said_at_the_start_with_the_command_that_makes_it() -> Result<()> {
    let Err(error) = System::start_on_kubernetes(&[("LOOM_SERVER_KUBERNETES_NAMESPACE", "nowhere")]) else {
        anyhow::bail!("the server started without its namespace");
    };
    let error = format!("{error:#}");
    assert!(error.contains("kubectl create namespace nowhere"), "{error}");
    Ok(())
}

#[test]
fn a_namespace_that_goes_takes_its_weavers_and_new_ones_wait_for_its_return() -> Result<()> {
    let system = System::start_on_kubernetes(&[])?;
    let namespace = namespace(&system)?;
    let first = system.new_weaver(&[])?;
    // Deletes it, and waits for its end.
    namespace.kubectl(&["delete", "namespace", namespace.name(), "--timeout=60s"])?;
    assert_eq!(reason(&system, &first, "its pod")?["status"], "Failed");
    let second = system.create_weaver(&json!({}))?;
    let waiting = reason(&system, &second, "not found")?;
    assert_eq!(waiting["status"], "Pending");
    assert!(waiting["reason"].as_str().is_some_and(|reason| reason.contains(namespace.name())), "{waiting}");
    namespace.make()?;
    eventually("the weaver to run", TIMEOUT, || Ok((system.describe(&second)?["status"] == "Running").then_some(())))?;
    system.stop()
}

#[test]
fn a_silent_registry_of_one_organisation_delays_no_start_of_another() -> Result<()> {
    const MANY: usize = 40;
    // Takes connections and never says anything.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let address = silent.local_addr()?;
    let registries = format!("{},{},{address}", registry::OPEN, registry::PRIVATE);
    let system = System::start_on_kubernetes(&[("LOOM_SERVER_KUBERNETES_PLAIN_HTTP_REGISTRIES", &registries)])?;
    let alone = system.time_of_a_start()?;
    let ada = system.add_user("ada")?;
    // Without a command the server has to read the image before there is a pod.
    let weavers = system.crowd(&ada, MANY, &json!({"image": format!("{address}/loom/silent:1")}))?;
    let beside = system.time_of_a_start()?;
    ensure_fair(alone, beside)?;
    let waiting = system.weavers_of(&ada)?.iter().filter(|weaver| weaver["status"] == "Pending").count();
    ensure!(waiting > MANY / 4, "only {waiting} still waited for the registry at the end of the measurement");
    system.delete_all(&ada, &weavers)?;
    system.stop()
}

#[test]
fn five_hundred_at_once_have_one_pod_each_and_leave_none() -> Result<()> {
    const MANY: usize = 500;
    const LONG: Duration = Duration::from_secs(240);
    // No node is like that: what is shown is the server's part, and pods that wait are gone as soon as they are deleted.
    let system = System::start_on_kubernetes(&[
        ("LOOM_SERVER_MAX_WEAVERS", "1000"),
        ("LOOM_SERVER_KUBERNETES_NODE_SELECTOR", "loom-test=no-such-node"),
    ])?;
    let ids: Vec<String> =
        (0..MANY).map(|_| Ok(system.create_weaver(&json!({"command": ["true"]}))?.id)).collect::<Result<_>>()?;
    eventually("all pods", LONG, || Ok((system.count_pods()? >= MANY).then_some(())))?;
    let mut owners: Vec<String> = namespace(&system)?
        .pods()?
        .iter()
        .filter_map(|pod| pod["metadata"]["labels"]["weaver-id"].as_str().map(str::to_owned))
        .collect();
    owners.sort();
    let mut wanted = ids.clone();
    wanted.sort();
    assert_eq!(owners, wanted, "not one pod for each weaver");
    let token = system.admin_token()?;
    for id in &ids {
        let answer = system.request(Some(&token), "DELETE", &format!("/api/weavers/{id}"), None)?;
        ensure!(answer.status < 300, "deleting {id}: {answer:?}");
    }
    eventually("no pod to be left", LONG, || Ok((system.count_pods()? == 0).then_some(())))?;
    assert_eq!(system.json(&["ps", "--json"])?, json!([]));
    system.stop()
}
