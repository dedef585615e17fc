//! Finds processes in `/proc` that belong to a directory: those whose environment, arguments, mounts or working directory
//! name it.

use std::{fs, path::Path};

use rustix::process::{Pid, Signal, kill_process};

/// A process on this machine.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    pub arguments: Vec<String>,
}

impl Process {
    /// Whether an argument, or the program's file name, is `word`.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        self.arguments.iter().any(|argument| argument.rsplit('/').next() == Some(word))
    }

    /// Sends SIGKILL.
    pub fn kill(&self) {
        signal(self.pid, Signal::KILL);
    }
}

/// Sends a signal; ignores that the process is gone.
pub fn signal(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether this process runs as root.
#[must_use]
pub fn am_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The resident memory of a process, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    pub resident: u64,
    pub peak: u64,
    /// Of what is resident now, all but files and memory shared with others.
    pub private: u64,
}

/// The memory of a process; `None` if it is gone.
#[must_use]
pub fn memory(pid: i32) -> Option<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let bytes = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some(Memory { resident: bytes("VmRSS:")?, peak: bytes("VmHWM:")?, private: bytes("RssAnon:")? })
}

/// The fields of a process's `stat` (proc(5)) from the third, its state, on; `None` if it is gone.
#[must_use]
pub fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may contain any character.
    Some(stat.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect())
}

/// All live processes but this one.
#[must_use]
pub fn all() -> Vec<Process> {
    live(|_, _| true)
}

/// All live processes that name `directory` in their arguments or environment, have mounts from it, or work in it.
#[must_use]
pub fn belonging_to(directory: &Path) -> Vec<Process> {
    let needle = directory.to_string_lossy().into_owned();
    live(|pid, arguments| {
        let works_there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|current| current.starts_with(directory));
        works_there
            || arguments.iter().any(|argument| argument.contains(&needle))
            || ["environ", "mountinfo"].iter().any(|name| read(pid, name).contains(needle.as_str()))
    })
}

/// All live processes that have the variable, given as `NAME=VALUE`, in their environment.
#[must_use]
pub fn with_variable(variable: &str) -> Vec<Process> {
    live(|pid, _| read(pid, "environ").split('\0').any(|own| own == variable))
}

fn live(mut wanted: impl FnMut(i32, &[String]) -> bool) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let own = std::process::id().cast_signed();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter_map(|pid| {
            let arguments = read(pid, "cmdline");
            if arguments.is_empty() {
                return None; // a kernel thread, or a zombie that waits for its parent
            }
            let arguments: Vec<String> = arguments.split('\0').map(str::to_owned).collect();
            wanted(pid, &arguments).then_some(Process { pid, arguments })
        })
        .collect()
}

fn read(pid: i32, name: &str) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default()).into_owned()
}
