//! How users refer to a weaver: by its id, a prefix of it, its name, or any of these as the host name `….loom`.

use crate::error::{CliError, Exit, Result};

/// In bytes. Ids are shorter, and names are DNS labels, at most 63.
const MAX_LENGTH: usize = 100;

/// The reference in the form that the server accepts. Host names may come in lower case (RFC 4343) and end in `.loom`.
///
/// # Errors
///
/// When it cannot name a weaver, and could change the meaning of a URL's path.
pub(crate) fn normalise(reference: &str) -> Result<String> {
    let bare = without_domain(reference);
    let fits =
        (1..=MAX_LENGTH).contains(&bare.len()) && bare.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !fits {
        return Err(CliError::new(Exit::NO_SUCH_WEAVER, format!("there is no weaver {reference:?}"))
            .hint("ids and names have letters, digits and dashes; list your weavers with: loom ps"));
    }
    // An id is a capital letter and lower-case hexadecimal.
    let lower = bare.to_ascii_lowercase();
    Ok(match lower.strip_prefix("w-") {
        Some(uuid) if uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') => format!("W-{uuid}"),
        _ => lower,
    })
}

fn without_domain(reference: &str) -> &str {
    // A host name may end in a dot.
    let host = reference.strip_suffix('.').unwrap_or(reference);
    match host.len().checked_sub(".loom".len()) {
        Some(at) if host.is_char_boundary(at) && host[at..].eq_ignore_ascii_case(".loom") => &host[..at],
        _ => reference,
    }
}

#[cfg(test)]
mod tests {
    use loom_api::WeaverId;

    use super::*;

    #[test]
    fn a_host_name_stands_for_its_weaver() {
        let id = WeaverId::generate();
        for reference in [
            format!("{id}"),
            format!("{id}.loom"),
            format!("{id}.loom").to_lowercase(),
            format!("{id}.LOOM."),
            format!("{id}").to_uppercase(),
        ] {
            assert_eq!(normalise(&reference).unwrap(), id.to_string(), "{reference}");
        }
        assert_eq!(normalise("work.loom").unwrap(), "work");
        assert_eq!(normalise("Work").unwrap(), "work");
        assert_eq!(normalise("w-work").unwrap(), "w-work");
        assert_eq!(normalise("0193F").unwrap(), "0193f");
        assert_eq!(normalise("w-0193f.loom").unwrap(), "W-0193f");
    }

    #[test]
    fn what_would_be_something_else_in_a_path_is_no_weaver() {
        for hostile in
            ["", ".loom", "..", "../../tokens?", "a/b", "a?b", "a#b", "a%2e", "é.loom", "ü", "a b", &"x".repeat(101)]
        {
            let error = normalise(hostile).unwrap_err();
            assert_eq!(error.exit(), Exit::NO_SUCH_WEAVER, "{hostile}");
        }
    }
}
