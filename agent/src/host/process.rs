//! From a request to a running process: environment, working directory, program, descriptors.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use loom_api::Secret;
use rustix::{
    fs::{Access, access},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, getuid, kill_process_group},
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{InputModes, OptionalActions, Winsize, tcgetattr, tcgetpgrp, tcsetattr, tcsetwinsize},
};

use super::{
    account::Account,
    children::{Child, Children},
    detach,
    stream::Stream,
};
use crate::protocol::{Failure, FailureKind, Program, StartRequest};

/// `PATH` if neither the image nor the request sets it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `TERM` if the request does not set it.
const DEFAULT_TERM: &str = "xterm-256color";
/// The home of a user without a passwd entry, if the directory exists.
const DEFAULT_HOME: &str = "/home/loom";
/// The host's own settings, hidden from the user's programs.
const INTERNAL: [&str; 1] = ["LOOM_RUN_DIR"];

type Variables = BTreeMap<OsString, OsString>;

/// The environment, working directory and account that all processes of the weaver start with.
#[derive(Debug, Clone)]
pub(super) struct ProcessDefaults {
    variables: Variables,
    shell: Option<String>,
    directory: PathBuf,
}

impl ProcessDefaults {
    /// The image's environment, overridden by the request's, and the variables a login would set where both are silent.
    pub(super) fn new(image: impl Iterator<Item = (OsString, OsString)>, request: &StartRequest) -> Self {
        let mut variables: Variables =
            image.filter(|(name, _)| !INTERNAL.iter().any(|internal| name == internal)).collect();
        extend(&mut variables, &request.env);
        let uid = getuid().as_raw();
        let account = Account::of(uid);
        let name = account.as_ref().map_or_else(|| uid.to_string(), |account| account.name.clone());
        let home = home(account.as_ref());
        let given = variables.get(OsStr::new("SHELL")).and_then(|shell| shell.to_str()).map(str::to_owned);
        let candidates = [
            given.as_deref(),
            account.as_ref().map(|account| account.shell.as_str()),
            Some("/bin/bash"),
            Some("/bin/sh"),
        ];
        let shell = candidates.into_iter().flatten().find(|shell| is_executable(Path::new(shell))).map(str::to_owned);
        let mut fill = |key: &str, value: &str| {
            variables.entry(key.into()).or_insert_with(|| value.into());
        };
        fill("USER", &name);
        fill("LOGNAME", &name);
        fill("HOME", &home);
        fill("PATH", DEFAULT_PATH);
        if let Some(shell) = &shell {
            fill("SHELL", shell);
        }
        let wanted =
            request.cwd.iter().map(OsStr::new).chain(variables.get(OsStr::new("HOME")).map(OsString::as_os_str));
        let directory = wanted.map(PathBuf::from).find(|path| path.is_dir()).unwrap_or_else(|| "/".into());
        Self { variables, shell, directory }
    }

    /// The command that runs `program`, complete except for its descriptors.
    ///
    /// # Errors
    ///
    /// When there is no such program, shell or directory.
    pub(super) fn command(
        &self,
        program: &Program,
        env: &BTreeMap<String, Secret>,
        directory: Option<&str>,
        term: Option<&str>,
    ) -> Result<Command, Failure> {
        let mut variables = self.variables.clone();
        if let Some(term) = term {
            let term = if term.is_empty() { DEFAULT_TERM } else { term };
            variables.insert("TERM".into(), term.into());
        }
        extend(&mut variables, env);
        let directory = directory.map_or_else(|| self.directory.clone(), |path| self.directory.join(path));
        if !directory.is_dir() {
            let message = format!("{} is not a directory", directory.display());
            return Err(Failure::new(FailureKind::InvalidRequest, message));
        }
        let mut command = match program {
            Program::LoginShell => self.login_shell()?,
            Program::Shell(line) => match (&self.shell, super::words::split(line)) {
                // A command that asks nothing of a shell can do without one.
                (None, Some(words)) => find_program(&words, &directory, variables.get(OsStr::new("PATH")))?,
                _ => {
                    let mut command = Command::new(self.shell()?);
                    command.arg("-c").arg(line);
                    command
                }
            },
            Program::Argv(words) => find_program(words, &directory, variables.get(OsStr::new("PATH")))?,
            Program::Sftp => {
                let mut command = Command::new("/proc/self/exe");
                command.arg0("loom-agent").arg("sftp-server");
                command
            }
        };
        command.current_dir(directory).env_clear().envs(variables);
        Ok(command)
    }

