//! Namespaces for a weaver's processes, and the few system calls for which Rust has no safe form.
//!
//! The stage `loom-server local-init` runs in a process of its own with a single thread: it leaves the machine's
//! namespaces, waits until the supervisor outside has mapped its user, forks the process that becomes PID 1 inside, and
//! waits for that.
//!
//! Unsafe here: `fork` (sound because the stage and the supervisor are single-threaded when they call it), `unshare`
//! with flags that do not concern memory or descriptors, `pre_exec` with a closure that makes one system call, and the
//! `ioctl` that brings an interface up, whose argument is a plain structure of the kernel's layout; and the
//! registration of an owned descriptor with the reactor.
#![allow(unsafe_code, reason = "system calls without a safe form; each use says why it is sound")]

use std::{
    convert::Infallible,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    pipe::PipeFlags,
    process::{Pid, Signal, WaitOptions, kill_process, set_parent_process_death_signal, waitpid},
    thread::{
        UnshareFlags, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
    },
};

use tokio::io::{Interest, unix::AsyncFd};

use super::{
    LocalSpec,
    rootfs::{self, INNER_ID},
};

/// The first word of the stage: it is in a user namespace, and its user is to be mapped.
pub(super) const NEEDS_MAPPING: u8 = b'm';
/// The first word of the stage: this machine allows no user namespace, so nothing is isolated.
pub(super) const NOT_ISOLATED: u8 = b'n';

/// The namespaces besides the user's, each with what is missing without it.
const KINDS: [(UnshareFlags, &str); 5] = [
    (UnshareFlags::NEWNS, "file systems are not isolated: this machine allows no mount namespace"),
    (UnshareFlags::NEWPID, "processes are not isolated: this machine allows no PID namespace"),
    (UnshareFlags::NEWIPC, "System V IPC is not isolated: this machine allows no IPC namespace"),
    (UnshareFlags::NEWUTS, "the host name is the machine's: this machine allows no UTS namespace"),
    (UnshareFlags::NEWNET, "the network is not isolated: this machine allows no network namespace"),
];
/// What is missing without a user namespace: everything.
const NO_USER_NAMESPACE: &str = "nothing is isolated: this machine allows no user namespace (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces)";

/// What this machine cannot isolate, found out by trying in a process of its own.
pub(super) async fn probe() -> Result<Vec<String>> {
    let output = tokio::process::Command::new("/proc/self/exe")
        .args(["local-init", "--probe"])
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .await
        .context("trying namespaces")?;
    ensure!(output.status.success(), "trying namespaces: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(ToOwned::to_owned).collect())
}

/// `loom-server local-init`: becomes the weaver's processes, or with `probe` only says what it could not become.
///
/// # Errors
///
/// When the weaver's root cannot be made.
pub(crate) fn init(probe: bool) -> Result<i32> {
    if probe {
        for missing in leave_namespaces(true).missing {
            println!("{missing}");
        }
        return Ok(0);
    }
    let spec: LocalSpec = serde_json::from_slice(&fs::read("spec.json")?).context("spec.json")?;
    if spec.uid.is_some() {
        set_thread_groups(&[]).context("leaving the supplementary groups")?;
    }
    let namespaces = leave_namespaces(spec.isolated_network);
    let mut stdout = std::io::stdout();
    stdout.write_all(&[if namespaces.user { NEEDS_MAPPING } else { NOT_ISOLATED }])?;
    stdout.flush()?;
    std::io::stdin().read_exact(&mut [0]).context("the supervisor has gone")?;
    become_weaver_user(&spec, namespaces.user)?;
    if namespaces.has(UnshareFlags::NEWNET) {
        bring_loopback_up().context("the weaver's loopback interface")?;
    }
    if namespaces.has(UnshareFlags::NEWUTS) {
        rustix::system::sethostname(spec.weaver.pod_name().as_bytes()).context("the weaver's host name")?;
    }
    // Closed when the host is executed.
    let (report, failure) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context("a pipe")?;
    let Some(child) = fork()? else {
        let Err(error) = host(&spec, &namespaces);
        write!(fs::File::from(failure), "{error:#}")?;
        return Err(error);
    };
    drop(failure);
    // The second word: the host's pid, and why it could not be executed, if that is so.
    stdout.write_all(&child.as_raw_pid().to_ne_bytes())?;
    std::io::copy(&mut fs::File::from(report), &mut stdout)?;
    stdout.flush()?;
    rustix::stdio::dup2_stdout(fs::File::open("/dev/null")?)?;
    wait_and_forward(child)
}

/// In the forked process, PID 1 of its namespace: makes the root and becomes the host.
fn host(spec: &LocalSpec, namespaces: &Namespaces) -> Result<Infallible> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut command = if namespaces.has(UnshareFlags::NEWNS) {
        rootfs::enter(namespaces.has(UnshareFlags::NEWPID))?;
        let mut command = std::process::Command::new("/loom/bin/loom-agent");
        command
            .env("LOOM_RUN_DIR", "/loom/run")
            .env("HOME", "/home/loom")
            .env("USER", "loom")
            .current_dir("/workspace");
        command
    } else {
        let here = std::env::current_dir()?;
        let mut command = std::process::Command::new(here.join("bin/loom-agent"));
        command
            .env("LOOM_RUN_DIR", here.join("run"))
            .env("HOME", here.join("home"))
            .current_dir(here.join("workspace"));
        command
    };
    set_no_new_privs(true)?;
    command
        .arg("host")
        .env("LOOM_WEAVER_ID", spec.weaver.to_string())
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(std::io::stderr());
    // A program that is not root's loses all capabilities when it is executed (capabilities(7)).
    Err(anyhow::Error::from(command.exec()).context("executing the host"))
}

