//! What users do over SSH: with `loom ssh` and `loom exec`, and with OpenSSH through `loom ssh --stdio`.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use loom_tests::{System, Weaver, system::TIMEOUT, system::output_with_input, terminal::Terminal};

/// A system with one weaver in it.
fn system_with_weaver() -> Result<(System, Weaver)> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    Ok((system, weaver))
}

/// The real OpenSSH client, told of weavers only by what `loom ssh-config` wrote: no prompt, strict host keys.
fn openssh(system: &System, program: &str) -> Result<Command> {
    let mut command = system.program(program);
    command.arg("-F").arg(system.path(".ssh/config")).args(["-o", "BatchMode=yes"]);
    Ok(command)
}

/// Writes the OpenSSH configuration into the system's own home.
fn configure_openssh(system: &System) -> Result<()> {
    system.run(&["ssh-config"])?;
    // OpenSSH looks `Include` up in the real home, so the test names the file that was written.
    let written = system.path(".ssh/loom/config");
    ensure!(written.exists(), "loom ssh-config wrote no {}", written.display());
    let main = fs::read_to_string(system.path(".ssh/config"))?;
    ensure!(main.contains("Include"), "no Include in {main:?}");
    fs::copy(&written, system.path(".ssh/config"))?;
    Ok(())
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Bytes that no compression or text mode leaves alone.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

#[test]
fn a_command_gives_its_output_errors_and_exit_code() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    let output = system.output(&["ssh", &weaver.id, "--", "echo out; echo err >&2; exit 7"])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(7));

    let output = system.output(&["exec", &weaver.id, "--", "sh", "-c", "kill -TERM $$"])?;
    assert_eq!(output.status.code(), Some(128 + 15), "a signal is 128 and its number");

    let output = system.output_with_input(&["exec", &weaver.id, "--", "wc", "-c"], &noise(1_000_000))?;
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1000000", "standard input reaches its end");

    let output = system.output(&["exec", &weaver.id, "--", "printf", "%s|", "a b", "c'd", "$HOME"])?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|c'd|$HOME|", "arguments arrive as they are");
    system.stop()
}

#[test]
fn an_interactive_shell_has_a_terminal_that_follows_the_window() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    let mut terminal = Terminal::spawn(&system.loom(&["ssh", &weaver.id]))?;
    terminal.send("stty size; tty; echo in-$((40+2))\r")?;
    terminal.expect("in-42", TIMEOUT)?;
    terminal.expect("24 80", TIMEOUT)?;
    terminal.expect("/dev/pts/", TIMEOUT)?;
    terminal.resize(30, 100)?;
    terminal.send("clear; stty size\r")?;
    terminal.expect("30 100", TIMEOUT)?;
    terminal.send("exit 3\r")?;
    assert_eq!(terminal.wait(TIMEOUT)?.code(), Some(3));
    system.stop()
}

#[test]
fn openssh_runs_commands_and_shells_with_strict_host_keys() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    configure_openssh(&system)?;
    let host = format!("{}.loom", weaver.id);

    let output = openssh(&system, "ssh")?.args([&host, "echo out; echo err >&2; exit 7"]).output()?;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n", "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(7));

    let mut command = openssh(&system, "ssh")?;
    command.args([&host, "cat"]);
    let data = noise(3_000_000);
    let output = output_with_input(command, &data)?;
    assert_eq!(hash(&output.stdout), hash(&data), "standard input came back whole");

    let mut command = openssh(&system, "ssh")?;
    command.args(["-tt", &host]);
    let mut terminal = Terminal::spawn(&command)?;
    terminal.send("echo rows-$(stty size)\r")?;
    terminal.expect("rows-24 80", TIMEOUT)?;
    terminal.resize(31, 99)?;
    terminal.send("clear; echo rows-$(stty size)\r")?;
    terminal.expect("rows-31 99", TIMEOUT)?;
    terminal.send("exit\r")?;
    assert_eq!(terminal.wait(TIMEOUT)?.code(), Some(0));
    system.stop()
}

#[test]
fn sftp_and_scp_copy_both_ways_unchanged() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    configure_openssh(&system)?;
    let host = format!("{}.loom", weaver.id);
    let data = noise(5_000_000);
    fs::write(system.path("up"), &data)?;

    let up = system.path("up").to_string_lossy().into_owned();
    let status = openssh(&system, "scp")?.args(["-q", &up, &format!("{host}:copied")]).status()?;
    ensure!(status.success(), "scp into the weaver: {status}");
    let down = system.path("down").to_string_lossy().into_owned();
    let status = openssh(&system, "scp")?.args(["-q", &format!("{host}:copied"), &down]).status()?;
    ensure!(status.success(), "scp out of the weaver: {status}");
    assert_eq!(hash(&fs::read(&down)?), hash(&data));

    let batch = format!("put {up} second\nchmod 600 second\nrename second third\nget third {down}2\nls -l\nrm third\n");
    let mut command = openssh(&system, "sftp")?;
    command.args(["-q", "-b", "-", &host]);
    let output = output_with_input(command, batch.as_bytes())?;
    ensure!(output.status.success(), "sftp: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(hash(&fs::read(format!("{down}2"))?), hash(&data));
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listing.contains("-rw-------") && listing.contains("third"), "{listing}");
    system.stop()
}

#[test]
fn twelve_commands_at_once_over_one_openssh_connection_each_return_their_code() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    configure_openssh(&system)?;
    let host = format!("{}.loom", weaver.id);
    let control = format!("ControlPath={}", system.path("ctl").display());
    let mut master = openssh(&system, "ssh")?.args(["-o", &control, "-MN", &host]).spawn()?;
    loom_tests::eventually("the control master", TIMEOUT, || Ok(system.path("ctl").exists().then_some(())))?;
    let children = (0..12)
        .map(|code| {
            openssh(&system, "ssh")?.args(["-o", &control, &host, &format!("exit {code}")]).spawn().context("ssh")
        })
        .collect::<Result<Vec<_>>>()?;
    let codes = children.into_iter().map(|mut child| Ok(child.wait()?.code())).collect::<Result<Vec<_>>>();
    master.kill()?;
    master.wait()?;
    assert_eq!(codes?, (0..12).map(Some).collect::<Vec<_>>());
    system.stop()
}

#[test]
fn openssh_forwards_to_the_weaver_and_never_from_it() -> Result<()> {
    let (system, weaver) = system_with_weaver()?;
    configure_openssh(&system)?;
    let mut command = openssh(&system, "ssh")?;
    command.args(["-o", "ExitOnForwardFailure=yes", "-R", "9999:localhost:22"]);
    let output = command.arg(format!("{}.loom", weaver.id)).arg("true").output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && errors.contains("remote port forwarding failed"), "{output:?}");
    system.stop()
}

#[test]
fn a_weaver_that_does_not_exist_is_said_so_before_anything_is_tried() -> Result<()> {
    let system = System::start()?;
    let output = system.output(&["ssh", "W-01890000-0000-7000-8000-000000000000", "--", "true"])?;
    assert_eq!(output.status.code(), Some(255), "the connection itself failed");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no weaver"), "{output:?}");
    system.stop()
}