    /// The shell, named such that it acts as a login shell (`-bash`).
    fn login_shell(&self) -> Result<Command, Failure> {
        let shell = self.shell()?;
        let mut command = Command::new(shell);
        let name = shell.rsplit('/').next().unwrap_or(shell);
        command.arg0(format!("-{name}"));
        Ok(command)
    }

    fn shell(&self) -> Result<&str, Failure> {
        self.shell
            .as_deref()
            .ok_or_else(|| Failure::new(FailureKind::NoShell, "this image has no shell; pass a command"))
    }
}

fn extend(variables: &mut Variables, more: &BTreeMap<String, Secret>) {
    // Names that are empty or contain "=", and values with a zero byte, cannot be passed on (environ(7)).
    let valid = more
        .iter()
        .filter(|(name, value)| !name.is_empty() && !name.contains(['=', '\0']) && !value.expose().contains('\0'));
    variables.extend(valid.map(|(name, value)| (name.into(), value.expose().into())));
}

fn home(account: Option<&Account>) -> String {
    let known = account.map(|account| account.home.as_str()).filter(|home| !home.is_empty());
    let fallback = if Path::new(DEFAULT_HOME).is_dir() { DEFAULT_HOME } else { "/" };
    known.unwrap_or(fallback).to_owned()
}

/// Finds a program as execvp(3) does, but with a precise error.
fn find_program(words: &[String], directory: &Path, path: Option<&OsString>) -> Result<Command, Failure> {
    let Some((name, arguments)) = words.split_first().filter(|(name, _)| !name.is_empty()) else {
        return Err(Failure::new(FailureKind::InvalidRequest, "the command is empty"));
    };
    if words.iter().any(|word| word.contains('\0')) {
        return Err(Failure::new(FailureKind::InvalidRequest, "the command has a zero byte in it"));
    }
    let found = if name.contains('/') {
        let file = directory.join(name);
        file.exists().then_some(file)
    } else {
        let path = path.map_or(OsStr::new(DEFAULT_PATH), OsString::as_os_str);
        let folders = path.as_bytes().split(|byte| *byte == b':').map(OsStr::from_bytes);
        let files: Vec<_> =
            folders.map(|folder| directory.join(folder).join(name)).filter(|file| file.is_file()).collect();
        files.iter().find(|file| is_executable(file)).or(files.first()).cloned()
    };
    let Some(file) = found else {
        let message = format!("{name}: command not found in this image");
        return Err(Failure::new(FailureKind::CommandNotFound, message));
    };
    if !is_executable(&file) {
        let why = if file.is_dir() { "is a directory" } else { "is not executable" };
        return Err(Failure::new(FailureKind::CommandNotExecutable, format!("{} {why}", file.display())));
    }
    let mut command = Command::new(file);
    command.arg0(name).args(arguments);
    Ok(command)
}

fn is_executable(file: &Path) -> bool {
    file.is_file() && access(file, Access::EXEC_OK).is_ok()
}

/// A process with pipes as its standard input, output and error.
pub(super) struct PipedProcess {
    pub(super) child: Child,
    pub(super) stdin: Stream,
    pub(super) stdout: Stream,
    pub(super) stderr: Stream,
}

