//! The table of processes that somebody waits for, and the one place that reaps.
//!
//! PID 1 inherits every orphan, so there is a single `waitpid(-1)` loop, run at every `SIGCHLD`, and no other wait in
//! the process. The table's lock is held over each spawn: a child that ends at once is reaped only after it stands in
//! the table, and the standard library's own wait for a child whose exec failed cannot meet ours.

use std::{collections::HashMap, io, process::Command};

use parking_lot::{Mutex, MutexGuard};
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process_group, wait},
};
use tokio::sync::oneshot;

use crate::protocol::ExitStatus;

/// The processes that were spawned here and not reaped yet.
#[derive(Debug, Default)]
pub(super) struct Children {
    alive: Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>,
}

/// A process that was spawned. It leads a session and a process group of its own.
#[derive(Debug)]
pub(super) struct Child {
    /// The process's id, which is also its group's.
    pub(super) pid: Pid,
    /// How it ended; given once, when it was reaped.
    pub(super) exit: oneshot::Receiver<ExitStatus>,
}

impl Children {
    /// Spawns a process and puts it into the table.
    ///
    /// # Errors
    ///
    /// Those of fork and exec.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let mut alive = self.lock();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (sender, exit) = oneshot::channel();
        alive.insert(pid, sender);
        Ok(Child { pid, exit })
    }

    /// Reaps everything that has ended, ours and orphans.
    pub(super) fn reap(&self) {
        let mut alive = self.lock();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(waiting) = alive.remove(&pid) {
                        // Nobody may be waiting any more: a session that was hung up on.
                        let _ = waiting.send(exit_status(status));
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Signals the process group of a process, unless the process was reaped: its number may be another's by then.
    pub(super) fn signal_group(&self, leader: Pid, signal: Signal) {
        if self.lock().contains_key(&leader) {
            // The group may have died this instant.
            let _ = kill_process_group(leader, signal);
        }
    }

    /// Kills everything: as PID 1 every process there is, otherwise the groups of those in the table.
    pub(super) fn kill_all(&self) {
        if getpid() == Pid::INIT {
            // "Group 1" is kill(-1): every process but the caller itself (kill(2)).
            let _ = kill_process_group(Pid::INIT, Signal::KILL);
        } else {
            for leader in self.lock().keys() {
                let _ = kill_process_group(*leader, Signal::KILL);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pid, oneshot::Sender<ExitStatus>>> {
        self.alive.lock()
    }
}

/// Signals with the names that SSH gives them (RFC 4254 §6.10), and the further ones without their `SIG`.
const SIGNALS: [(&str, Signal); 22] = [
    ("ABRT", Signal::ABORT),
    ("ALRM", Signal::ALARM),
    ("FPE", Signal::FPE),
    ("HUP", Signal::HUP),
    ("ILL", Signal::ILL),
    ("INT", Signal::INT),
    ("KILL", Signal::KILL),
    ("PIPE", Signal::PIPE),
    ("QUIT", Signal::QUIT),
    ("SEGV", Signal::SEGV),
    ("TERM", Signal::TERM),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("BUS", Signal::BUS),
    ("CONT", Signal::CONT),
    ("STOP", Signal::STOP),
    ("TSTP", Signal::TSTP),
    ("TRAP", Signal::TRAP),
    ("WINCH", Signal::WINCH),
    ("SYS", Signal::SYS),
    ("XCPU", Signal::XCPU),
    ("XFSZ", Signal::XFSZ),
];

/// The signal of that name.
pub(super) fn signal_named(name: &str) -> Option<Signal> {
    SIGNALS.iter().find(|(known, _)| *known == name).map(|(_, signal)| *signal)
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    let Some(number) = status.terminating_signal() else {
        return ExitStatus { code: status.exit_status().unwrap_or(255), signal: None, core_dumped: false };
    };
    let name = SIGNALS.iter().find(|(_, signal)| signal.as_raw() == number).map(|(name, _)| *name);
    ExitStatus {
        code: 128 + number,
        signal: Some(name.map_or_else(|| format!("{number}@loom"), str::to_owned)),
        // WCOREDUMP of wait(2).
        core_dumped: status.as_raw() & 0x80 != 0,
    }
}
