//! What may be given as a weaver's repository and branch.

use std::path::Path;

use loom_api::ErrorCode;

use crate::problem::{Answer, Problem};

/// The longest URL, and the longest branch.
const MAX_LENGTH: usize = 2048;
/// The kinds of URL that agents can clone.
const SCHEMES: [&str; 4] = ["https", "http", "git", "file"];

/// Checks a repository's URL, which everybody in the organisation can read, and its branch. `accepts_file` says whether
/// weavers can clone from a path on the server's machine.
pub(super) fn check(
    repo: Option<&str>,
    branch: Option<&str>,
    accepts_file: impl FnOnce(&Path) -> Result<(), String>,
) -> Answer<()> {
    let invalid = |message: &str| Problem::new(ErrorCode::InvalidRequest, message);
    let Some(repo) = repo else {
        return if branch.is_some() { Err(invalid("a branch needs a repo")) } else { Ok(()) };
    };
    let plain = |text: &str| {
        !text.is_empty() && text.len() <= MAX_LENGTH && !text.chars().any(|c| c.is_control() || c.is_whitespace())
    };
    let Some((scheme, rest)) = repo.split_once("://").filter(|(scheme, _)| plain(repo) && SCHEMES.contains(scheme))
    else {
        return Err(invalid("the repo must be an https://, http://, git:// or file:// URL"));
    };
    if !is_host(rest.split(['/', '?', '#', '\\']).next().unwrap_or_default(), scheme) {
        return Err(invalid(
            "the repo's URL must have only a host after ://, no user name or password: everybody in the organisation \
             can read it",
        )
        .hint(
            "for a private repository, leave --repo out, pass the credential as a secret (-e GIT_TOKEN), and clone inside the \
             weaver",
        ));
    }
    if scheme == "file" {
        accepts_file(Path::new(rest)).map_err(|reason| {
            invalid(&reason).hint(
                "use an https:// URL, or ask the server's operator to list the repository's directory in \
                 local-repositories",
            )
        })?;
    }
    if branch.is_some_and(|branch| !plain(branch) || branch.starts_with('-')) {
        return Err(invalid("the branch is not a branch's name"));
    }
    Ok(())
}

/// Whether what stands between `://` and the path is `host[:port]`, or nothing for a file. A `@`, written out or
/// percent-encoded, is not; nor is a port that is no number, such as the beginning of a password with a `/` in it.
fn is_host(authority: &str, scheme: &str) -> bool {
    if scheme == "file" {
        return authority.is_empty();
    }
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
            (address, rest.strip_prefix(':').or_else(|| rest.is_empty().then_some("")))
        }
        Some(_) => return false,
        None => authority.split_once(':').map_or((authority, Some("")), |(host, port)| (host, Some(port))),
    };
    !host.is_empty()
        && !host.contains(['@', '%', '[', ']'])
        && port.is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(repo: Option<&str>, branch: Option<&str>) -> Answer<()> {
        let accepts_file = |path: &Path| if path.starts_with("/srv/git") { Ok(()) } else { Err("no".to_owned()) };
        super::check(repo, branch, accepts_file)
    }

    #[test]
    fn credentials_are_refused_in_every_form_and_not_repeated() {
        for authority in [
            "ada@host",
            "ada:s3cret@host",
            ":s3cret@host",
            "@host",
            "ada:s3cret@host:8443",
            "ada:s3cret@[::1]",
            "ada%40example.org:s3%2Fcret@host",
            "ada%3As3cret%40host",
            "ada:s3/cret@host",
            "ada:s3#cret@host",
            "ada:s3?cret@host",
            r"ada:s3\cret@host",
            "ada@host@host",
        ] {
            for scheme in ["https", "http", "git", "file"] {
                let problem = check(Some(&format!("{scheme}://{authority}/team/project")), None).unwrap_err();
                let shown = format!("{problem:?}");
                assert!(shown.contains("password") && !shown.contains("cret@"), "{scheme}://{authority}: {shown}");
            }
        }
    }

    #[test]
    fn an_at_sign_in_the_path_and_ports_are_fine() {
        for url in [
            "https://host/@team/project",
            "https://host/team/project@v1.git",
            "https://host/%40team/project",
            "https://host:8443/team/project?at=a@b",
            "https://[::1]:8443/project",
            "git://127.0.0.1:9418/project",
            "http://host/project",
        ] {
            assert!(check(Some(url), None).is_ok(), "{url}");
        }
        assert!(check(Some("file:///srv/git/a@b"), Some("main")).is_ok());
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for url in [
            "",
            "project",
            "ssh://host/x",
            "ext::sh -c id",
            "https://",
            "https:///x",
            "https://host/a b",
            "file:///etc",
        ] {
            assert!(check(Some(url), None).is_err(), "{url}");
        }
        assert!(check(None, Some("main")).is_err());
        assert!(check(Some("https://host/x"), Some("-b")).is_err());
    }
}
