//! The process host as the sidecar meets it: the real binary, its socket, real programs.

#![allow(clippy::unwrap_used)] // a test may panic, and its helpers are not marked as tests

use std::{
    collections::BTreeMap,
    future::Future,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use bytes::Bytes;
use loom_agent::protocol::{
    AttachFrame, AttachSession, ExecEvent, ExecRequest, ExecSession, ExitStatus, FailureKind, HostClient, HostError,
    Program, Pty, StartRequest, socket_path,
};
use loom_api::{
    agent::MainState,
    attach::{AttachQuery, ClientControl, ServerControl},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UnixStream},
    process::{Child, Command},
};

const AGENT: &str = env!("CARGO_BIN_EXE_loom-agent");

/// A host in a directory of its own. Ends with the test.
struct Host {
    directory: tempfile::TempDir,
    process: Child,
    client: HostClient,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let process = Command::new(AGENT)
            .arg("host")
            .env("LOOM_RUN_DIR", directory.path())
            .env("SHELL", "/bin/sh")
            .env("FROM_IMAGE", "image")
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let client = HostClient::new(directory.path());
        Self { directory, process, client }
    }

    /// A host whose main program is this line for the shell.
    async fn running(line: &str) -> Self {
        let host = Self::new();
        host.start(line).await;
        host
    }

    async fn start(&self, line: &str) {
        let env = BTreeMap::from([("FROM_START".to_owned(), "start".to_owned().into())]);
        let command = Some(["/bin/sh", "-c", line].map(str::to_owned).to_vec());
        let cwd = Some(self.directory.path().to_str().unwrap().to_owned());
        soon(self.client.start(StartRequest { command, env, cwd })).await.unwrap();
    }

    async fn exit_code(&mut self) -> i32 {
        soon(self.process.wait()).await.unwrap().code().unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.process.id().unwrap().cast_signed()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    async fn exec(&self, program: Program) -> ExecSession {
        soon(self.client.exec(request(program))).await.unwrap()
    }

    async fn run(&self, line: &str) -> (Vec<u8>, Vec<u8>, ExitStatus) {
        let mut session = self.exec(Program::Shell(line.to_owned())).await;
        // It may have ended already.
        assert!(matches!(session.input.eof().await, Ok(()) | Err(HostError::Gone)));
        finish(&mut session).await
    }

    async fn attach(&self, query: AttachQuery) -> Attached {
        Attached { session: soon(self.client.attach(query)).await.unwrap(), bytes: Vec::new(), controls: Vec::new() }
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it takes too long")
}

fn request(program: Program) -> ExecRequest {
    ExecRequest { program, env: BTreeMap::new(), cwd: None, pty: None }
}

fn argv(words: &[&str]) -> Program {
    Program::Argv(words.iter().map(|&word| word.to_owned()).collect())
}

fn query() -> AttachQuery {
    AttachQuery { rows: 24, cols: 80, read_only: false, client: None, offset: None, terminal: None }
}

async fn finish(session: &mut ExecSession) -> (Vec<u8>, Vec<u8>, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match soon(session.output.next()).await.unwrap().expect("an exit comes first") {
            ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecEvent::Exit(status) => return (stdout, stderr, status),
        }
    }
}

/// A client of the terminal, with what it has been sent.
struct Attached {
    session: AttachSession,
    bytes: Vec<u8>,
    controls: Vec<ServerControl>,
}

impl Attached {
    /// Takes frames until `enough`; false when the terminal ended before.
    async fn until(&mut self, enough: impl Fn(&Self) -> bool) -> bool {
        while !enough(self) {
            match soon(self.session.output.next()).await.unwrap() {
                Some(AttachFrame::Binary(bytes)) => self.bytes.extend_from_slice(&bytes),
                Some(AttachFrame::Text(text)) => self.controls.push(serde_json::from_str(&text).unwrap()),
                None => return false,
            }
        }
        true
    }

    async fn until_text(&mut self, text: &str) {
        assert!(self.until(|it| it.shows(text)).await, "{text:?} never came: {}", self.text());
    }

