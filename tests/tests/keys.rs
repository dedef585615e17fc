//! WireGuard keys belong to those who hold them: a user for a device, a weaver for its agent.

use anyhow::{Context as _, Result};
use loom_tests::{
    System, Weaver,
    api::{Answer, UPGRADE},
    keys::KeyPair,
    processes::signal,
    system::BACKEND,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// How an answer ended, for one comparison.
fn outcome(answer: &Answer) -> (u16, &str) {
    (answer.status, answer.code())
}

#[test]
fn a_device_is_admitted_only_for_those_who_prove_that_they_hold_its_key() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let token = system.admin_token()?;
    let (device, other) = (KeyPair::generate()?, KeyPair::generate()?);
    let key = device.public();

    let unproven = system.open_tunnel_with(&token, &weaver, &json!({"public_key": key}))?;
    assert_eq!(outcome(&unproven), (403, "key_not_proven"));
    let challenge = system.key_challenge()?;
    for (what, proof) in [
        ("another key's proof", other.answer(&challenge)?),
        (
            "a proof of another challenge",
            json!({"nonce": challenge["nonce"], "mac": device.answer(&system.key_challenge()?)?["mac"]}),
        ),
        ("a nonce that was never given out", json!({"nonce": "AAAA", "mac": device.answer(&challenge)?["mac"]})),
    ] {
        let refused = system.open_tunnel_with(&token, &weaver, &json!({"public_key": key, "proof": proof}))?;
        assert_eq!(outcome(&refused), (403, "key_not_proven"), "{what}");
    }

    assert_eq!(system.open_tunnel(&token, &weaver, &device)?.status, 200);
    let again = system.open_tunnel_with(&token, &weaver, &json!({"public_key": key}))?;
    assert_eq!(again.status, 200, "a key that is known as the user's needs no proof: {again:?}");
    system.stop()
}

/// Registers as a weaver's agent, with the credential that the backend gave it.
fn register(system: &System, weaver: &Weaver, key: &str, proof: &Value) -> Result<Answer> {
    let credential = std::fs::read_to_string(system.weaver_directory(weaver).join("sidecar/token"))?;
    system.register_agent(weaver, &credential, "0", key, proof)
}

#[test]
fn an_agent_cannot_take_the_key_of_a_device_or_of_another_agent() -> Result<()> {
    if std::env::var(BACKEND).is_ok_and(|backend| backend != "local") {
        return Ok(()); // it needs the agent's credential
    }
    let system = System::start()?;
    let (attacker, victim) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    let token = system.admin_token()?;
    let device = KeyPair::generate()?;
    let grant = system.open_tunnel(&token, &victim, &device)?;
    let agent_key = grant.body["peer_key"].as_str().context("the agent's key")?.to_owned();
    // A compromised sidecar, which does not hold the link at the same time.
    signal(system.sidecar(&attacker)?.pid, Signal::STOP);

    let own = KeyPair::generate()?;
    let own_proof = own.answer(&system.key_challenge()?)?;
    for (whose, key) in [("a device's", device.public()), ("another agent's", agent_key)] {
        let refused = register(&system, &attacker, &key, &own_proof)?;
        assert_eq!(outcome(&refused), (403, "key_not_proven"), "{whose}");
    }
    let without = register(&system, &attacker, &own.public(), &Value::Null)?;
    assert_eq!(outcome(&without), (400, "invalid_request"));
    // Not even the device's owner makes it an agent's.
    let proof = device.answer(&system.key_challenge()?)?;
    assert_eq!(outcome(&register(&system, &attacker, &device.public(), &proof)?), (403, "forbidden"));

    let registered = register(&system, &attacker, &own.public(), &own_proof)?;
    assert_eq!(registered.status, 200, "{registered:?}");
    let agent_token = registered.body["token"].as_str().context("a token")?;
    let relay = format!("/api/relay?key={}", device.in_url());
    let place = system.request_with(Some(agent_token), "GET", &relay, None, &UPGRADE)?;
    assert_eq!(outcome(&place), (403, "forbidden"));

    // The device's owner and the other weaver have lost nothing.
    assert_eq!(system.run(&["exec", &victim.id, "--", "echo", "reached"])?, "reached\n");
    signal(system.sidecar(&attacker)?.pid, Signal::CONT);
    system.stop()
}
