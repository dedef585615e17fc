//! What a weaver on the local backend cannot do to another, to its own sidecar, or to the machine; and the machine to it.

use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        process::CommandExt as _,
    },
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{
    System, Weaver,
    disk::Disk,
    processes,
    system::{BACKEND, TIMEOUT},
    terminal::Terminal,
};

/// Whether a test for the local backend can run here.
fn can_run(needs_root: bool) -> bool {
    let elsewhere = std::env::var(BACKEND).is_ok_and(|backend| backend != "local");
    !elsewhere && (!needs_root || processes::am_root())
}

/// The user that a weaver's sidecar runs as.
fn user(system: &System, weaver: &Weaver) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{}/status", system.sidecar(weaver)?.pid))?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("a Uid line")?;
    Ok(uids.split_whitespace().next().context("a uid")?.parse()?)
}

fn run_as(user: u32, script: &str) -> Result<Output> {
    Ok(Command::new("sh").args(["-c", script]).uid(user).gid(user).output()?)
}

#[test]
fn a_weaver_cannot_lead_its_sidecar_to_another_weavers_socket() -> Result<()> {
    if !can_run(false) {
        return Ok(());
    }
    let system = System::start()?;
    let victim = system.new_weaver(&[])?;
    system.run(&["exec", &victim.id, "--", "sh", "-c", "echo the-victim > ~/mark"])?;
    let attacker = system.new_weaver(&[])?;
    let socket = system.weaver_directory(&victim).join("run/host.sock");
    // A shell that is open already goes on, and can put things right again.
    let mut shell = Terminal::spawn(&system.loom(&["ssh", &attacker.id]))?;
    shell.send("echo here-$((40+2))\r")?;
    shell.expect("here-42", TIMEOUT)?;
    shell.send(&format!(
        "cd /loom/run && mv host.sock kept && ln -s {} host.sock && echo replaced-$((40+2))\r",
        socket.display()
    ))?;
    shell.expect("replaced-42", TIMEOUT)?;

    let output = system.output(&["exec", &attacker.id, "--", "cat", "/home/loom/mark"])?;
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && !seen.contains("the-victim"), "{output:?}");

    shell.send("rm host.sock && mv kept host.sock && echo restored-$((40+2))\r")?;
    shell.expect("restored-42", TIMEOUT)?;
    assert_eq!(system.run(&["exec", &attacker.id, "--", "echo", "again"])?, "again\n");
    drop(shell);
    system.stop()
}

#[test]
fn each_weaver_runs_as_a_user_of_its_own_who_cannot_enter_anothers_directory() -> Result<()> {
    if !can_run(true) {
        return Ok(());
    }
    let mut system = System::start()?;
    let (one, two) = (system.new_weaver(&[])?, system.new_weaver(&[])?);
    system.stop_server()?;
    system.start_server()?;
    let three = system.new_weaver(&[])?;
    let users = [user(&system, &one)?, user(&system, &two)?, user(&system, &three)?];
    assert!(users[0] != users[1] && users[1] != users[2] && users[0] != users[2] && !users.contains(&0), "{users:?}");

    let directory = system.weaver_directory(&one);
    let enter = |name: &str| format!("ls {}/{name}", directory.display());
    for name in ["", "workspace", "home", "run", "sidecar", "bin", "spec.json"] {
        ensure!(!run_as(users[1], &enter(name))?.status.success(), "the other weaver's user can read {name:?}");
    }
    assert!(run_as(users[0], &enter("workspace"))?.status.success());
    for weaver in [&one, &two, &three] {
        assert_eq!(system.run(&["exec", &weaver.id, "--", "id", "-un"])?, "loom\n");
    }
    system.stop()
}

#[test]
fn weavers_work_below_a_directory_that_only_its_owner_may_enter() -> Result<()> {
    if !can_run(true) {
        return Ok(());
    }
    // As the home directory of root is, where a server started by hand keeps its data.
    let home = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir()?;
    let data = home.path().join("server");
    fs::create_dir(&data)?;
    let system = System::start_in(&data, &[])?;
    let weaver = system.new_weaver(&[])?;
    assert_eq!(system.run(&["exec", &weaver.id, "--", "id", "-un"])?, "loom\n");
    ensure!(!run_as(user(&system, &weaver)?, &format!("ls {}", home.path().display()))?.status.success());
    system.stop()
}