    fn shows(&self, text: &str) -> bool {
        self.text().contains(text)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    async fn send(&mut self, text: &str) {
        let frame = AttachFrame::Binary(Bytes::copy_from_slice(text.as_bytes()));
        soon(self.session.input.send(frame)).await.unwrap();
    }

    async fn resize(&mut self, rows: u16, cols: u16) {
        let control = serde_json::to_string(&ClientControl::Resize { rows, cols }).unwrap();
        soon(self.session.input.send(AttachFrame::Text(control))).await.unwrap();
    }

    fn greeting(&self) -> (uuid::Uuid, u64, u64) {
        match self.controls[0] {
            ServerControl::Attached { terminal, offset, input } => (terminal, offset, input),
            ref other => panic!("{other:?} came first"),
        }
    }
}

#[tokio::test]
async fn the_main_program_has_a_terminal_and_its_code_is_the_hosts() {
    let mut host =
        Host::running("tty && stty size && echo $FROM_IMAGE $FROM_START $TERM ${LOOM_RUN_DIR-none}; pwd; exit 7").await;
    let mut states = soon(host.client.watch()).await.unwrap();
    let tail = loop {
        match soon(states.next()).await.unwrap().unwrap().main {
            MainState::Exited { code, tail, .. } => {
                assert_eq!(code, 7);
                break tail;
            }
            MainState::Running => {}
            MainState::Waiting => panic!("it was started"),
        }
    };
    use base64::Engine as _;
    let tail = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(tail).unwrap()).unwrap();
    assert!(tail.contains("/dev/pts/"), "{tail}");
    assert!(tail.contains("24 80\r\nimage start xterm-256color none\r\n"), "{tail}");
    assert!(tail.contains(host.directory.path().to_str().unwrap()), "{tail}");
    drop(states);
    assert_eq!(host.exit_code().await, 7);
}

#[tokio::test]
async fn a_signal_that_ends_the_main_program_is_in_the_code() {
    let mut host = Host::running("kill -9 $$").await;
    assert_eq!(host.exit_code().await, 128 + 9);
}

#[tokio::test]
async fn a_second_start_changes_nothing_and_a_failed_one_may_be_repeated() {
    let host = Host::new();
    let missing = StartRequest { command: Some(vec!["no-such-program".into()]), ..StartRequest::default() };
    let error = soon(host.client.start(missing)).await.unwrap_err();
    assert!(matches!(&error, HostError::Refused(failure) if failure.kind == FailureKind::CommandNotFound), "{error}");
    assert_eq!(error.to_string(), "no-such-program: command not found in this image");
    assert_eq!(soon(host.client.state()).await.unwrap().main, MainState::Waiting);
    host.start("sleep 60").await;
    host.start("exit 1").await;
    assert_eq!(soon(host.client.state()).await.unwrap().main, MainState::Running);
}

#[tokio::test]
async fn a_login_shell_is_what_runs_without_a_command_and_ends_at_sigterm() {
    let mut host = Host::new();
    soon(host.client.start(StartRequest::default())).await.unwrap();
    let mut client = host.attach(query()).await;
    client.send("echo shell=$0\n").await;
    client.until_text("shell=-sh").await;
    host.signal(Signal::TERM);
    assert!(
        soon(async {
            client.until(|it| it.controls.iter().any(|control| matches!(control, ServerControl::Exit { .. }))).await
        })
        .await
    );
    drop(client);
    let code = host.exit_code().await;
    assert!(code == 129 || code == 143, "{code}");
}

#[tokio::test]
async fn sigterm_reaches_the_main_programs_own_handler() {
    let mut host = Host::running("trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done").await;
    let mut client = host.attach(query()).await;
    client.until_text("ready").await;
    host.signal(Signal::TERM);
    client.until_text("bye").await;
    assert_eq!(host.exit_code().await, 5);
}

