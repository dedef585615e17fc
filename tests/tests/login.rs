//! Logging in: over HTTPS with certificates of every kind, and through the browser.

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::Output,
};

use anyhow::{Context as _, Result};
use loom_tests::{Authority, System, system::free_port};

/// A name that stands for this machine everywhere, and an address.
const HERE: &str = "DNS:localhost,IP:127.0.0.1";

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A server over HTTPS, and its port.
fn over_tls(files: &[PathBuf; 2]) -> Result<(System, u16)> {
    over_tls_with(files, &[])
}

/// The same with further settings.
fn over_tls_with(files: &[PathBuf; 2], settings: &[(&str, &str)]) -> Result<(System, u16)> {
    let [certificate, key] = files.each_ref().map(|path| path.to_string_lossy());
    let tls = [("LOOM_SERVER_TLS_CERT", &*certificate), ("LOOM_SERVER_TLS_KEY", &*key)];
    let system = System::start_logged_out(&[&tls, settings].concat())?;
    let port = system.url().rsplit(':').next().unwrap_or_default().parse()?;
    Ok((system, port))
}

#[test]
fn what_keeps_a_login_from_a_server_is_told_with_its_own_way_out() -> Result<()> {
    let authority = Authority::new()?;
    let trusted = authority.certificate().to_string_lossy().into_owned();
    let (good, good_port) = over_tls(&authority.server("good", HERE)?)?;
    let (expired, expired_port) = over_tls(&authority.expired_server("expired", HERE)?)?;
    let (named, named_port) = over_tls(&authority.server("named", "DNS:loom.example")?)?;
    let plain = System::start_logged_out(&[])?;
    let plain_port = plain.url().rsplit(':').next().unwrap_or_default().to_owned();
    let here = |port: u16| format!("https://localhost:{port}");
    let cases = [
        (here(good_port), false, "does not trust", "--ca FILE"),
        (here(named_port), true, "not for localhost, but for loom.example", "a name that the certificate is for"),
        (here(expired_port), true, "expired on 2020-12-31", "renew"),
        (here(free_port()?), true, "connection refused", "that the server runs"),
        ("https://loom.invalid".to_owned(), true, "cannot be resolved", "the spelling"),
        (format!("http://127.0.0.1:{good_port}"), false, "does not speak plain HTTP", "https://"),
        (format!("https://127.0.0.1:{plain_port}"), false, "does not speak HTTPS", "plain HTTP is for"),
    ];
    for (url, with_authority, why, hint) in cases {
        let ca: &[&str] = if with_authority { &["--ca", &trusted] } else { &[] };
        let login = [&["login", "--server-url", &url, "--token", "-"], ca].concat();
        let output = good.output_with_input(&login, b"loom_unused")?;
        let errors = text(&output);
        let (error, advice) = errors.split_once("hint: ").unwrap_or((&errors, ""));
        assert_eq!(output.status.code(), Some(1), "{url}: {errors}");
        assert!(error.contains(why) && advice.contains(hint), "{url}: {errors}");
        assert!(!errors.contains("check the token"), "{url}: {errors}");
    }
    // Other commands say the same.
    let mut ps = good.loom(&["ps", "--server-url", &here(good_port)]);
    let errors = text(&ps.env("LOOM_TOKEN", "some").output()?);
    assert!(errors.contains("does not trust") && errors.contains("--ca FILE"), "{errors}");
    drop((expired, named));
    Ok(())
}

