//! The HTTP API from outside: who may do what, what bad input gets, and both attach protocols.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System,
    api::{UPGRADE, read_until},
    eventually,
    keys::KeyPair,
    system::TIMEOUT,
    terminal::Terminal,
};
use serde_json::{Value, json};
use tungstenite::Message;

#[test]
fn every_documented_route_is_there_and_needs_a_token_unless_it_says_otherwise() -> Result<()> {
    let system = System::start()?;
    let document = system.request(None, "GET", "/api/openapi.json", None)?;
    assert_eq!(document.status, 200);
    let paths = document.body["paths"].as_object().context("paths")?;
    ensure!(paths.len() > 15, "only {} paths", paths.len());
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().context("operations")? {
            let address = path.replace("{id}", "x").replace("{key}", "x").replace("{stream}", "x");
            let answer = system.request(None, &method.to_uppercase(), &address, None)?;
            if operation["security"].is_array() {
                assert_eq!((answer.status, answer.code()), (401, "unauthorized"), "{method} {path}");
            } else {
                assert!(![401, 404, 405].contains(&answer.status), "{method} {path}: {answer:?}");
            }
        }
    }
    let absent = system.request(None, "GET", "/api/nothing", None)?;
    assert_eq!((absent.status, absent.code()), (404, "not_found"));
    let other = system.request(None, "PUT", "/api/weavers", None)?;
    assert_eq!((other.status, other.code()), (405, "invalid_request"));
    system.stop()
}

