//! The root file system of a local weaver: the machine's system directories read-only, everything else its own.
//!
//! It is built on a tmpfs at `DIR/root`, in a mount namespace of the weaver's, so nothing of it is seen outside and all
//! of it goes with the last process. Directories that are not listed here do not exist inside, other people's homes
//! above all.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context as _, Result};
use rustix::{
    mount::{
        MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change,
        mount_remount, unmount,
    },
    process::{chdir, pivot_root},
};

/// The user and group of a weaver's processes, as they see themselves.
pub(super) const INNER_ID: u32 = 1000;

/// System directories, as far as the machine has them: programs and their libraries and settings, nobody's data.
const SYSTEM: [&str; 9] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt", "nix"];
/// Where the machine's `/etc` is shown.
const MACHINE_ETC: &str = "loom/etc";
/// The files in `/etc` that are the weaver's own.
const ACCOUNTS: [&str; 2] = ["passwd", "group"];
/// Devices that harm nobody.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// The weaver's own directories: where they are kept, and where they appear.
const BIND_MOUNTS: [(&str, &str); 3] = [("workspace", "workspace"), ("home", "home/loom"), ("run", "loom/run")];
/// Temporary directories, and what each may hold.
const TMPFS_MOUNTS: [(&str, &str); 4] = [
    ("tmp", "mode=1777,size=2g"),
    ("run", "mode=755,size=64m"),
    ("var/tmp", "mode=1777,size=2g"),
    ("dev/shm", "mode=1777,size=512m"),
];

/// Builds the root in the current directory, and makes it ours. With `own_processes` we are PID 1 of a PID namespace.
///
/// # Errors
///
/// Names the mount that this machine refuses.
pub(super) fn enter(own_processes: bool) -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("leaving mount propagation")?;
    let root = Path::new("root");
    mount("tmpfs", root, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=755,size=16m").context("the root")?;
    system_directories(root)?;
    settings(root)?;
    for (directory, options) in TMPFS_MOUNTS {
        let at = root.join(directory);
        fs::create_dir_all(&at)?;
        let options = std::ffi::CString::new(options)?;
        mount("tmpfs", &at, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())
            .with_context(|| format!("/{directory}"))?;
    }
    for (kept, appears) in BIND_MOUNTS {
        let at = root.join(appears);
        fs::create_dir_all(&at)?;
        mount_bind(kept, &at).with_context(|| format!("/{appears}"))?;
    }
    devices(root)?;
    processes(root, own_processes)?;
    bind_read_only("bin", &root.join("loom/bin"))?;
    switch_to(root)
}

fn system_directories(root: &Path) -> Result<()> {
    for name in SYSTEM {
        let (source, at) = (Path::new("/").join(name), root.join(name));
        let Ok(kind) = fs::symlink_metadata(&source) else { continue };
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &at)?;
        } else if kind.is_dir() {
            bind_read_only(&source, &at)?;
        }
    }
    fs::create_dir_all(root.join("var/lib"))?;
    symlink("../run", root.join("var/run")).context("/var/run")
}

/// An `/etc` of the weaver's own that shows the machine's. Nothing is mounted over a file of the machine's, because such
/// a mount goes when the machine replaces the file (rename(2)).
fn settings(root: &Path) -> Result<()> {
    let etc = root.join("etc");
    fs::create_dir(&etc)?;
    bind_read_only("/etc", &root.join(MACHINE_ETC))?;
    for entry in fs::read_dir("/etc").context("reading /etc")? {
        let entry = entry?;
        let (kind, at) = (entry.file_type()?, etc.join(entry.file_name()));
        if ACCOUNTS.iter().any(|name| entry.file_name() == *name) {
            continue;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &at)?;
        } else if kind.is_dir() {
            bind_read_only(entry.path(), &at)?;
        } else if kind.is_file() {
            // A link, so that what the machine changes later is seen.
            symlink(Path::new("..").join(MACHINE_ETC).join(entry.file_name()), &at)?;
        }
    }
    accounts(&etc)
}

/// Programs ask for the name and home of uid 1000.
fn accounts(etc: &Path) -> Result<()> {
    let shell = if Path::new("/bin/bash").exists() { "/bin/bash" } else { "/bin/sh" };
    let passwd = format!(
        "root:x:0:0:root:/root:/usr/sbin/nologin\nloom:x:{INNER_ID}:{INNER_ID}:Loom:/home/loom:{shell}\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    );
    let group = format!("root:x:0:\nloom:x:{INNER_ID}:\nnogroup:x:65534:\n");
    let [passwd_name, group_name] = ACCOUNTS;
    fs::write(etc.join(passwd_name), passwd)?;
    Ok(fs::write(etc.join(group_name), group)?)
}

fn devices(root: &Path) -> Result<()> {
    let dev = root.join("dev");
    for name in DEVICES {
        let at = dev.join(name);
        fs::write(&at, "")?;
        mount_bind(Path::new("/dev").join(name), &at).with_context(|| format!("/dev/{name}"))?;
    }
    let terminals = dev.join("pts");
    fs::create_dir(&terminals)?;
    mount(
        "devpts",
        &terminals,
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        c"newinstance,ptmxmode=0666,mode=620",
    )
    .context("/dev/pts")?;
    for (link, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, dev.join(link))?;
    }
    Ok(())
}

fn processes(root: &Path, own: bool) -> Result<()> {
    let at = root.join("proc");
    fs::create_dir(&at)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Inside another container the kernel may refuse a new one, as long as the container's own hides parts of itself.
    if !own || mount("proc", &at, "proc", flags, c"").is_err() {
        mount_bind_recursive("/proc", &at).context("/proc")?;
    }
    Ok(())
}

/// Shows a directory with all that is mounted below it, for reading only.
fn bind_read_only(source: impl AsRef<Path>, at: &Path) -> Result<()> {
    let source = source.as_ref();
    fs::create_dir_all(at)?;
    mount_bind_recursive(source, at).with_context(|| format!("showing {}", source.display()))?;
    for mounted in mounts_below(at)? {
        // Flags that the machine has set are locked inside a user namespace, so they must be named again.
        let locked = locked_flags(&mounted)?;
        mount_remount(&mounted, MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | locked, c"")
            .with_context(|| format!("making {} read-only", mounted.display()))?;
    }
    Ok(())
}

/// The mount points at and below a path, from the kernel's own list (proc(5)). They are relative, because the weaver's
/// user need not be able to enter the directories above ours.
fn mounts_below(at: &Path) -> Result<Vec<std::path::PathBuf>> {
    let here = std::env::current_dir()?;
    let list = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(list
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter_map(|path| Some(Path::new(&path.replace("\\040", " ")).strip_prefix(&here).ok()?.to_owned()))
        .filter(|path| path.starts_with(at))
        .collect())
}

fn locked_flags(at: &Path) -> Result<MountFlags> {
    use rustix::fs::{StatVfsMountFlags, statvfs};
    let set = statvfs(at)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    Ok(pairs.into_iter().filter(|(is, _)| set.contains(*is)).fold(MountFlags::empty(), |flags, (_, flag)| flags | flag))
}

/// Makes `root` the root, and lets go of the old one.
fn switch_to(root: &Path) -> Result<()> {
    chdir(root)?;
    pivot_root(".", ".").context("changing the root")?;
    unmount(".", UnmountFlags::DETACH).context("letting go of the machine's root")?;
    chdir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV, c"")
        .context("making the root read-only")?;
    Ok(())
}
