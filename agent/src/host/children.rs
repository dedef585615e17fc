//! The table of child processes, and the only place that reaps.
//!
//! PID 1 inherits every orphan, so there is a single `waitpid(-1)` loop, run at every `SIGCHLD`, and no other wait in
//! the process. The table's lock is held during each spawn: a child that exits at once is reaped only after it is in the
//! table, and the standard library's wait for a child whose exec failed cannot race with ours.

use std::{collections::HashMap, io, process::Command};

use parking_lot::{Mutex, MutexGuard};
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process_group, wait},
};
use tokio::sync::oneshot;

use crate::protocol::ExitStatus;

/// The processes that were spawned and not reaped yet.
#[derive(Debug, Default)]
pub(super) struct Children {
    alive: Mutex<HashMap<Pid, oneshot::Sender<ExitStatus>>>,
}

/// A spawned process. It leads a session and a process group of its own.
#[derive(Debug)]
pub(super) struct Child {
    /// Also the id of its process group.
    pub(super) pid: Pid,
    /// Resolves when the process was reaped.
    pub(super) exit: oneshot::Receiver<ExitStatus>,
}

impl Children {
    /// Spawns a process and adds it to the table.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let mut alive = self.lock();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (sender, exit) = oneshot::channel();
        alive.insert(pid, sender);
        Ok(Child { pid, exit })
    }

    /// Reaps all processes that have ended, including orphans.
    pub(super) fn reap(&self) {
        let mut alive = self.lock();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(waiting) = alive.remove(&pid) {
                        // The receiver is gone if the session's client has disconnected.
                        let _ = waiting.send(exit_status(status));
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Signals a process's group, unless the process was reaped: its id may have been reused by then.
    pub(super) fn signal_group(&self, leader: Pid, signal: Signal) {
        if self.lock().contains_key(&leader) {
            // The group may have ended just now.
            let _ = kill_process_group(leader, signal);
        }
    }

    /// Kills everything: as PID 1 all processes, otherwise the groups of those in the table.
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

/// Signals by their names in SSH (RFC 4254 §6.10), and others by their names without `SIG`.
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
