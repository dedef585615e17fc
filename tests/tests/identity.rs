//! Users, organisations and tokens, as operators manage them beside a running server.

use anyhow::{Context as _, Result, ensure};
use loom_tests::System;

/// The names of the organisations that a token's user is a member of.
fn organisations(system: &System, token: &str) -> Result<Vec<String>> {
    let me = system.request(Some(token), "GET", "/api/me", None)?;
    ensure!(me.status == 200, "{me:?}");
    let list = me.body["organisations"].as_array().context("organisations")?;
    Ok(list.iter().filter_map(|org| Some(org["name"].as_str()?.to_owned())).collect())
}

#[test]
fn the_first_token_signs_in_once_and_its_file_goes_with_it() -> Result<()> {
    let system = System::start_logged_out(&[])?;
    let token = system.sign_in_token()?;
    let used = system.request(Some(&token), "GET", "/api/weavers", None)?;
    assert_eq!((used.status, used.code()), (403, "forbidden"), "it does nothing but sign in");
    let log_in = || system.output_with_input(&["login", "--token", "-"], token.as_bytes());
    ensure!(log_in()?.status.success());
    assert!(!system.path("data/admin.token").exists());
    assert_eq!(system.json(&["ps", "--json"])?, serde_json::json!([]));
    let again = log_in()?;
    assert_eq!(again.status.code(), Some(4), "{}", String::from_utf8_lossy(&again.stderr));
    Ok(())
}

#[test]
fn the_first_tokens_file_goes_with_the_user_too() -> Result<()> {
    let system = System::start_logged_out(&[])?;
    system.manage(&["user", "list"])?;
    assert!(system.path("data/admin.token").exists(), "it is still of use");
    system.manage(&["user", "remove", "admin"])?;
    assert!(!system.path("data/admin.token").exists());
    Ok(())
}

#[test]
fn what_an_operator_mistakes_is_told_without_the_databases_words() -> Result<()> {
    let system = System::start()?;
    system.manage(&["org", "create", "engines"])?;
    for (arguments, why) in [
        (&["user", "add", "engines"][..], "an organisation is called engines already"),
        (&["org", "create", "admin"], "organisation admin"),
        (&["user", "suspend", "nobody"], "there is no user nobody"),
        (&["token", "list", "--user", "nobody"], "there is no user nobody"),
        (&["token", "revoke", "999"], "there is no token 999"),
        (&["org", "remove-member", "engines", "admin"], "admin is not a member of engines"),
    ] {
        let error = system.manage(arguments).expect_err(why).to_string();
        assert!(error.contains(why) && !error.contains("constraint") && !error.contains("code:"), "{error}");
    }
    system.stop()
}

#[test]
fn an_organisation_has_the_members_that_operators_give_it() -> Result<()> {
    let system = System::start()?;
    let ada = system.add_user("ada")?;
    system.manage(&["org", "create", "engines"])?;
    system.manage(&["org", "add-member", "engines", "ada"])?;
    assert_eq!(organisations(&system, &ada)?, ["ada", "engines"]);
    let list = system.manage(&["org", "list"])?;
    assert!(list.lines().any(|line| line.split_whitespace().eq(["engines", "shared", "ada"])), "{list}");
    system.manage(&["org", "remove-member", "engines", "ada"])?;
    assert_eq!(organisations(&system, &ada)?, ["ada"]);
    assert!(system.manage(&["org", "add-member", "ada", "admin"]).is_err(), "a user's own has one member");
    Ok(())
}

#[test]
fn a_suspended_user_has_no_rights_until_resumed_and_a_removed_one_never() -> Result<()> {
    let system = System::start()?;
    let ada = system.add_user("ada")?;
    system.manage(&["user", "suspend", "ada"])?;
    let suspended = system.request(Some(&ada), "GET", "/api/me", None)?;
    assert_eq!((suspended.status, suspended.code()), (401, "unauthorized"));
    assert!(suspended.body["error"]["message"].as_str().unwrap_or_default().contains("suspended"));
    assert!(system.manage(&["user", "list"])?.contains("suspended"));
    system.manage(&["user", "resume", "ada"])?;
    assert_eq!(organisations(&system, &ada)?, ["ada"]);
    system.manage(&["user", "remove", "ada"])?;
    assert_eq!(system.request(Some(&ada), "GET", "/api/me", None)?.status, 401);
    assert!(!system.manage(&["user", "list"])?.contains("ada"));
    let error = system.manage(&["user", "add", "ada"]).expect_err("the name stays taken");
    assert!(error.to_string().contains("not given twice"), "{error}");
    Ok(())
}

#[test]
fn a_token_of_a_suspended_user_can_be_ended_and_stays_so() -> Result<()> {
    let system = System::start()?;
    let ada = system.add_user("ada")?;
    system.manage(&["user", "suspend", "ada"])?;
    assert_eq!(system.request(Some(&ada), "DELETE", "/api/login", None)?.status, 204);
    system.manage(&["user", "resume", "ada"])?;
    assert_eq!(system.request(Some(&ada), "GET", "/api/me", None)?.status, 401, "it was ended");
    system.stop()
}

#[test]
fn a_list_of_tokens_shows_their_last_use_and_a_revoked_one_is_good_for_nothing() -> Result<()> {
    let system = System::start()?;
    let ada = system.add_user("ada")?;
    let body = r#"{"name":"ci","ttl_hours":1}"#;
    let made = system.request(Some(&ada), "POST", "/api/tokens", Some(body))?;
    let ci = made.body["token"].as_str().context("a token")?;
    let listed = system.request(Some(&ada), "GET", "/api/tokens", None)?.body;
    assert_eq!((listed[0]["name"].as_str(), listed[0]["kind"].as_str()), (Some("ci"), Some("api")));
    assert!(listed[0]["last_used_at"].is_null() && listed[1]["last_used_at"].is_string(), "{listed}");
    assert_eq!(listed[1]["kind"], "login");
    assert!(listed[1]["expires_at"].is_string(), "a login has an end: {listed}");

    // What is made with a token that has an end does not outlive it.
    let child = system.request(Some(ci), "POST", "/api/tokens", Some(r#"{"name":"child","login":true}"#))?;
    assert_eq!(child.status, 201, "{child:?}");
    let listed = system.request(Some(&ada), "GET", "/api/tokens", None)?.body;
    assert_eq!((&listed[0]["name"], &listed[0]["expires_at"]), (&"child".into(), &listed[1]["expires_at"]), "{listed}");

    let table = system.manage(&["token", "list", "--user", "ada"])?;
    let row = table.lines().find(|line| line.contains(" ci ")).context("the token's row")?;
    let id = row.split_whitespace().next().context("its number")?;
    system.manage(&["token", "revoke", id])?;
    assert_eq!(system.request(Some(ci), "GET", "/api/me", None)?.status, 401);
    assert!(system.manage(&["token", "revoke", id]).is_err(), "it is gone");
    Ok(())
}
