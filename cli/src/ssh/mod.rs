//! The built-in SSH client. It runs over the daemon's stream, needs nothing installed, and verifies the host without
//! asking the user.
//!
//! [`verify`] decides whether the host is the weaver; [`session`] runs a shell or a command on it.

mod session;
mod verify;

pub(crate) use self::session::{Remote, run};

/// Quotes words for a POSIX shell.
pub(crate) fn quote(words: &[String]) -> String {
    let quoted = words.iter().map(|word| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./=:,@%+".contains(&byte);
        if !word.is_empty() && word.bytes().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_are_what_a_shell_reads() {
        let words = ["a b", "c'd", "$HOME", "", "plain-1.0", "*", "new\nline"].map(ToOwned::to_owned);
        let script = format!("printf '%s|' {}", quote(&words));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "a b|c'd|$HOME||plain-1.0|*|new\nline|");
    }
}
