//! Logging in: over HTTPS with certificates of every kind, and through the browser.

use std::{path::PathBuf, process::Output};

use anyhow::Result;
use loom_tests::{Authority, System, system::free_port};

/// A name that stands for this machine everywhere, and an address.
const HERE: &str = "DNS:localhost,IP:127.0.0.1";

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A server over HTTPS, and its port.
fn over_tls(files: &[PathBuf; 2]) -> Result<(System, u16)> {
    let [certificate, key] = files.each_ref().map(|path| path.to_string_lossy());
    let settings = [("LOOM_SERVER_TLS_CERT", &*certificate), ("LOOM_SERVER_TLS_KEY", &*key)];
    let system = System::start_logged_out(&settings)?;
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