#[test]
fn an_authority_is_trusted_by_every_later_command_and_the_daemon() -> Result<()> {
    let authority = Authority::new()?;
    let (system, port) = over_tls(&authority.server("good", HERE)?)?;
    let url = format!("https://localhost:{port}");
    let given = system.path("authority.pem");
    std::fs::copy(authority.certificate(), &given)?;
    let loom = |arguments: &[&str]| {
        let mut command = system.loom(arguments);
        command.env("LOOM_SERVER_URL", &url);
        command
    };
    // A path from another directory than the later commands', and a file that goes away.
    let mut login = loom(&["login", "--ca", "authority.pem", "--token", "-"]);
    login.current_dir(system.path(""));
    let output = loom_tests::system::output_with_input(login, system.sign_in_token()?.as_bytes())?;
    assert!(output.status.success(), "{}", text(&output));
    std::fs::remove_file(&given)?;

    let run = |arguments: &[&str]| -> Result<String> {
        let output = loom(arguments).output()?;
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(run(&["whoami"])?.contains("admin"));
    assert!(run(&["version"])?.contains("server"));
    // The daemon asks the server, and is answered.
    let output = loom(&["ssh", "nobody", "--", "true"]).output()?;
    assert!(text(&output).contains("there is no weaver"), "{}", text(&output));
    run(&["logout"])?;
    // The authority is still known: it is the token that is refused.
    let output = loom_tests::system::output_with_input(loom(&["login", "--token", "-"]), b"loom_unused")?;
    assert_eq!(output.status.code(), Some(4), "{}", text(&output));
    Ok(())
}

/// Makes a weaver of a server over HTTPS, as a user who trusts its authority, and runs a command in it.
fn weaver_over_tls(authority: &Authority, files: &[PathBuf; 2], settings: &[(&str, &str)]) -> Result<()> {
    let (system, port) = over_tls_with(files, settings)?;
    let url = format!("https://localhost:{port}");
    let run = |arguments: &[&str], input: &str| -> Result<String> {
        let mut command = system.loom(arguments);
        command.env("LOOM_SERVER_URL", &url);
        let output = loom_tests::system::output_with_input(command, input.as_bytes())?;
        assert!(output.status.success(), "{arguments:?}: {}\n{}", text(&output), system.server_log());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let trusted = authority.certificate().to_string_lossy().into_owned();
    run(&["login", "--ca", &trusted, "--token", "-"], &system.sign_in_token()?)?;
    let weaver = run(&["new", "--no-attach"], "")?;
    assert_eq!(run(&["ssh", weaver.trim(), "--", "echo", "inside"], "")?, "inside\n");
    run(&["delete", "--yes", weaver.trim()], "")?;
    Ok(())
}

#[test]
fn weavers_trust_the_authority_that_the_operator_names() -> Result<()> {
    let authority = Authority::new()?;
    let trusted = authority.certificate().to_string_lossy().into_owned();
    weaver_over_tls(&authority, &authority.server("leaf", HERE)?, &[("LOOM_SERVER_LOCAL_AGENT_CA", &trusted)])
}

#[test]
fn weavers_trust_the_authority_in_the_servers_own_chain() -> Result<()> {
    let authority = Authority::new()?;
    let [certificate, key] = authority.server("leaf", HERE)?;
    // With its key, as some programs keep them: it must not reach the weavers.
    let chain = certificate.with_extension("chain");
    let parts = [&certificate, &authority.certificate(), &key].map(std::fs::read_to_string);
    std::fs::write(&chain, parts.into_iter().collect::<std::io::Result<String>>()?)?;
    weaver_over_tls(&authority, &[chain, key], &[])
}

#[test]
fn a_certificate_that_weavers_will_not_trust_is_told_at_the_start() -> Result<()> {
    let authority = Authority::new()?;
    let trusted = authority.certificate().to_string_lossy().into_owned();
    let files = authority.server("unknown", HERE)?;
    // What the server's own environment says does not reach weavers.
    for settings in [&[][..], &[("SSL_CERT_FILE", &*trusted)]] {
        let unknown = over_tls_with(&files, settings)?.0.server_log();
        assert!(unknown.contains("no weaver becomes ready") && unknown.contains("--local-agent-ca"), "{unknown}");
    }
    let files = authority.server("named", "DNS:loom.example")?;
    let named = over_tls_with(&files, &[("LOOM_SERVER_LOCAL_AGENT_CA", &trusted)])?.0.server_log();
    assert!(named.contains("not for 127.0.0.1") && named.contains("--public-url"), "{named}");
    Ok(())
}

#[test]
fn a_file_without_a_certificate_is_no_authority() -> Result<()> {
    let system = System::start_logged_out(&[])?;
    let file = system.path("empty.pem");
    std::fs::write(&file, "nothing")?;
    let output = system.output(&["login", "--ca", &file.to_string_lossy()])?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("no certificate"), "{}", text(&output));
    Ok(())
}

#[test]
fn a_token_for_a_program_is_made_listed_and_revoked() -> Result<()> {
    let system = System::start()?;
    let made = system.output(&["token", "create", "ci", "--ttl", "2"])?;
    assert!(made.status.success(), "{}", text(&made));
    let token = String::from_utf8(made.stdout.clone())?.trim_end().to_owned();
    assert!(token.starts_with("loom_") && !token.contains(char::is_whitespace), "the token stands alone: {made:?}");
    assert!(!text(&made).contains(&token), "{made:?}");

    let as_program = |arguments: &[&str]| system.loom(arguments).env("LOOM_TOKEN", &token).output();
    assert!(as_program(&["ps"])?.status.success());
    let listed = system.json(&["token", "list", "--json"])?;
    let ci = listed.as_array().into_iter().flatten().find(|token| token["name"] == "ci").cloned().unwrap_or_default();
    assert!(ci["last_used_at"].is_string() && ci["expires_at"].is_string(), "{listed}");
    let id = ci["id"].to_string();
    let table = system.run(&["token", "list"])?;
    assert!(table.lines().any(|line| line.starts_with(&format!("{id} ")) && line.contains(" ci ")), "{table}");

    system.run(&["token", "revoke", &id])?;
    assert_eq!(as_program(&["ps"])?.status.code(), Some(4));
    let again = system.output(&["token", "revoke", &id])?;
    assert!(text(&again).contains("loom token list"), "{again:?}");
    system.stop()
}

#[test]
fn a_login_waits_through_a_restart_of_the_server() -> Result<()> {
    let mut system = System::start_logged_out(&[])?;
    let mut login = system.loom(&["login", "--no-browser"]).stderr(std::process::Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(login.stderr.take().context("standard error was piped")?).lines();
    let code = lines.by_ref().map_while(Result::ok).find_map(|line| user_code(&line)).context("a code")?;
    system.kill_server()?;
    // A poll meets the closed port while it is away.
    let polled = std::net::TcpListener::bind(system.url().trim_start_matches("http://"))?;
    drop(polled.accept()?);
    drop(polled);
    system.start_server()?;
    system.approve_login(&code, &system.sign_in_token()?)?;
    assert!(login.wait()?.success(), "{:?}", lines.map_while(Result::ok).collect::<Vec<_>>());
    system.stop()
}

#[test]
fn the_approval_page_shows_who_asks_and_then_takes_the_decision() -> Result<()> {
    let system = System::start_logged_out(&[])?;
    let begin = || -> Result<(String, String)> {
        let body = r#"{"client_name":"eve@<b>laptop"}"#;
        let login = system.request(None, "POST", "/api/login/device", Some(body))?;
        let text = |name: &str| login.body[name].as_str().map(str::to_owned).context("a code");
        Ok((text("user_code")?, format!(r#"{{"device_code":"{}"}}"#, text("device_code")?)))
    };
    let token = system.admin_token()?;
    let (code, poll) = begin()?;
    let question = system.login_page(&[&format!("user_code={code}"), "token@-"], &token)?;
    assert_eq!(question.status, 200, "{question:?}");
    for shown in ["eve@&lt;b&gt;laptop", "127.0.0.1", "UTC", ">admin<", "Approve", "Deny"] {
        assert!(question.body.contains(shown), "{shown}: {}", question.body);
    }
    assert!(!question.body.contains(&token), "the token does not travel a second time");
    let pending = system.request(None, "POST", "/api/login/token", Some(&poll))?;
    assert_eq!(pending.code(), "authorization_pending", "nothing is decided by the first step");
    // One step is not enough, and a ticket cannot be made up.
    let at_once = system.login_page(&["action=approve", &format!("user_code={code}"), "token@-"], &token)?;
    assert!(at_once.body.contains("Let this client in?"), "{at_once:?}");
    let made_up = system.login_page(&["action=approve", "ticket@-"], "AAAA")?;
    assert_eq!(made_up.status, 400, "{made_up:?}");
    let ticket = question.body.split("name=\"ticket\" value=\"").nth(1).and_then(|rest| rest.split('"').next());
    let denied = system.login_page(&["action=deny", "ticket@-"], ticket.context("a ticket")?)?;
    assert!(denied.body.contains("Denied"), "{denied:?}");
    let answer = system.request(None, "POST", "/api/login/token", Some(&poll))?;
    assert_eq!(answer.code(), "access_denied");

    // Wrong ones are slowed down.
    let wrong = || system.login_page(&["user_code=BCDF-GHJK", "token@-"], "loom_wrong");
    let statuses = (0..12).map(|_| Ok(wrong()?.status)).collect::<Result<Vec<_>>>()?;
    assert_eq!((statuses[0], statuses[11]), (403, 429), "{statuses:?}");
    // So are many beginnings.
    let began = (0..25).map(|_| begin().is_ok()).filter(|began| *began).count();
    assert!((15..=22).contains(&began), "{began}");
    Ok(())
}

#[test]
fn a_login_is_approved_only_with_what_lives_as_long() -> Result<()> {
    let system = System::start()?;
    let ada = system.add_user("ada")?;
    let create = |body| -> Result<String> {
        let made = system.request(Some(&ada), "POST", "/api/tokens", Some(body))?;
        made.body["token"].as_str().map(str::to_owned).context("a token")
    };
    let (with_end, without) = (create(r#"{"name":"ci","ttl_hours":1}"#)?, create(r#"{"name":"ci"}"#)?);
    let begun = system.request(None, "POST", "/api/login/device", Some(r#"{"client_name":"eve"}"#))?;
    let code = begun.body["user_code"].as_str().context("a code")?;
    let ask = |token: &str| system.login_page(&[&format!("user_code={code}"), "token@-"], token);
    let refused = ask(&with_end)?;
    assert!(refused.status == 403 && refused.body.contains("ends before a login does"), "{refused:?}");
    system.manage(&["user", "suspend", "ada"])?;
    let suspended = ask(&without)?;
    assert!(suspended.status == 403 && suspended.body.contains("suspended"), "{suspended:?}");
    system.manage(&["user", "resume", "ada"])?;
    system.approve_login(code, &without)?;
    system.stop()
}

/// Two groups of four letters: `BCDF-GHJK`.
fn user_code(line: &str) -> Option<String> {
    let code = line.trim();
    (code.len() == 9 && code.as_bytes()[4] == b'-').then(|| code.to_owned())
}
