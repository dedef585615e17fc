//! Which variables an SSH client may set.

/// In bytes.
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 32 << 10;

/// Variables that change the user's identity, or make a shell or the loader run something else first.
const REFUSED: [&str; 18] = [
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "IFS",
    "ENV",
    "BASH_ENV",
    "BASHOPTS",
    "SHELLOPTS",
    "PROMPT_COMMAND",
    "PS4",
    "PERL5LIB",
    "PERL5OPT",
    "PYTHONSTARTUP",
    "PYTHONHOME",
    "RUBYOPT",
    "RUBYLIB",
    "GLIBC_TUNABLES",
];

/// Whether a client may set a variable: it must not be one of ours, of the loader's, or a search path.
pub(super) fn may_set(name: &str, value: &str) -> bool {
    let ordinary = name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    ordinary
        && value.len() <= MAX_VALUE
        && !value.contains('\0')
        && !["LD_", "DYLD_", "LOOM_", "BASH_FUNC_"].iter().any(|prefix| name.starts_with(prefix))
        && !name.ends_with("PATH")
        && !REFUSED.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_variables_pass() {
        for name in ["LANG", "LC_ALL", "COLORTERM", "EDITOR", "GIT_AUTHOR_NAME", "_x1", "TZ"] {
            assert!(may_set(name, "value"), "{name}");
        }
    }

    #[test]
    fn dangerous_variables_are_refused() {
        for name in ["LD_PRELOAD", "LOOM_USER", "PATH", "PYTHONPATH", "BASH_ENV", "HOME", "BASH_FUNC_x", "GCONV_PATH"] {
            assert!(!may_set(name, "value"), "{name}");
        }
        for name in ["", "1A", "A=B", "A B", "Ä", "BASH_FUNC_ls%%"] {
            assert!(!may_set(name, "value"), "{name}");
        }
        assert!(!may_set("LANG", "a\0b"));
        assert!(!may_set("LANG", &"x".repeat(MAX_VALUE + 1)));
    }
}
