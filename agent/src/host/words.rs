//! Shell commands that need no shell: words and quotes, and nothing that a shell would act on (POSIX XCU 2.2 and 2.3).

/// Characters that mean something to a shell where they are not quoted.
const SPECIAL: &str = "|&;<>()$`*?[]#~=%!{}\n";

/// The words of a command line, unless a shell would do more with it than find them.
pub(super) fn plain(line: &str) -> Option<Vec<String>> {
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
    // The one builtin whose work is done by leaving it out.
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
            plain("/bin/echo  'a b' \"c d\" e\\ f '' --x=y").unwrap(),
            ["/bin/echo", "a b", "c d", "e f", "", "--x=y"]
        );
        assert_eq!(plain("exec 'ls' -l").unwrap(), ["ls", "-l"]);
        assert_eq!(plain(r"printf 'it'\''s $5'").unwrap(), ["printf", "it's $5"]);
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
            assert_eq!(plain(line), None, "{line:?}");
        }
    }
}
