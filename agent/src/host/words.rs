//! Splits shell commands that consist only of words and quotes, so that no shell is needed (POSIX XCU 2.2 and 2.3).

/// Characters with a meaning to a shell unless quoted.
const SPECIAL: &str = "|&;<>()$`*?[]#~=%!{}\n";

/// The words of a command line; `None` if it needs a shell.
pub(super) fn split(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = line.chars();
    while let Some(character) = rest.next() {
        match character {
            ' ' | '\t' => words.extend(word.take()),
            '\'' => {
                let (quoted, after) = rest.as_str().split_once('\'')?;
                word.get_or_insert_default().push_str(quoted);
                rest = after.chars();
            }
            '"' => {
                let (quoted, after) = rest.as_str().split_once('"')?;
                if quoted.contains(['$', '`', '\\']) {
                    return None;
                }
                word.get_or_insert_default().push_str(quoted);
                rest = after.chars();
            }
            '\\' => word.get_or_insert_default().push(rest.next().filter(|next| *next != '\n')?),
            // Only the first word can be an assignment.
            '=' if !words.is_empty() => word.get_or_insert_default().push('='),
            special if SPECIAL.contains(special) => return None,
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    // The only builtin that can simply be dropped.
    if words.first().is_some_and(|first| first == "exec") {
        words.remove(0);
    }
    (!words.is_empty()).then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_quotes_are_taken_apart() {
        assert_eq!(
            split("/bin/echo  'a b' \"c d\" e\\ f '' --x=y").unwrap(),
            ["/bin/echo", "a b", "c d", "e f", "", "--x=y"]
        );
        assert_eq!(split("exec 'ls' -l").unwrap(), ["ls", "-l"]);
        assert_eq!(split(r"printf 'it'\''s $5'").unwrap(), ["printf", "it's $5"]);
    }

    #[test]
    fn what_a_shell_would_act_on_is_left_to_one() {
        for line in [
            "",
            "  ",
            "exec",
            "a; b",
            "a | b",
            "echo $HOME",
            "echo \"$HOME\"",
            "ls *",
            "A=1 b",
            "a > b",
            "'open",
            "a\nb",
            "a \\",
        ] {
            assert_eq!(split(line), None, "{line:?}");
        }
    }
}
