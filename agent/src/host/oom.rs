//! Whether the kernel has killed one of our processes for lack of memory.

use std::fs;

/// The container's cgroup, v2 (kernel's cgroup-v2.rst, `memory.events`), then v1 (`memory.oom_control`). Both files have
/// a line `oom_kill N`.
const FILES: [&str; 2] = ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"];

/// The number of processes killed so far; zero if the kernel does not say.
pub(super) fn kills() -> u64 {
    FILES.iter().find_map(|file| count(&fs::read_to_string(file).ok()?)).unwrap_or(0)
}

fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_have_the_line() {
        assert_eq!(count("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"), Some(1));
        assert_eq!(count("oom_kill_disable 0\n"), None);
    }
}