#[tokio::test]
async fn a_host_that_never_started_anything_ends_at_sigterm() {
    let mut host = Host::new();
    assert_eq!(soon(host.client.state()).await.unwrap().main, MainState::Waiting);
    host.signal(Signal::TERM);
    assert_eq!(host.exit_code().await, 143);
}

#[tokio::test]
async fn orphans_are_reaped() {
    let host = Host::running("sleep 60").await;
    let (stdout, _, status) = host.run("sleep 0.2 >/dev/null 2>&1 & echo $!").await;
    assert_eq!(status.code, 0);
    let orphan = PathBuf::from(format!("/proc/{}", String::from_utf8(stdout).unwrap().trim()));
    soon(async {
        while orphan.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn exec_keeps_streams_apart_and_passes_the_code() {
    let host = Host::running("sleep 60").await;
    let (stdout, stderr, status) = host.run("echo out; echo err >&2; pwd; echo $FROM_IMAGE $FROM_START; exit 42").await;
    let expected = format!("out\n{}\nimage start\n", host.directory.path().display());
    assert_eq!((String::from_utf8_lossy(&stdout).as_ref(), stderr.as_slice()), (expected.as_str(), &b"err\n"[..]));
    assert_eq!(status, ExitStatus { code: 42, signal: None, core_dumped: false });
}

#[tokio::test]
async fn exec_takes_its_own_environment_directory_and_arguments_as_they_are() {
    let host = Host::running("sleep 60").await;
    let mut request = request(argv(&["sh", "-c", "printf '%s|' \"$EXTRA\" \"$PWD\" \"$@\"", "sh", "a b", "*", ""]));
    request.env.insert("EXTRA".into(), "x y".to_owned().into());
    request.cwd = Some("/usr".into());
    let mut session = soon(host.client.exec(request)).await.unwrap();
    assert_eq!(finish(&mut session).await.0, b"x y|/usr|a b|*||");
}

#[tokio::test]
async fn the_end_of_input_reaches_the_program() {
    let host = Host::running("sleep 60").await;
    let mut session = host.exec(argv(&["cat"])).await;
    session.input.data(Bytes::from_static(b"some input")).await.unwrap();
    session.input.eof().await.unwrap();
    let (stdout, _, status) = finish(&mut session).await;
    assert_eq!((stdout.as_slice(), status.code), (&b"some input"[..], 0));
    assert_eq!(session.output.next().await.unwrap(), None);
}

#[tokio::test]
async fn signals_reach_the_program_and_its_end_by_one_is_told() {
    let host = Host::running("sleep 60").await;
    let mut session = host.exec(argv(&["sleep", "60"])).await;
    session.input.signal("TERM").await.unwrap();
    let (_, _, status) = finish(&mut session).await;
    assert_eq!((status.code, status.signal.as_deref()), (143, Some("TERM")));
}

#[tokio::test]
async fn signals_pass_by_input_that_the_program_does_not_read() {
    let host = Host::running("sleep 60").await;
    let ExecSession { mut input, mut output } = host.exec(argv(&["sleep", "60"])).await;
    let feeding = tokio::time::timeout(Duration::from_millis(500), input.data(Bytes::from(vec![0; 1 << 20]))).await;
    assert!(feeding.is_err(), "a program that does not read holds its input up");
    input.signal("KILL").await.unwrap();
    assert!(matches!(soon(output.next()).await.unwrap(), Some(ExecEvent::Exit(status)) if status.code == 137));
}

#[tokio::test]
async fn a_megabyte_goes_both_ways_unchanged() {
    let host = Host::running("sleep 60").await;
    let mut seed = 88172645463325252_u64;
    let data: Bytes = (0..1 << 20)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 24) as u8
        })
        .collect();
    let ExecSession { mut input, output } = host.exec(argv(&["cat"])).await;
    let sent = data.clone();
    let feeding = async move {
        input.data(sent).await.unwrap();
        input.eof().await.unwrap();
        input
    };
    let taking = async move {
        let mut output = output;
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        while let Some(event) = soon(output.next()).await.unwrap() {
            match event {
                ExecEvent::Stdout(bytes) => hash.update(&bytes),
                ExecEvent::Stderr(bytes) => panic!("{bytes:?}"),
                ExecEvent::Exit(status) => assert_eq!(status.code, 0),
            }
        }
        hash.finish()
    };
    let (_input, hash) = soon(async { tokio::join!(feeding, taking) }).await;
    assert_eq!(hash.as_ref(), ring::digest::digest(&ring::digest::SHA256, &data).as_ref());
}

