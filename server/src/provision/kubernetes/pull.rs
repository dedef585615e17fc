//! Why a node cannot pull an image, in words of our own.
//!
//! Container runtimes say so in one line of prose, which ends in whatever the registry answered. Users choose the
//! registry, so none of the line is shown: known causes are recognised by the runtimes' own phrases.

/// A pull that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) cause: &'static str,
    /// Whether another try would end the same.
    pub(super) is_final: bool,
}

const fn passing(cause: &'static str) -> Failure {
    Failure { cause, is_final: false }
}

const fn lasting(cause: &'static str) -> Failure {
    Failure { cause, is_final: true }
}

const UNKNOWN: Failure = passing("the reason is not one that Loom knows; the cluster's operator finds it with kubectl");

/// Phrases of containerd, CRI-O and the kubelet, as [`words`] gives them, and what they mean. The first that fits counts:
/// the particular ones come first, because a line can end in "no match for platform in manifest: not found".
const CAUSES: [(Failure, &[&str]); 11] = [
    (
        passing("its registry, or its node, allows no more pulls for now"),
        &["toomanyrequests", "too many requests", "qps exceeded"],
    ),
    (passing("its node has no space left for it"), &["no space left on device"]),
    (
        passing("its registry has no certificate that the node trusts, or does not speak HTTPS"),
        &["x509", "http response to https client", "tls handshake failure", "tls internal error"],
    ),
    (
        lasting("it is not made for the platform of its node"),
        &[
            "no match for platform",
            "no matching manifest",
            "no image found in manifest list",
            "no image found in image index",
        ],
    ),
    (lasting("its name is not the name of an image"), &["invalid reference format", "must be lowercase"]),
    (
        lasting("what its registry has under this name is not an image"),
        &["unexpected media type", "unsupported media type", "unsupported manifest", "unsupported schema version"],
    ),
    (
        passing("it did not arrive whole"),
        &["commit digest", "size validation", "short read", "extract layer", "unexpected eof"],
    ),
    (
        lasting("its registry wants other credentials, or there is no such image"),
        &["unauthorized", "denied", "forbidden", "insufficient_scope", "authentication required"],
    ),
    (lasting("there is no such image"), &["not found", "manifest unknown", "name unknown", "does not exist"]),
    (lasting("no registry has this name"), &["no such host"]),
    (
        passing("its registry cannot be reached, or does not work at the moment"),
        &[
            "timeout",
            "deadline exceeded",
            "connection refused",
            "connection reset",
            "no route to host",
            "network is unreachable",
            "server misbehaving",
            "eof",
            "internal server error",
            "bad gateway",
            "service unavailable",
            "gateway time-out",
            "registry is unavailable",
        ],
    ),
];

/// What a puller's message means.
pub(super) fn failure(message: &str) -> Failure {
    let words = words(message);
    let known = CAUSES.iter().find(|(_, phrases)| phrases.iter().any(|phrase| words.contains(&format!(" {phrase} "))));
    known.map_or(UNKNOWN, |(failure, _)| *failure)
}

/// A message's words in small letters, with a space around each. Left out is what others chose: names of images and
/// URLs, and what the registry said.
fn words(message: &str) -> String {
    let lower = message.to_lowercase();
    let own = lower.split_once("server message:").map_or(&*lower, |(own, _)| own);
    let mut words = " ".to_owned();
    for word in own.split_whitespace() {
        // "i/o timeout" is the one phrase with a slash.
        if !word.contains('/') {
            words.push_str(word.trim_matches(|letter: char| !letter.is_alphanumeric()));
            words.push(' ');
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As containerd 1.7 and 2.1 (and CRI-O, where it says so) have the kubelet say it.
    #[test]
    fn every_known_cause_is_recognised_and_final_where_no_try_will_help() {
        const PULL: &str = "failed to pull and unpack image \"r.example/team/denied:not-found\": failed to resolve \
            reference \"r.example/team/denied:not-found\": ";
        for (message, cause, is_final) in [
            ("rpc error: code = NotFound desc = $r.example/team/denied:not-found: not found", "no such image", true),
            (
                "rpc error: code = Unknown desc = $unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 404 Not Found",
                "no such image",
                true,
            ),
            ("reading manifest 1 in r.example/team/a: manifest unknown", "no such image", true), // CRI-O
            (
                "$pull access denied, repository does not exist or may require authorization: server message: insufficient_scope: authorization failed",
                "other credentials",
                true,
            ),
            (
                "$failed to authorize: failed to fetch anonymous token: unexpected status from GET request to https://r.example/token?scope=a: 401 Unauthorized",
                "other credentials",
                true,
            ),
            (
                "$unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 403 Forbidden",
                "other credentials",
                true,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": dial tcp: lookup r.example on 10.96.0.10:53: no such host",
                "no registry has this name",
                true,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": dial tcp 192.0.2.1:443: i/o timeout",
                "cannot be reached",
                false,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": dial tcp 192.0.2.1:443: connect: connection refused",
                "cannot be reached",
                false,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": net/http: TLS handshake timeout",
                "cannot be reached",
                false,
            ),
            ("$failed to do request: Head \"https://r.example/v2/a/manifests/1\": EOF", "cannot be reached", false),
            (
                "$unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 503 Service Unavailable",
                "does not work",
                false,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": tls: failed to verify certificate: x509: certificate signed by unknown authority",
                "certificate",
                false,
            ),
            (
                "$failed to do request: Head \"https://r.example/v2/a/manifests/1\": http: server gave HTTP response to HTTPS client",
                "HTTPS",
                false,
            ),
            (
                "$unexpected status from HEAD request to https://r.example/v2/a/manifests/1: 429 Too Many Requests - Server message: toomanyrequests: You have reached your unauthenticated pull rate limit",
                "no more pulls",
                false,
            ),
            ("pull QPS exceeded", "no more pulls", false), // the kubelet itself
            (
                "rpc error: code = NotFound desc = failed to pull and unpack image \"r.example/team/a:1\": no match for platform in manifest: not found",
                "platform",
                true,
            ),
            (
                "rpc error: code = NotFound desc = failed to pull and unpack image \"r.example/team/a:1\": unexpected media type text/html for sha256:00: not found",
                "not an image",
                true,
            ),
            (
                "failed to pull and unpack image \"r.example/team/a:1\": failed to extract layer sha256:00: write /var/lib/a: no space left on device: unknown",
                "no space",
                false,
            ),
            (
                "failed to pull and unpack image \"r.example/team/a:1\": failed commit on ref \"layer-sha256:00\": unexpected commit digest sha256:01, expected sha256:00: failed precondition",
                "whole",
                false,
            ),
            ("$something that nobody has seen before", "kubectl", false),
        ] {
            let message = message.replace('$', PULL);
            let found = failure(&message);
            assert!(found.cause.contains(cause) && found.is_final == is_final, "{message}: {found:?}");
        }
    }

    #[test]
    fn neither_names_nor_what_a_registry_says_decide() {
        let refused = "failed to do request: Head \"https://r.example/v2/a\": connection refused";
        let here = failure(refused);
        for name in ["unauthorized.example/a:1", "r.example/denied:1", "r.example/not-found"] {
            assert_eq!(failure(&format!("failed to resolve reference \"{name}\": {refused}")), here);
        }
        assert_eq!(failure("lookup denied.example on 10.96.0.10:53: server misbehaving"), here);
        let said = "unexpected status: 503 Service Unavailable - Server message: denied: \u{1b}[31mcall 555";
        assert_eq!(failure(said), here);
    }
}