/// A process on a pseudo-terminal.
pub(super) struct TerminalProcess {
    pub(super) child: Child,
    pub(super) terminal: Stream,
}

/// Spawns a command with three pipes.
pub(super) fn spawn_piped(children: &Children, mut command: Command) -> Result<PipedProcess, Failure> {
    let pipes = || -> io::Result<_> {
        Ok([pipe_with(PipeFlags::CLOEXEC)?, pipe_with(PipeFlags::CLOEXEC)?, pipe_with(PipeFlags::CLOEXEC)?])
    };
    let [stdin, stdout, stderr] = pipes().map_err(|error| internal("make the pipes", &error))?;
    command.stdin(Stdio::from(stdin.0)).stdout(Stdio::from(stdout.1)).stderr(Stdio::from(stderr.1));
    detach::into_own_session(&mut command, false);
    let ours = || -> io::Result<_> { Ok((Stream::new(stdin.1)?, Stream::new(stdout.0)?, Stream::new(stderr.0)?)) };
    let (stdin, stdout, stderr) = ours().map_err(|error| internal("use the pipes", &error))?;
    let child = spawn(children, &mut command)?;
    // Dropping the command closes our copies of the program's ends, so only its own keep the pipes open.
    Ok(PipedProcess { child, stdin, stdout, stderr })
}

/// Spawns a command on a new terminal of `rows` × `cols`.
pub(super) fn spawn_on_terminal(
    children: &Children,
    mut command: Command,
    rows: u16,
    cols: u16,
) -> Result<TerminalProcess, Failure> {
    let (host, user) = open_terminal(rows, cols).map_err(|error| internal("make a terminal", &error))?;
    let copies = || -> io::Result<_> { Ok((user.try_clone()?, user.try_clone()?)) };
    let (stdin, stdout) = copies().map_err(|error| internal("make a terminal", &error))?;
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(user));
    detach::into_own_session(&mut command, true);
    let terminal = Stream::new(host).map_err(|error| internal("use the terminal", &error))?;
    let child = spawn(children, &mut command)?;
    Ok(TerminalProcess { child, terminal })
}

fn spawn(children: &Children, command: &mut Command) -> Result<Child, Failure> {
    children.spawn(command).map_err(|error| {
        let program = Path::new(command.get_program()).display();
        match error.kind() {
            // The file itself exists, so its interpreter or loader is missing.
            io::ErrorKind::NotFound => Failure::new(
                FailureKind::CommandNotFound,
                format!("cannot run {program}: its interpreter or loader does not exist in this image"),
            ),
            io::ErrorKind::PermissionDenied => {
                Failure::new(FailureKind::CommandNotExecutable, format!("cannot run {program}: permission denied"))
            }
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => Failure::new(
                FailureKind::CommandNotExecutable,
                format!("cannot run {program}: it is not a program for this machine"),
            ),
            _ => internal(&format!("run {program}"), &error),
        }
    })
}

fn internal(what: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Internal, format!("cannot {what}: {error}"))
}

fn open_terminal(rows: u16, cols: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = openpt(flags)?;
    unlockpt(&host)?;
    // Opened through the host's side: the path in /dev/pts may be that of another file system.
    let user = ioctl_tiocgptpeer(&host, flags)?;
    let mut attributes = tcgetattr(&user)?;
    // Makes erasing remove whole characters, not bytes.
    attributes.input_modes |= InputModes::IUTF8;
    tcsetattr(&user, OptionalActions::Now, &attributes)?;
    resize_terminal(&host, rows, cols)?;
    Ok((host, user))
}

/// Sets a terminal's size; the kernel sends `SIGWINCH` to its foreground processes.
pub(super) fn resize_terminal(terminal: impl std::os::fd::AsFd, rows: u16, cols: u16) -> io::Result<()> {
    Ok(tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 })?)
}

