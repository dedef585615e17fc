//! `-e NAME=VALUE`, and `-e NAME` for a value that stays out of the command line.

use std::{collections::BTreeMap, env, str::FromStr};

use loom_api::Secret;

use crate::{error::CliError, output};

/// Words in a variable's name that suggest a secret value.
const SECRET_WORDS: [&str; 8] = ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "APIKEY", "CREDENTIALS", "CREDENTIAL"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnvArg {
    name: String,
    /// From the command line; without one it is taken from this process's environment.
    value: Option<Secret>,
}

impl FromStr for EnvArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned().into())),
            None => (text, None),
        };
        if name.is_empty() {
            return Err("expected NAME=VALUE, or NAME to take the value from the environment".to_owned());
        }
        Ok(Self { name: name.to_owned(), value })
    }
}

impl EnvArg {
    /// Whether a secret seems to be on the command line, where every process on the machine can read it.
    fn exposes_secret(&self) -> bool {
        self.value.is_some()
            && self
                .name
                .split(['_', '-'])
                .any(|word| SECRET_WORDS.iter().any(|secret| word.eq_ignore_ascii_case(secret)))
    }
}

/// All variables with their values. Warns about secrets on the command line.
///
/// # Errors
///
/// When a value is to come from the environment but is not set there.
pub(crate) fn collect(args: &[EnvArg]) -> Result<BTreeMap<String, Secret>, CliError> {
    let mut all = BTreeMap::new();
    for arg in args {
        if arg.exposes_secret() {
            let name = &arg.name;
            output::warning(&format!(
                "the value of {name} is on the command line, visible to other programs and in the shell's history; \
                 use `-e {name}` to take it from the environment"
            ));
        }
        let value = match &arg.value {
            Some(value) => value.clone(),
            None => env::var(&arg.name).map(Secret::from).map_err(|_| {
                CliError::usage(format!(
                    "cannot set {0}: `-e {0}` takes its value from the environment, but it is not set there",
                    arg.name
                ))
            })?,
        };
        all.insert(arg.name.clone(), value);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_hold_anything_and_a_name_may_stand_alone() {
        let parsed: EnvArg = "A=b=c d".parse().expect("parses");
        assert_eq!(parsed, EnvArg { name: "A".into(), value: Some("b=c d".to_owned().into()) });
        assert_eq!("A".parse(), Ok(EnvArg { name: "A".into(), value: None }));
        assert!("=x".parse::<EnvArg>().is_err());
    }

    #[test]
    fn names_that_suggest_a_secret_cause_a_warning() {
        for (text, shown) in [
            ("GITHUB_TOKEN=x", true),
            ("api_key=x", true),
            ("AWS_SECRET_ACCESS_KEY=x", true),
            ("KEYBOARD=x", false),
            ("COLOUR=green", false),
            ("GITHUB_TOKEN", false),
        ] {
            assert_eq!(text.parse::<EnvArg>().expect("parses").exposes_secret(), shown, "{text}");
        }
    }
}