#[tokio::test]
async fn output_waits_for_a_client_that_does_not_take_it() {
    let host = Host::running("sleep 60").await;
    let mut session = host.exec(argv(&["sh", "-c", "head -c 50000000 /dev/zero; echo end >&2"])).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let own = own_kib(host.process.id().unwrap());
    assert!(own < 28_000, "{own} KiB");
    let (stdout, stderr, status) = finish(&mut session).await;
    assert_eq!((stdout.len(), stderr.as_slice(), status.code), (50_000_000, &b"end\n"[..], 0));
}

/// The memory that a process has for itself. The pages of its binary are not counted: how many there are is a matter of
/// how it was compiled, and the kernel can drop them.
fn own_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    field("RssAnon:") + field("RssShmem:")
}

#[tokio::test]
async fn a_program_that_leaves_a_daemon_behind_does_not_hold_its_session() {
    let host = Host::running("sleep 60").await;
    let (stdout, _, status) = soon(host.run("sleep 3 & echo started")).await;
    assert_eq!((stdout.as_slice(), status.code), (&b"started\n"[..], 0));
    let (stdout, ..) = host.run("(sleep 0.1; echo late) & echo first").await;
    assert_eq!(stdout, b"first\nlate\n");
}

#[tokio::test]
async fn what_cannot_be_run_says_why() {
    let host = Host::running("sleep 60").await;
    let plain = host.directory.path().join("plain");
    std::fs::write(&plain, "no program").unwrap();
    for (program, kind, code) in [
        ("absent-program", FailureKind::CommandNotFound, 127),
        (plain.to_str().unwrap(), FailureKind::CommandNotExecutable, 126),
    ] {
        match soon(host.client.exec(request(argv(&[program])))).await {
            Err(HostError::Refused(failure)) => assert_eq!((failure.kind, failure.exit_code()), (kind, code)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_session_with_a_terminal_resizes_and_is_interrupted() {
    let host = Host::running("sleep 60").await;
    let mut request = request(Program::LoginShell);
    request.pty = Some(Pty { term: "vt220".into(), rows: 30, cols: 100 });
    let mut session = soon(host.client.exec(request)).await.unwrap();
    let mut seen = String::new();
    async fn until(session: &mut ExecSession, seen: &mut String, text: &str) {
        while !seen.contains(text) {
            match soon(session.output.next()).await.unwrap().unwrap() {
                ExecEvent::Stdout(bytes) => seen.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {seen}"),
            }
        }
    }
    session.input.data(Bytes::from_static(b"stty size; echo term=$TERM name=$0\n")).await.unwrap();
    until(&mut session, &mut seen, "30 100").await;
    until(&mut session, &mut seen, "term=vt220 name=-sh").await;
    session.input.resize(40, 120).await.unwrap();
    session.input.data(Bytes::from_static(b"sh -c 'stty size; exec sleep 60'\n")).await.unwrap();
    until(&mut session, &mut seen, "40 120").await;
    session.input.data(Bytes::from_static(b"\x03")).await.unwrap();
    session.input.data(Bytes::from_static(b"echo inter''rupted\n")).await.unwrap();
    until(&mut session, &mut seen, "interrupted").await;
    session.input.eof().await.unwrap();
    assert_eq!(finish(&mut session).await.2.signal, None);
}

#[tokio::test]
async fn a_client_that_goes_hangs_up_on_its_program() {
    let host = Host::running("sleep 60").await;
    for pty in [None, Some(Pty { term: String::new(), rows: 0, cols: 0 })] {
        let mut session =
            soon(host.client.exec(ExecRequest { pty, ..request(argv(&["sh", "-c", "echo $$; exec sleep 60"])) }))
                .await
                .unwrap();
        let Some(ExecEvent::Stdout(pid)) = soon(session.output.next()).await.unwrap() else {
            panic!("it prints its pid")
        };
        let process = PathBuf::from(format!("/proc/{}", String::from_utf8_lossy(&pid).trim()));
        assert!(process.exists());
        // One half alone is no farewell.
        drop(session.input);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(process.exists());
        drop(session.output);
        soon(async {
            while process.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn two_attached_clients_see_the_same_bytes() {
    let host = Host::running("stty -echo; echo ready; while read line; do echo \"<$line>\"; done").await;
    let (mut one, mut two) = (host.attach(query()).await, host.attach(query()).await);
    one.until_text("ready").await;
    two.until_text("ready").await;
    let past = |client: &Attached| client.bytes.len();
    let (start_one, start_two) = (past(&one), past(&two));
    one.send("from one\n").await;
    one.until_text("<from one>").await;
    two.send("from two\n").await;
    for client in [&mut one, &mut two] {
        client.until_text("<from two>\r\n").await;
    }
    assert_eq!(one.bytes[start_one..], two.bytes[start_two..]);
    assert!(one.until(|it| it.controls.contains(&ServerControl::Input { offset: 9 })).await);
    assert!(one.controls.contains(&ServerControl::Presence { clients: 2 }));
}

#[tokio::test]
async fn a_client_comes_back_to_what_it_missed_and_its_input_counts_on() {
    let host = Host::running("stty -echo; echo ready; while read line; do echo \"<$line>\"; done").await;
    let me = Some(uuid::Uuid::from_u128(7));
    let mut first = host.attach(AttachQuery { client: me, ..query() }).await;
    first.until_text("ready").await;
    first.send("one\n").await;
    first.until_text("<one>\r\n").await;
    let (terminal, mut offset, _) = first.greeting();
    // A snapshot's own bytes do not count.
    let live = first.text().rfind("<one>\r\n").unwrap() + "<one>\r\n".len();
    let snapshot_or_live = &first.text()[..live];
    offset += if snapshot_or_live.ends_with("ready\r\n<one>\r\n") { 14 } else { 7 };
    drop(first);
    let mut other = host.attach(query()).await;
    other.send("two\n").await;
    other.until_text("<two>\r\n").await;
    let back = AttachQuery { client: me, offset: Some(offset), terminal: Some(terminal), ..query() };
    let mut second = host.attach(back).await;
    second.until_text("<two>\r\n").await;
    assert_eq!(second.text(), "<two>\r\n");
    assert_eq!(second.greeting(), (terminal, offset, 4));
}

#[tokio::test]
async fn the_smallest_window_counts_and_observers_only_look() {
    let host = Host::running("stty -echo; echo ready; while read line; do stty size; done").await;
    let mut large = host.attach(AttachQuery { rows: 50, cols: 150, ..query() }).await;
    large.until_text("ready").await;
    let mut observer = host.attach(AttachQuery { rows: 5, cols: 5, read_only: true, ..query() }).await;
    observer.send("refused\n").await;
    let mut small = host.attach(AttachQuery { rows: 60, cols: 90, ..query() }).await;
    assert!(large.until(|it| it.controls.contains(&ServerControl::Resize { rows: 50, cols: 90 })).await);
    large.send("\n").await;
    large.until_text("50 90\r\n").await;
    small.resize(20, 95).await;
    assert!(large.until(|it| it.controls.contains(&ServerControl::Resize { rows: 20, cols: 95 })).await);
    large.send("\n").await;
    large.until_text("20 95\r\n").await;
    assert_eq!(large.text().matches("\r\n").count(), large.text().matches("ready\r\n").count() + 2, "{}", large.text());
}

#[tokio::test]
async fn whoever_joins_a_full_screen_program_sees_its_screen() {
    let host = Host::running(
        "echo before; printf '\\033[?1049h\\033[?1h\\033[?2004h\\033[H\\033[2J\\033[3;4Hfull \\033[7mscreen\\033[m\\033]2;editor\\007'; sleep 60",
    )
    .await;
    let mut first = host.attach(query()).await;
    first.until_text("editor").await;
    let mut client = host.attach(query()).await;
    client.until_text("editor").await;
    let mut parser = vt100::Parser::new(24.try_into().unwrap(), 80.try_into().unwrap(), 100);
    parser.process(&client.bytes);
    let screen = parser.screen();
    assert!(screen.alternate_screen() && screen.application_cursor() && screen.bracketed_paste());
    assert_eq!(screen.contents().trim(), "full screen");
    assert!(screen.cell(2, 8).unwrap().inverse());
    assert_eq!(screen.cursor_position(), (2, 14));
    parser.process(b"\x1b[?1049l");
    assert_eq!(parser.screen().contents().trim(), "before");
}

#[tokio::test]
async fn a_viewer_that_sleeps_holds_up_nobody_and_catches_up() {
    let host = Host::running("stty -echo; read go; seq 1 400000; echo all''done; sleep 60").await;
    let mut sleeping = host.attach(query()).await;
    let mut awake = host.attach(query()).await;
    assert!(sleeping.until(|it| !it.controls.is_empty()).await);
    awake.send("\n").await;
    awake.until_text("alldone").await;
    let mut late = host.attach(query()).await;
    late.until_text("alldone").await;
    sleeping.until_text("alldone").await;
    let snapshots = sleeping.controls.iter().filter(|it| matches!(it, ServerControl::Snapshot { .. })).count();
    assert!(snapshots >= 2, "{:?}", sleeping.controls);
    assert!(sleeping.bytes.len() < 2_000_000, "{} of 2.7 MB", sleeping.bytes.len());
}

#[tokio::test]
async fn the_end_is_told_to_those_attached_and_to_those_who_come_late() {
    let host = Host::running("read line; echo last words; exit 3").await;
    let mut states = soon(host.client.watch()).await.unwrap();
    let mut client = host.attach(query()).await;
    soon(host.client.expiring(60)).await.unwrap();
    assert!(client.until(|it| it.controls.contains(&ServerControl::Expiring { seconds: 60 })).await);
    client.send("\n").await;
    assert!(!client.until(|_| false).await);
    assert_eq!(client.controls.last(), Some(&ServerControl::Exit { code: 3 }));
    assert!(client.shows("last words"));
    while !matches!(soon(states.next()).await.unwrap().unwrap().main, MainState::Exited { code: 3, .. }) {}
    let mut late = host.attach(query()).await;
    assert!(!late.until(|_| false).await);
    assert_eq!(late.controls.last(), Some(&ServerControl::Exit { code: 3 }));
    assert!(late.shows("last words"));
}

#[tokio::test]
async fn logs_begin_with_the_oldest_line_and_follow_to_the_end() {
    let host = Host::running("stty -echo; echo one; read line; echo two").await;
    let mut client = host.attach(query()).await;
    client.until_text("one").await;
    let mut now = soon(host.client.logs(false)).await.unwrap();
    let mut text = Vec::new();
    while let Some(bytes) = soon(now.next()).await.unwrap() {
        text.extend_from_slice(&bytes);
    }
    assert_eq!(text, b"one\r\n");
    let mut following = soon(host.client.logs(true)).await.unwrap();
    client.send("\n").await;
    let mut text = Vec::new();
    while let Some(bytes) = soon(following.next()).await.unwrap() {
        text.extend_from_slice(&bytes);
    }
    assert_eq!(text, b"one\r\ntwo\r\n");
}

#[tokio::test]
async fn a_listening_port_is_reported_and_can_be_dialled() {
    let host = Host::running("sleep 60").await;
    let mut states = soon(host.client.watch()).await.unwrap();
    assert!(soon(states.next()).await.unwrap().is_some());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    while !soon(states.next()).await.unwrap().unwrap().ports.contains(&port) {}
    let serving = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).await.unwrap();
    };
    let asking = async {
        let mut stream = host.client.dial(port).await.unwrap();
        stream.write_all(b"half-close is kept").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "HALF-CLOSE IS KEPT");
    };
    soon(async { tokio::join!(serving, asking) }).await;
    drop(listener);
    let error = soon(host.client.dial(port)).await.unwrap_err();
    assert!(matches!(error, HostError::Refused(failure) if failure.kind == FailureKind::PortRefused));
}

#[tokio::test]
async fn garbage_is_answered_with_an_error_and_harms_nobody() {
    let host = Host::running("sleep 60").await;
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0, 0, 0, 2, b'{', b'}'],
        &[0, 0, 0, 4, 0xff, 0xfe, 0, 1],
        &[0xff; 64],
        b"\x00\x00\x00\x0e{\"op\":\"watch\"}\xff\xff\xff\xff\xff\xff",
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(socket_path(host.directory.path())).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // A reset is an answer as well: not all that was sent was read.
        let _ = soon(stream.read_to_end(&mut answer)).await;
        let watch = bytes.ends_with(&[0xff; 6]) && bytes.len() < 64;
        assert_eq!(String::from_utf8_lossy(&answer).contains("invalid_request"), !watch, "{bytes:?}: {answer:?}");
    }
    // Half a request, and nothing more.
    let _silent = UnixStream::connect(socket_path(host.directory.path())).await.unwrap();
    assert_eq!(host.run("echo fine").await.0, b"fine\n");
}

#[tokio::test]
async fn nothing_is_left_when_the_host_ends() {
    let mut host = Host::running("read line").await;
    let mut session = host.exec(argv(&["sh", "-c", "trap '' HUP; echo $$; exec sleep 60"])).await;
    let Some(ExecEvent::Stdout(pid)) = soon(session.output.next()).await.unwrap() else { panic!("it prints its pid") };
    let process = PathBuf::from(format!("/proc/{}", String::from_utf8_lossy(&pid).trim()));
    let mut client = host.attach(query()).await;
    client.send("\n").await;
    assert_eq!(host.exit_code().await, 0);
    soon(async {
        while std::fs::read_to_string(process.join("stat")).is_ok_and(|stat| !stat.contains(") Z")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_host_is_small() {
    let host = Host::running("sleep 60").await;
    let _client = host.attach(query()).await;
    assert_eq!(host.run("true").await.2.code, 0);
    let own = own_kib(host.process.id().unwrap());
    println!("host, idle: {own} KiB of its own");
    assert!(own < 4_000, "{own} KiB");
}

/// Runs OpenSSH's own client on our server, as `sftp -D` does.
async fn sftp(directory: &Path, batch: &str) -> (String, bool) {
    let mut client = Command::new("sftp")
        .args(["-b", "-", "-D", &format!("{AGENT} sftp-server")])
        .current_dir(directory)
        .env("HOME", directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("OpenSSH's sftp is installed");
    client.stdin.take().unwrap().write_all(batch.as_bytes()).await.unwrap();
    let output = soon(client.wait_with_output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (text, output.status.success())
}

#[tokio::test]
async fn openssh_sftp_moves_files_both_ways_and_keeps_mode_and_time() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let data: Vec<u8> = (0..3_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(path("local"), &data).unwrap();
    std::fs::set_permissions(path("local"), PermissionsExt::from_mode(0o751)).unwrap();
    let time = std::time::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    std::fs::File::options().write(true).open(path("local")).unwrap().set_modified(time).unwrap();
    let (text, ok) = sftp(
        directory.path(),
        "mkdir sub\nput -p local sub/there\nget -p sub/there back\nrename sub/there sub/moved\nsymlink moved sub/link\n\
         ln sub/moved sub/hard\nchmod 600 sub/hard\nls -la sub\ncd sub\npwd\ncd ..\ndf\n",
    )
    .await;
    assert!(ok, "{text}");
    for name in ["back", "sub/moved", "sub/link"] {
        assert!(std::fs::read(path(name)).unwrap() == data, "{name} differs");
    }
    let back = std::fs::metadata(path("back")).unwrap();
    assert_eq!((back.mode() & 0o777, back.mtime()), (0o751, 1_500_000_000));
    assert_eq!(std::fs::metadata(path("sub/moved")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_link(path("sub/link")).unwrap(), Path::new("moved"));
    assert!(text.contains("-rw-------") && text.contains("lrwxrwxrwx") && text.contains("Jul 14  2017"), "{text}");
    assert!(
        text.contains(&format!("Remote working directory: {}", path("sub").canonicalize().unwrap().display())),
        "{text}"
    );
}

#[tokio::test]
async fn openssh_sftp_hears_what_went_wrong() {
    let directory = tempfile::tempdir().unwrap();
    for (command, words) in [
        ("get absent", "not found"),
        ("rm absent", "No such file"),
        ("rmdir absent", "No such file"),
        ("cd absent", "No such file"),
        ("mkdir a/b/c", "No such file"),
    ] {
        let (text, ok) = sftp(directory.path(), &format!("{command}\n")).await;
        assert!(!ok && text.contains(words), "{command}: {text}");
    }
}

#[tokio::test]
async fn openssh_sftp_copies_trees_and_removes_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir_all(path("tree/a/b")).unwrap();
    for number in 0..250 {
        std::fs::write(path(&format!("tree/a/b/file {number}")), format!("{number}")).unwrap();
    }
    use std::os::unix::ffi::OsStrExt as _;
    std::fs::write(path("tree").join(std::ffi::OsStr::from_bytes(b"\xff\xfe")), "not UTF-8").unwrap();
    let (text, ok) = sftp(directory.path(), "mkdir copy\nput -r tree copy\nget -r copy/tree back\n").await;
    assert!(ok, "{text}");
    assert_eq!(std::fs::read_dir(path("back/a/b")).unwrap().count(), 250);
    assert_eq!(std::fs::read(path("back/a/b/file 77")).unwrap(), b"77");
    assert!(path("back").join(std::ffi::OsStr::from_bytes(b"\xff\xfe")).exists());
}

#[tokio::test]
async fn openssh_scp_copies_both_ways() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    // Unlike sftp's, scp's -D takes no arguments for the program.
    std::fs::write(path("server"), format!("#!/bin/sh\nexec {AGENT} sftp-server\n")).unwrap();
    std::fs::set_permissions(path("server"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::create_dir_all(path("tree/deep")).unwrap();
    std::fs::create_dir(path("remote")).unwrap();
    let data: Vec<u8> = (0..1_000_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    std::fs::write(path("tree/deep/file"), &data).unwrap();
    let server = path("server");
    for arguments in [
        ["tree/deep/file", "weaver:remote"],
        ["tree/deep/file", "weaver:~/remote/renamed"],
        ["tree", "weaver:remote/"],
        ["weaver:remote/renamed", "renamed"],
        ["weaver:remote", "back"],
    ] {
        let mut copy = Command::new("scp");
        copy.args(["-r", "-D"])
            .arg(&server)
            .args(arguments)
            .current_dir(directory.path())
            .env("HOME", directory.path());
        let output = soon(copy.output()).await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
    for name in ["remote/file", "renamed", "back/tree/deep/file"] {
        assert!(std::fs::read(path(name)).unwrap() == data, "{name} differs");
    }
}

#[tokio::test]
async fn the_sftp_server_runs_as_a_session() {
    let host = Host::running("sleep 60").await;
    let mut session = host.exec(Program::Sftp).await;
    session.input.data(Bytes::from_static(&[0, 0, 0, 5, 1, 0, 0, 0, 3])).await.unwrap();
    let Some(ExecEvent::Stdout(bytes)) = soon(session.output.next()).await.unwrap() else { panic!("a version comes") };
    assert_eq!(bytes[4..9], [2, 0, 0, 0, 3]);
    session.input.eof().await.unwrap();
    assert_eq!(finish(&mut session).await.2.code, 0);
}