#[test]
fn a_weaver_that_cannot_be_started_says_why() -> Result<()> {
    if !can_run(true) {
        return Ok(());
    }
    let disk = Disk::mount("noexec")?;
    let system = System::start_in(disk.path(), &[])?;
    let output = system.output(&["new", "--no-attach"])?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let reason = "could not be started: executing the host: Permission denied";
    ensure!(!output.status.success() && errors.contains(reason), "{output:?}");
    system.stop()
}

/// A repository with one commit, at a path that the weavers' users can read.
fn make_repository(at: &Path) -> Result<()> {
    let script = "set -e; git init -q -b main .; echo 'from a file' > README; git add README; \
                  git -c user.name=t -c user.email=t@example.org commit -q -m first";
    fs::create_dir_all(at)?;
    let made = Command::new("sh").args(["-c", script]).current_dir(at).status()?;
    ensure!(made.success(), "making a repository");
    Ok(())
}

#[test]
fn file_repositories_are_cloned_only_from_the_directories_that_the_server_offers() -> Result<()> {
    let mut system = System::start()?;
    let (offered, private) = (system.path("offered"), system.path("private"));
    for directory in [&offered, &private] {
        make_repository(&directory.join("project"))?;
    }
    symlink(private.join("project"), offered.join("link"))?;
    let try_to_clone = |system: &System, path: &str| {
        let url = format!("file://{}", system.path(path).display());
        system.output(&["new", "--no-attach", "--name", "cloned", "--repo", &url])
    };
    let refused = |system: &System, path: &str| -> Result<()> {
        let output = try_to_clone(system, path)?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1) && errors.contains("local-repositories"), "{path}: {output:?}");
        Ok(())
    };
    refused(&system, "offered/project")?;
    if can_run(false) {
        system.stop_server()?;
        system.set("LOOM_SERVER_LOCAL_REPOSITORIES", &offered.to_string_lossy());
        system.start_server()?;
        for path in ["private/project", "offered/../private/project", "offered/link", "offered/absent", "offeredx"] {
            refused(&system, path)?;
        }
        let output = try_to_clone(&system, "offered/project")?;
        assert!(output.status.success(), "{output:?}");
        assert_eq!(system.run(&["exec", "cloned", "--", "cat", "README"])?, "from a file\n");
    }
    system.stop()
}

/// Directories with `loom` and a `loom-server` that has a copy of the machine's `/etc`, in a mount namespace of its own.
fn with_own_etc(directory: &Path) -> Result<()> {
    let built = std::env::current_exe()?;
    let built = built.ancestors().nth(2).context("the directory of the binaries")?;
    let copied = Command::new("cp").arg("-a").arg("/etc").arg(directory).status()?;
    ensure!(copied.success(), "copying /etc");
    for name in ["loom", "loom-agent"] {
        symlink(built.join(name), directory.join(name))?;
    }
    let (etc, server) = (directory.join("etc"), built.join("loom-server"));
    let inner = format!("mount --bind {} /etc && exec {} \"$@\"", etc.display(), server.display());
    let script = format!("#!/bin/sh\nexec unshare --mount --propagation private sh -c '{inner}' sh \"$@\"\n");
    let wrapper = directory.join("loom-server");
    fs::write(&wrapper, script)?;
    Ok(fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?)
}

#[test]
fn a_running_weavers_accounts_survive_the_replacement_of_the_machines() -> Result<()> {
    if !can_run(true) {
        return Ok(());
    }
    let binaries = tempfile::tempdir()?;
    with_own_etc(binaries.path())?;
    let system = System::start_from(binaries.path(), &[])?;
    system.login_with_token()?;
    let weaver = system.new_weaver(&[])?;
    let names = ["exec", &weaver.id, "--", "sh", "-c", "id -un; id -gn; getent hosts localhost"];
    let before = system.run(&names)?;
    assert!(before.starts_with("loom\nloom\n"), "{before}");
    // As useradd does it.
    for name in ["passwd", "group", "hosts"] {
        let etc = binaries.path().join("etc");
        fs::copy(etc.join(name), etc.join("new"))?;
        fs::rename(etc.join("new"), etc.join(name))?;
    }
    assert_eq!(system.run(&names)?, before);
    system.stop()
}