#[test]
fn another_users_weavers_and_devices_do_not_exist_for_one() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&["--name", "mine"])?;
    let eve = system.add_user("eve")?;
    let eve = Some(eve.as_str());
    for (method, path, body) in [
        ("GET", format!("/api/weavers/{}", weaver.id), None),
        ("GET", "/api/weavers/mine".to_owned(), None),
        ("GET", format!("/api/weavers/{}/events", weaver.id), None),
        ("GET", format!("/api/weavers/{}/logs", weaver.id), None),
        ("DELETE", format!("/api/weavers/{}", weaver.id), None),
        ("POST", format!("/api/weavers/{}/extend", weaver.id), Some(r#"{"hours":1}"#)),
        (
            "POST",
            format!("/api/weavers/{}/tunnel", weaver.id),
            Some(r#"{"public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#),
        ),
    ] {
        let answer = system.request(eve, method, &path, body)?;
        assert_eq!((answer.status, answer.code()), (404, "weaver_not_found"), "{method} {path}");
    }
    assert_eq!(system.request(eve, "GET", "/api/weavers?all=true", None)?.body, json!([]));
    let admin = system.admin_token()?;
    let org = system.request(Some(&admin), "GET", "/api/me", None)?.body["organisations"][0]["id"].clone();
    let intruding = json!({"org_id": org}).to_string();
    assert_eq!(system.request(eve, "POST", "/api/weavers", Some(&intruding))?.code(), "forbidden");

    // A key belongs to the first who proved to hold it.
    let device = KeyPair::generate()?;
    assert_eq!(system.open_tunnel(&admin, &weaver, &device)?.status, 200);
    let relay = format!("/api/relay?key={}", device.in_url());
    assert_eq!(system.request_with(eve, "GET", &relay, None, &UPGRADE)?.code(), "forbidden");
    system.stop()
}

#[test]
fn a_request_with_an_idempotency_key_is_done_once() -> Result<()> {
    let system = System::start()?;
    let token = system.admin_token()?;
    let make =
        |body: &str| system.request_with(Some(&token), "POST", "/api/weavers", Some(body), &["Idempotency-Key: one"]);
    let first = make(r#"{"name":"once"}"#)?;
    let again = make(r#"{"name":"once"}"#)?;
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!(first.body["id"], again.body["id"]);
    assert_eq!(make(r#"{"name":"other"}"#)?.code(), "idempotency_conflict");
    let taken = system.request(Some(&token), "POST", "/api/weavers", Some(r#"{"name":"once"}"#))?;
    assert_eq!((taken.status, taken.code()), (409, "name_taken"));
    system.stop()
}

#[test]
fn bad_requests_are_refused_with_a_code_and_change_nothing() -> Result<()> {
    let system = System::start()?;
    let token = system.admin_token()?;
    for (body, status, code) in [
        ("", 400, "invalid_request"),
        ("{", 400, "invalid_request"),
        ("[]", 400, "invalid_request"),
        (r#"{"unknown":1}"#, 400, "invalid_request"),
        (r#"{"lifetime_hours":0}"#, 400, "invalid_lifetime"),
        (r#"{"lifetime_hours":48.01}"#, 400, "invalid_lifetime"),
        (r#"{"lifetime_hours":1e999}"#, 400, "invalid_request"),
        (r#"{"image":"a b"}"#, 400, "invalid_image"),
        (r#"{"image":"python:3"}"#, 422, "image_unavailable"),
        (r#"{"branch":"main"}"#, 400, "invalid_request"),
        (r#"{"repo":"ssh://host/x"}"#, 400, "invalid_request"),
        (r#"{"repo":"https://ada:s3cret@host/x"}"#, 400, "invalid_request"),
        (r#"{"repo":"https://ada%40host/x"}"#, 400, "invalid_request"),
        (r#"{"command":[]}"#, 400, "invalid_request"),
        (r#"{"env":{"A=B":"c"}}"#, 400, "invalid_request"),
        (r#"{"env":{"A":"\u0000"}}"#, 400, "invalid_request"),
        (r#"{"resources":{"cpu_millicores":0,"memory_mb":1}}"#, 400, "invalid_request"),
        (r#"{"resources":{"cpu_millicores":4294967295,"memory_mb":1}}"#, 400, "invalid_request"),
        (r#"{"resources":{"cpu_millicores":1,"memory_mb":4294967295}}"#, 400, "invalid_request"),
    ] {
        let answer = system.request(Some(&token), "POST", "/api/weavers", Some(body))?;
        assert_eq!((answer.status, answer.code()), (status, code), "{body}: {answer:?}");
    }
    // Each word counts, and so does what a letter needs in JSON.
    for word in ["", "\\u0001"] {
        let words = format!(r#"{{"command":["true"{}]}}"#, format!(r#","{word}""#).repeat(80_000 / (word.len() + 3)));
        let answer = system.request(Some(&token), "POST", "/api/weavers", Some(&words))?;
        assert_eq!((answer.status, answer.code()), (400, "invalid_request"), "{answer:?}");
    }
    // Whatever part of a request is wrong, the answer is an error of the API.
    for (method, path) in [
        ("GET", "/api/weavers/%ff"),
        ("DELETE", "/api/weavers/%ff"),
        ("GET", "/api/weavers/%ff/events"),
        ("GET", "/api/weavers/%ff/logs"),
        ("DELETE", "/api/weavers/%ff/tunnel/%ff"),
        ("DELETE", "/api/devices/%ff"),
        ("DELETE", "/api/tokens/%ff"),
        ("GET", "/api/weavers/work/attach"),
        ("GET", "/api/relay?key="),
        ("GET", "/api/weavers?limit=many"),
    ] {
        let answer = system.request(Some(&token), method, path, None)?;
        assert_eq!((answer.status, answer.code()), (400, "invalid_request"), "{method} {path}: {answer:?}");
    }
    let large = format!(r#"{{"name":"{}"}}"#, "x".repeat(100_000));
    assert_eq!(system.request(Some(&token), "POST", "/api/weavers", Some(&large))?.status, 400);
    assert_eq!(system.request(Some(&token), "GET", "/api/weavers?all=true", None)?.body, json!([]));
    system.stop()
}

#[test]
fn a_weaver_gets_no_more_cpu_and_memory_than_the_server_allows() -> Result<()> {
    let system =
        System::start_with(&[("LOOM_SERVER_MAX_CPU_MILLICORES", "3000"), ("LOOM_SERVER_MAX_MEMORY_MB", "4096")])?;
    let token = system.admin_token()?;
    let make = |cpu: u32, memory: u32| {
        let body = json!({"resources": {"cpu_millicores": cpu, "memory_mb": memory}}).to_string();
        system.request(Some(&token), "POST", "/api/weavers", Some(&body))
    };
    for (cpu, memory, limit) in [(3001, 4096, "3000"), (3000, 4097, "4096")] {
        let answer = make(cpu, memory)?;
        assert_eq!((answer.status, answer.code()), (400, "invalid_request"));
        let error = answer.body.to_string();
        assert!(error.contains(limit) && error.contains("at most"), "{error}");
    }
    assert_eq!(make(3000, 4096)?.status, 201);
    system.stop()
}

#[test]
fn a_weaver_shows_its_pod_while_it_has_one() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&["--name", "shown"])?;
    let token = system.admin_token()?;
    let shown = || -> Result<Value> {
        let list = system.request(Some(&token), "GET", "/api/weavers", None)?.body;
        let weavers = list.as_array().context("a list")?;
        Ok(weavers.iter().find(|shown| shown["name"] == "shown").cloned().unwrap_or_default())
    };
    assert_eq!(shown()?["pod_phase"], "Running");
    let on_kubernetes = system.namespace().is_some();
    for (field, start) in [("pod_ip", ""), ("node", ""), ("image_digest", "sha256:")] {
        let described = system.describe(&weaver)?;
        let value = described[field].as_str();
        assert_eq!(value.is_some_and(|value| value.starts_with(start)), on_kubernetes, "{field}: {described}");
    }
    system.kill_pod(&weaver)?;
    eventually("the pod to be gone, and the weaver failed", TIMEOUT, || {
        let shown = shown()?;
        Ok((shown["status"] == "Failed" && shown["pod_phase"].is_null()).then_some(()))
    })?;
    system.stop()
}

#[test]
fn the_plain_attach_protocol_is_text_both_ways_with_resizes() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut socket = system.attach_socket(&weaver, None)?;
    socket.send(Message::text("echo plain-$((40+2)) €\r"))?;
    read_until(&mut socket, "plain-42 €")?;
    socket.send(Message::text(r#"{"type":"resize","rows":33,"cols":101}"#))?;
    eventually("the resize to count", TIMEOUT, || {
        socket.send(Message::text("echo size-$(stty size)-end\r"))?;
        let seen = read_until(&mut socket, "-end\r\n")?;
        Ok(seen.contains("size-33 101-end").then_some(()))
    })?;
    socket.send(Message::text(r#"echo {"type":"other"}"#.to_owned() + "\r"))?;
    read_until(&mut socket, "{type:other}")?;
    system.stop()
}

#[test]
fn a_client_that_vanishes_counts_no_longer_after_40_seconds() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut terminal = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    terminal.resize(40, 120)?;
    let mut shows = |size: &str, patience: Duration| {
        eventually("the size to change", patience, || {
            terminal.send("clear; echo size-$(stty size)\r")?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(terminal.screen().contains(size).then_some(()))
        })
    };
    shows("size-40 120", TIMEOUT)?;
    // It reads nothing from here on, so it answers no ping, and its connection stays open.
    let vanished = system.attach_socket(&weaver, Some("loom.attach.v2"))?;
    shows("size-24 80", TIMEOUT)?;
    let silent = Instant::now();
    shows("size-40 120", Duration::from_secs(50))?;
    println!("noticed after {:.1} s", silent.elapsed().as_secs_f32());
    drop(vanished);
    system.stop()
}

#[test]
fn a_client_that_returns_gets_exactly_what_it_missed() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut socket = system.attach_socket(&weaver, Some("loom.attach.v2"))?;
    let Message::Text(attached) = socket.read()? else { anyhow::bail!("the first frame is no control frame") };
    assert!(attached.contains(r#""type":"attached""#), "{attached}");
    socket.send(Message::binary(b"echo v2-$((40+2))\r".to_vec()))?;
    let seen = read_until(&mut socket, "v2-42")?;
    assert!(seen.contains(r#""type":"snapshot""#) || seen.contains("v2"), "{seen}");
    // Hostile input ends the connection or is ignored; it harms nobody else.
    socket.send(Message::text("{\"type\":\"resize\",\"rows\":65536}"))?;
    socket.send(Message::text("not json"))?;
    let mut second = system.attach_socket(&weaver, Some("loom.attach.v2"))?;
    second.send(Message::binary(b"echo still-$((40+3))\r".to_vec()))?;
    read_until(&mut second, "still-43")?;
    system.stop()
}

#[test]
fn the_limit_of_weavers_holds_for_requests_at_the_same_time() -> Result<()> {
    let system = System::start_with(&[("LOOM_SERVER_MAX_WEAVERS", "3")])?;
    let token = system.admin_token()?;
    let answers: Vec<_> = std::thread::scope(|scope| {
        let create = || system.request(Some(&token), "POST", "/api/weavers", Some(r#"{"command":["sleep","1000"]}"#));
        let requests: Vec<_> = (0..24).map(|_| scope.spawn(create)).collect();
        requests.into_iter().map(|request| request.join().expect("no request panics")).collect::<Result<_>>()
    })?;
    let count = |status: u16| answers.iter().filter(|answer| answer.status == status).count();
    assert_eq!((count(201), count(429)), (3, 21), "{answers:?}");
    system.stop()
}

#[test]
fn lists_are_paged_newest_first_and_a_name_is_never_guessed() -> Result<()> {
    let system = System::start()?;
    let token = system.admin_token()?;
    let get = |path: &str| system.request(Some(&token), "GET", path, None);
    let create = |body: &str| system.request(Some(&token), "POST", "/api/weavers", Some(body));
    for name in ["deadbeef", "0192", "w-1a"] {
        let answer = create(&json!({"name": name}).to_string())?;
        assert_eq!((answer.status, answer.code()), (400, "invalid_request"), "{name}: {answer:?}");
    }
    let mut ids = Vec::new();
    for _ in 0..3 {
        let answer = create(r#"{"command":["sleep","1000"]}"#)?;
        ids.insert(0, answer.body["id"].as_str().unwrap_or_default().to_owned());
    }
    let ids_of = |answer: &loom_tests::api::Answer| -> Vec<String> {
        let list = answer.body.as_array().cloned().unwrap_or_default();
        list.iter().filter_map(|weaver| weaver["id"].as_str().map(ToOwned::to_owned)).collect()
    };
    assert_eq!(ids_of(&get("/api/weavers?limit=2")?), ids[..2]);
    assert_eq!(ids_of(&get(&format!("/api/weavers?limit=2&before={}", ids[1]))?), ids[2..]);
    assert_eq!(get("/api/weavers?limit=0")?.code(), "invalid_request");

    // A weaver of the same name in another organisation that the user belongs to.
    system.manage(&["org", "create", "team"])?;
    system.manage(&["org", "add-member", "team", "admin"])?;
    let team = get("/api/me")?.body["organisations"].as_array().and_then(|list| list.last().cloned());
    let team = team.map(|org| org["id"].clone()).unwrap_or_default();
    let own = create(r#"{"name":"twin","command":["sleep","1000"]}"#)?;
    let other = create(&json!({"name": "twin", "org_id": team, "command": ["sleep", "1000"]}).to_string())?;
    let found = get("/api/weavers/twin")?;
    assert_eq!((found.status, found.code()), (409, "weaver_ambiguous"), "{found:?}");
    for id in [&own.body["id"], &other.body["id"]] {
        let id = id.as_str().unwrap_or("none");
        assert!(found.body["error"]["message"].as_str().is_some_and(|text| text.contains(id)), "{found:?}");
        assert_eq!(get(&format!("/api/weavers/{id}"))?.status, 200);
    }
    let other = other.body["id"].as_str().unwrap_or_default();
    assert_eq!(system.request(Some(&token), "DELETE", &format!("/api/weavers/{other}"), None)?.status, 204);
    system.stop()
}
