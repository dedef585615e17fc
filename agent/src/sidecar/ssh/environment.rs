//! Which variables an SSH client may set.

/// The longest name and value, in bytes.
const LONGEST_NAME: usize = 128;
const LONGEST_VALUE: usize = 32 << 10;

/// Variables that change whose shell it is, or what a shell or the loader runs before anything was asked for.
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

/// Whether a client may set a variable: an ordinary name, not ours, not the loader's, not a search path.
pub(super) fn may_set(name: &str, value: &str) -> bool {
    let ordinary = name.len() <= LONGEST_NAME
        && name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    ordinary
        && value.len() <= LONGEST_VALUE
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
        assert!(!may_set("LANG", &"x".repeat(LONGEST_VALUE + 1)));
    }
}