/// Waits for PID 1 of the namespace; SIGTERM from the supervisor is passed on to it.
fn wait_and_forward(child: Pid) -> Result<i32> {
    // A runtime only to hear signals; the fork is behind us.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut ended) = (signal(SignalKind::terminate())?, signal(SignalKind::child())?);
        loop {
            if let Some((_, status)) = waitpid(Some(child), WaitOptions::NOHANG)? {
                let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
                return Ok(code.unwrap_or(-1));
            }
            tokio::select! {
                _ = terminate.recv() => drop(kill_process(child, Signal::TERM)),
                _ = ended.recv() => {}
            }
        }
    })
}

/// What namespaces a process has left for its own.
struct Namespaces {
    user: bool,
    own: UnshareFlags,
    missing: Vec<String>,
}

impl Namespaces {
    fn has(&self, kind: UnshareFlags) -> bool {
        self.own.contains(kind)
    }
}

/// Leaves as many of the machine's namespaces as it lets us.
fn leave_namespaces(network: bool) -> Namespaces {
    // SAFETY: the flags concern namespaces only; no memory or descriptor stops being shared.
    let leave = |flags| unsafe { unshare_unsafe(flags) }.is_ok();
    let mut left = Namespaces { user: leave(UnshareFlags::NEWUSER), own: UnshareFlags::empty(), missing: Vec::new() };
    if !left.user {
        left.missing.push(NO_USER_NAMESPACE.to_owned());
        return left;
    }
    for (kind, without) in KINDS {
        if kind == UnshareFlags::NEWNET && !network {
            continue;
        }
        if leave(kind) {
            left.own |= kind;
        } else {
            left.missing.push(without.to_owned());
        }
    }
    left
}

/// Maps the weaver's user and group, seen from inside, to `outer` or to our own (user_namespaces(7)).
pub(super) fn write_mapping(pid: u32, outer: Option<u32>) -> Result<()> {
    let uid = outer.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let gid = outer.unwrap_or_else(|| rustix::process::getegid().as_raw());
    let write = |name: &str, text: String| {
        fs::write(format!("/proc/{pid}/{name}"), text)
            .with_context(|| format!("writing {name} of the weaver's namespace"))
    };
    if outer.is_none() {
        write("setgroups", "deny".to_owned())?;
    }
    write("uid_map", format!("{INNER_ID} {uid} 1"))?;
    write("gid_map", format!("{INNER_ID} {gid} 1"))
}

/// Becomes the user that the weaver's processes run as. Inside a user namespace whose root is not mapped this keeps the
/// capabilities, which are needed until the root file system stands.
fn become_weaver_user(spec: &LocalSpec, user_namespace: bool) -> Result<()> {
    let id = if user_namespace { Some(INNER_ID) } else { spec.uid };
    let Some(id) = id else { return Ok(()) };
    let (uid, gid) = (rustix::process::Uid::from_raw(id), rustix::process::Gid::from_raw(id));
    set_thread_res_gid(gid, gid, gid).context("the weaver's group")?;
    set_thread_res_uid(uid, uid, uid).context("the weaver's user")?;
    // Changing the user has cleared it (prctl(2)).
    set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// Forks; the child's id in the parent, nothing in the child.
pub(super) fn fork() -> Result<Option<Pid>> {
    // SAFETY: every caller is single-threaded, so the child has all of the parent's state and no lock is held by a
    // thread that it lacks.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "forking: {}", std::io::Error::last_os_error());
    Ok(Pid::from_raw(pid))
}

/// Registers a descriptor with the reactor.
pub(super) fn register(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is returned, so it stays open and the same until that is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

/// Has the kernel kill a command's process when ours ends.
pub(super) fn die_with_parent(command: &mut tokio::process::Command) {
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Brings `lo` up in the network namespace that we are in (netdevice(7)).
fn bring_loopback_up() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all bytes zero are a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = libc::c_char::from_ne_bytes([b'l']);
    request.ifr_name[1] = libc::c_char::from_ne_bytes([b'o']);
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(|_| ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is a socket, and the request lives through the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
