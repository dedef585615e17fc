//! What a registry asks for when it answers 401: the `WWW-Authenticate` header (RFC 9110 §11.6.1).

use std::collections::HashMap;

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// The ways of proving who one is that registries use.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password.
    Basic,
    /// A token, from the server at `realm`.
    Bearer { realm: String, service: Option<String> },
}

impl Challenge {
    /// The first challenge that is understood.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        headers.get_all(WWW_AUTHENTICATE).iter().find_map(|value| Self::parse(value.to_str().ok()?))
    }

    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut parameters = parameters(rest)?;
        Some(Self::Bearer { realm: parameters.remove("realm")?, service: parameters.remove("service") })
    }
}

/// Reads `name="value", name=value`; values in quotes may hold commas.
fn parameters(mut rest: &str) -> Option<HashMap<String, String>> {
    let mut found = HashMap::new();
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        if rest.is_empty() {
            return Some(found);
        }
        let (name, after) = rest.split_once('=')?;
        let value;
        (value, rest) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_server_is_found_among_the_parameters() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer { realm: realm.to_owned(), service: service.map(str::to_owned) })
        };
        assert_eq!(
            Challenge::parse(
                r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a:pull,push""#
            ),
            bearer("https://auth.example/token", Some("r.example"))
        );
        assert_eq!(
            Challenge::parse("bearer scope=\"a,b\", Realm=https://t.example"),
            bearer("https://t.example", None)
        );
        assert_eq!(Challenge::parse("Basic realm=\"loom\""), Some(Challenge::Basic));
        assert_eq!(Challenge::parse("Basic"), Some(Challenge::Basic));
    }

    #[test]
    fn what_is_not_understood_is_no_challenge() {
        for text in ["", "Negotiate", "Bearer", "Bearer service=\"a\"", "Bearer realm=\"https://open.example"] {
            assert_eq!(Challenge::parse(text), None, "{text}");
        }
    }
}
