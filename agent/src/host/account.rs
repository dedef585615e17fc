//! The user's entry in `/etc/passwd`. A static binary has no NSS, and an image may not have the file.

use std::{fs, io::Read as _};

/// In bytes; the rest of a larger file is ignored.
const MAX_SIZE: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) home: String,
    pub(super) shell: String,
}

impl Account {
    /// The entry of the user with this id (passwd(5)), if the image has one.
    pub(super) fn of(uid: u32) -> Option<Self> {
        let mut text = Vec::new();
        fs::File::open("/etc/passwd").ok()?.take(MAX_SIZE).read_to_end(&mut text).ok()?;
        Self::find(&String::from_utf8_lossy(&text), uid)
    }

    fn find(passwd: &str, uid: u32) -> Option<Self> {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let number = fields.nth(1)?;
            if number.parse() != Ok(uid) {
                return None;
            }
            let (_group, _comment) = (fields.next()?, fields.next()?);
            let home = fields.next()?;
            let shell = fields.next().unwrap_or_default();
            Some(Self { name: name.to_owned(), home: home.to_owned(), shell: shell.to_owned() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_entry_among_odd_lines() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\n\n# note\nbroken\n+::::::\nloom:x:1000:1000::/home/loom:/bin/zsh\nbare:x:7:7::/";
        let loom = Account::find(passwd, 1000).unwrap();
        assert_eq!((loom.name.as_str(), loom.home.as_str(), loom.shell.as_str()), ("loom", "/home/loom", "/bin/zsh"));
        assert_eq!(Account::find(passwd, 7).unwrap().shell, "");
        assert_eq!(Account::find(passwd, 4711), None);
    }
}