/// Signals the foreground process group of a terminal.
pub(super) fn signal_foreground(terminal: &Stream, signal: Signal) {
    // A terminal may have no foreground group.
    if let Ok(group) = tcgetpgrp(terminal)
        && group != Pid::INIT
    {
        let _ = kill_process_group(group, signal);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn defaults(image: &[(&str, &str)], request: &StartRequest) -> ProcessDefaults {
        ProcessDefaults::new(image.iter().map(|(name, value)| (name.into(), value.into())), request)
    }

    fn get<'a>(defaults: &'a ProcessDefaults, name: &str) -> Option<&'a str> {
        defaults.variables.get(OsStr::new(name)).and_then(|value| value.to_str())
    }

    #[test]
    fn the_request_overrides_the_image_and_login_fills_the_rest() {
        let env = BTreeMap::from([("A".into(), "request".to_owned().into()), ("B=".into(), "x".to_owned().into())]);
        let request = StartRequest { env, ..StartRequest::default() };
        let it = defaults(&[("A", "image"), ("HOME", "/elsewhere"), ("LOOM_RUN_DIR", "/loom/run")], &request);
        assert_eq!(get(&it, "A"), Some("request"));
        assert_eq!(get(&it, "HOME"), Some("/elsewhere"));
        assert_eq!(get(&it, "PATH"), Some(DEFAULT_PATH));
        assert_eq!(get(&it, "USER"), get(&it, "LOGNAME"));
        assert!(get(&it, "USER").is_some() && get(&it, "SHELL").is_some());
        assert_eq!(get(&it, "LOOM_RUN_DIR"), None);
        assert_eq!(get(&it, "B="), None);
    }

    #[test]
    fn a_missing_working_directory_falls_back_and_an_explicit_one_is_an_error() {
        let request = StartRequest { cwd: Some("/nonexistent".into()), ..StartRequest::default() };
        let it = defaults(&[("HOME", "/usr")], &request);
        assert_eq!(it.directory, Path::new("/usr"));
        let error = it.command(&Program::LoginShell, &BTreeMap::new(), Some("/nonexistent"), None).unwrap_err();
        assert_eq!(error.kind, FailureKind::InvalidRequest);
    }

    #[test]
    fn shells_that_do_not_exist_are_skipped() {
        let it = defaults(&[("SHELL", "/nonexistent/fish")], &StartRequest::default());
        let command = it.command(&Program::LoginShell, &BTreeMap::new(), None, None).unwrap();
        assert!(Path::new(command.get_program()).exists());
        let none = ProcessDefaults { shell: None, ..it };
        let plain = none.command(&Program::Shell("true 'a b'".into()), &BTreeMap::new(), None, None).unwrap();
        assert_eq!(plain.get_args().collect::<Vec<_>>(), ["a b"]);
        let error = none.command(&Program::Shell("true; true".into()), &BTreeMap::new(), None, None).unwrap_err();
        assert_eq!((error.kind, error.exit_code()), (FailureKind::NoShell, 127));
        assert_eq!(error.message, "this image has no shell; pass a command");
    }

    #[test]
    fn what_cannot_run_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = OsString::from(folder.path());
        std::fs::write(folder.path().join("plain"), "x").unwrap();
        let tool = folder.path().join("tool");
        std::fs::write(&tool, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&tool, PermissionsExt::from_mode(0o755)).unwrap();
        let run = |name: &str| find_program(&[name.to_owned()], folder.path(), Some(&path));
        assert_eq!(run("tool").unwrap().get_program(), tool);
        assert_eq!(run("./tool").unwrap().get_program(), folder.path().join("./tool"));
        assert_eq!(run("absent").unwrap_err().exit_code(), 127);
        assert_eq!(run("./absent").unwrap_err().exit_code(), 127);
        assert_eq!(run("plain").unwrap_err().exit_code(), 126);
        assert_eq!(run("/").unwrap_err().exit_code(), 126);
        assert_eq!(run("").unwrap_err().kind, FailureKind::InvalidRequest);
    }
}
