//! What a new process does between fork and exec. This needs unsafe code: only `pre_exec` can do it.

#![allow(unsafe_code)]

use std::{io, os::unix::process::CommandExt as _, process::Command};

use rustix::process::{ioctl_tiocsctty, setsid};

/// The highest signal number on Linux (signal(7)).
const LAST_SIGNAL: libc::c_int = 64;

/// Makes the command's process the leader of a new session and process group, with default signal handling and no
/// descriptors but the standard three. With `terminal`, its standard input becomes the session's controlling terminal.
pub(super) fn into_own_session(command: &mut Command, terminal: bool) {
    let prepare = move || -> io::Result<()> {
        setsid()?;
        if terminal {
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        for signal in 1..=LAST_SIGNAL {
            // SAFETY: sets the default action of a signal; fails without effect for a number that allows none.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        // Marks instead of closing them, because the standard library's pipe, which reports a failed exec, is among
        // them. A kernel without the call leaves only descriptors that the host's parent did not mark; all of ours are
        // marked already. SAFETY: a system call with numbers as arguments.
        let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        Ok(())
    };
    // SAFETY: the closure runs in the forked child of a process that may have several threads, so it may only make
    // async-signal-safe calls: setsid, ioctl, signal and close_range are system calls, nothing allocates or takes a
    // lock.
    unsafe { command.pre_exec(prepare) };
}
