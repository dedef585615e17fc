//! The process that stands for a weaver's pod: it runs the sidecar and the host, and outlives the server.
//!
//! `loom-server local-pod DIR` inherits `DIR/lock`, locked, as its standard input. It forks, and the child goes on in a
//! session of its own once the file holds its pid; the parent ends then. The supervisor works from inside `DIR` by relative names, because the unprivileged user that the
//! processes run as need not be able to reach it from the root. It ends when the host has ended, after the sidecar had
//! time for its last words. Both children die with it (`PR_SET_PDEATHSIG`), and with the host, which is PID 1 of its
//! namespace, everything the user started.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};

use super::{LocalSpec, LocalStatus, namespaces, trust};
use crate::durable::write_atomically;

/// How long the host may take after it was asked to end.
const HOST_GRACE: Duration = Duration::from_secs(5);
/// How long the sidecar may take for its last words.
const SIDECAR_GRACE: Duration = Duration::from_secs(5);
/// Before a sidecar that died is started again; doubles to [`MAX_BACKOFF`], and begins anew after a minute of life.
const MIN_BACKOFF: Duration = Duration::from_millis(50);
/// See [`MIN_BACKOFF`].
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// Becomes the supervisor of `directory`. Returns in the first process when the supervisor stands, and in the
/// supervisor when all is over.
///
/// # Errors
///
/// When the directory cannot be used.
pub fn run(directory: &Path) -> Result<()> {
    std::env::set_current_dir(directory).with_context(|| format!("entering {}", directory.display()))?;
    let (ready, report) = rustix::pipe::pipe().context("a pipe")?;
    if namespaces::fork()?.is_some() {
        drop(report);
        let mut answer = [0];
        // Nothing but the end comes when the child has died.
        ensure!(rustix::io::read(&ready, &mut answer)? == 1, "the supervisor ended at its start");
        return Ok(());
    }
    drop(ready);
    rustix::process::setsid().context("a session")?;
    let mut lock = File::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    let unused = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&unused)?;
    write!(lock, "{}", std::process::id()).context("the lock")?;
    rustix::io::write(&report, &[1])?;
    drop(report);
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(supervise(lock))
}

async fn supervise(lock: File) -> Result<()> {
    let spec: LocalSpec = serde_json::from_slice(&fs::read("spec.json")?).context("spec.json")?;
    let status = match run_pod(&spec).await {
        Ok(code) => LocalStatus::Exited { code },
        Err(error) => LocalStatus::Failed { reason: format!("{error:#}") },
    };
    write_status(&status)?;
    drop(lock);
    Ok(())
}

/// Runs the pod to its end; the host's exit code.
async fn run_pod(spec: &LocalSpec) -> Result<i32> {
    let mut terminate = signal(SignalKind::terminate())?;
    let (mut host, host_pid) = start_host(spec).await?;
    write_status(&LocalStatus::Running)?;
    let mut sidecar = Some(start_sidecar(spec, host_pid)?);
    let mut back_off = MIN_BACKOFF;
    let mut started = tokio::time::Instant::now();
    let code = loop {
        tokio::select! {
            ended = host.wait() => break exit_code(ended?),
            _ = terminate.recv() => break end_host(&mut host).await?,
            ended = wait_for(&mut sidecar) => {
                eprintln!("the sidecar ended ({}); it is started again in {back_off:?}", ended?);
                sidecar = None;
            }
            () = sleep(back_off), if sidecar.is_none() => {
                let lived_long = started.elapsed() > Duration::from_secs(60);
                back_off = if lived_long { MIN_BACKOFF } else { (back_off * 2).min(MAX_BACKOFF) };
                started = tokio::time::Instant::now();
                sidecar = Some(start_sidecar(spec, host_pid)?);
            }
        }
    };
    if let Some(mut sidecar) = sidecar {
        send(&sidecar, Signal::TERM);
        if timeout(SIDECAR_GRACE, sidecar.wait()).await.is_err() {
            sidecar.kill().await?;
        }
    }
    Ok(code)
}

/// Waits for a child that may not be there: then for ever.
async fn wait_for(child: &mut Option<Child>) -> std::io::Result<std::process::ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
    }
}

/// Asks the host to end, and has it killed when it does not.
async fn end_host(host: &mut Child) -> Result<i32> {
    // Our child waits outside the PID namespace and passes the signal on.
    send(host, Signal::TERM);
    if let Ok(ended) = timeout(HOST_GRACE, host.wait()).await {
        return Ok(exit_code(ended?));
    }
    host.kill().await?;
    Ok(128 + Signal::KILL.as_raw())
}

fn send(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended by itself.
        let _ = kill_process(pid, signal);
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// Starts the stage that makes the namespaces, writes its user mapping from out here, and lets it go on to the host.
/// Gives the stage, which waits for the host, and the host's pid as it is seen here.
async fn start_host(spec: &LocalSpec) -> Result<(Child, i32)> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("local-init").env_clear().stdin(Stdio::piped()).stdout(Stdio::piped());
    namespaces::die_with_parent(&mut command);
    let mut child = command.spawn().context("starting the weaver's first process")?;
    let mut stdin = child.stdin.take().context("its input was piped")?;
    let mut stdout = child.stdout.take().context("its output was piped")?;
    let mut state = [0];
    stdout.read_exact(&mut state).await.context("the weaver's first process ended; pod.log says why")?;
    match state[0] {
        namespaces::NEEDS_MAPPING => {
            namespaces::write_mapping(child.id().context("it has ended")?, spec.uid)?;
        }
        namespaces::NOT_ISOLATED => {}
        other => bail!("the weaver's first process said {other}"),
    }
    stdin.write_all(&[1]).await?;
    let mut host_pid = [0; 4];
    stdout.read_exact(&mut host_pid).await.context("the weaver's first process ended; pod.log says why")?;
    let mut failure = String::new();
    stdout.read_to_string(&mut failure).await.context("what the weaver's first process says")?;
    ensure!(failure.is_empty(), "the weaver's processes could not be started: {failure}");
    Ok((child, i32::from_ne_bytes(host_pid)))
}

/// Starts the sidecar: in the machine's namespaces, as the weaver's user, with the credentials' directory.
fn start_sidecar(spec: &LocalSpec, host_pid: i32) -> Result<Child> {
    let mut command = Command::new("bin/loom-agent");
    command
        .arg("sidecar")
        .env_clear()
        .env("LOOM_WEAVER_ID", spec.weaver.to_string())
        .env("LOOM_SERVER_URL", &spec.server_url)
        .env("LOOM_CREDENTIAL_FILE", "sidecar/token")
        .env("LOOM_RUN_DIR", "run")
        .env("LOOM_HOST_PID", host_pid.to_string())
        .env("LOOM_WORKSPACE_DIR", "workspace")
        // Not the weaver's home, whose files its user writes.
        .env("HOME", "sidecar")
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(Stdio::null());
    if let Some(authorities) = &spec.server_authorities {
        command.env(trust::AUTHORITIES, authorities);
    }
    if !spec.repositories.is_empty() {
        command.env("LOOM_FILE_REPOSITORIES", std::env::join_paths(&spec.repositories)?);
    }
    if !spec.udp {
        command.env("LOOM_UDP_BIND", "off");
    }
    if let Some(uid) = spec.uid {
        command.uid(uid).gid(uid);
    }
    namespaces::die_with_parent(&mut command);
    command.spawn().context("starting the sidecar")
}

fn write_status(status: &LocalStatus) -> Result<()> {
    write_atomically(Path::new("status.json"), &serde_json::to_vec(status)?, 0o644)
}
