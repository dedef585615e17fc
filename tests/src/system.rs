//! A complete Loom on this machine: a real server, with the local backend or a real cluster, and the real command line.

use std::{
    fs,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    cluster::pki,
    namespace::Namespace,
    processes::{self, Process},
    wait::eventually,
};

/// The variable that selects the backend of [`System::start`], so that the same tests run on both: `local` or
/// `kubernetes`.
pub const BACKEND: &str = "LOOM_TEST_BACKEND";

/// For anything that should take a moment: far more than it needs, so that only a bug exceeds it.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The ports of [`free_port`]: below the kernel's own for outgoing connections and Kubernetes' node ports.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// A server, a logged-in user, and a directory for their files. Dropping it stops and removes everything.
pub struct System {
    directory: tempfile::TempDir,
    binaries: PathBuf,
    server: Option<Child>,
    /// Where the server listens. It is restarted at the same address.
    listen: String,
    /// The server serves HTTPS.
    tls: bool,
    /// The URL of a server that this does not run.
    elsewhere: Option<String>,
    settings: Vec<(String, String)>,
    admin_token: OnceLock<String>,
    /// The namespace of the weavers on Kubernetes.
    namespace: Option<Namespace>,
    keep: bool,
}

/// A weaver of a [`System`].
#[derive(Debug, Clone)]
pub struct Weaver {
    /// `W-<uuid>`.
    pub id: String,
}

impl System {
    /// Starts a server, and logs in as its administrator.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// As [`System::start`], with more settings in the server's environment.
    pub fn start_with(settings: &[(&str, &str)]) -> Result<Self> {
        let system = Self::start_logged_out(settings)?;
        system.login_with_token()?;
        Ok(system)
    }

    /// Starts a server with more settings in its environment, and does not log in.
    pub fn start_logged_out(settings: &[(&str, &str)]) -> Result<Self> {
        Self::prepare(&built_binaries()?, settings, Namespace::wanted(std::env::var(BACKEND).ok().as_deref())?)
    }

    /// Starts a server on the local backend that listens at an address of loopback, and logs its administrator in.
    pub fn start_at(listen: &str, settings: &[(&str, &str)]) -> Result<Self> {
        let mut system = Self::without_server(&built_binaries()?, None)?;
        listen.clone_into(&mut system.listen);
        system.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        system.start_server()?;
        system.login_with_token()?;
        Ok(system)
    }

    /// Starts a server on the local backend with an existing directory for its files, and logs in as its administrator.
    pub fn start_in(data: &Path, settings: &[(&str, &str)]) -> Result<Self> {
        let mut system = Self::without_server(&built_binaries()?, None)?;
        std::os::unix::fs::symlink(data, system.path("data"))?;
        system.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        system.start_server()?;
        system.login_with_token()?;
        Ok(system)
    }

    /// The path of one of the product's binaries.
    pub fn binary(name: &str) -> Result<PathBuf> {
        Ok(built_binaries()?.join(name))
    }

    /// Starts a server for the cluster, whatever the environment says, and logs in as its administrator.
    pub fn start_on_kubernetes(settings: &[(&str, &str)]) -> Result<Self> {
        let system = Self::prepare(&built_binaries()?, settings, Namespace::wanted(Some("kubernetes"))?)?;
        system.login_with_token()?;
        Ok(system)
    }

    /// As [`System::start_on_kubernetes`], with binaries from another directory.
    pub fn start_from(binaries: &Path, settings: &[(&str, &str)]) -> Result<Self> {
        Self::prepare(binaries, settings, None)
    }

    /// Starts no server: the user of one that runs elsewhere. There is a certificate for `names` (in the form of
    /// `subjectAltName`) below [`System::path`]`("pki")` that the user trusts.
    pub fn of_another_server(url: &str, names: &str) -> Result<Self> {
        let mut system = Self::without_server(&built_binaries()?, None)?;
        system.elsewhere = Some(url.to_owned());
        pki::for_server(system.directory.path(), names)?;
        Ok(system)
    }

    /// Starts a server that serves HTTPS at a port of 127.0.0.1, with a certificate that the user and weavers trust, and
    /// logs its administrator in.
    pub fn start_with_tls(port: u16, settings: &[(&str, &str)]) -> Result<Self> {
        let mut system = Self::without_server(&built_binaries()?, None)?;
        let pki = pki::for_server(system.directory.path(), "IP:127.0.0.1")?;
        system.listen = format!("127.0.0.1:{port}");
        system.tls = true;
        for (setting, file) in [
            ("LOOM_SERVER_TLS_CERT", "server.crt"),
            ("LOOM_SERVER_TLS_KEY", "server.key"),
            ("LOOM_SERVER_LOCAL_AGENT_CA", "ca.crt"),
        ] {
            system.set(setting, &pki.join(file).to_string_lossy());
        }
        system.settings.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        system.start_server()?;
        system.login_with_token()?;
        Ok(system)
    }

    fn prepare(binaries: &Path, settings: &[(&str, &str)], namespace: Option<Namespace>) -> Result<Self> {
        let mut system = Self::without_server(binaries, namespace)?;
        if let Some(namespace) = &system.namespace {
            let port = free_port()?;
            system.listen = format!("0.0.0.0:{port}");
            system.settings = namespace.server_settings(system.directory.path(), port)?;
        }
        // The test's settings override the defaults.
        system.settings.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        system.start_server()?;
        Ok(system)
    }

    fn without_server(binaries: &Path, namespace: Option<Namespace>) -> Result<Self> {
        for name in ["loom", "loom-server", "loom-agent"] {
            ensure!(binaries.join(name).exists(), "{name} is not in {}: run `cargo xtask test`", binaries.display());
        }
        // Short, because the path of a unix socket holds about a hundred bytes.
        let directory = tempfile::Builder::new().prefix("loom-").tempdir_in("/tmp")?;
        let system = Self {
            directory,
            binaries: binaries.to_owned(),
            server: None,
            listen: "127.0.0.1:0".to_owned(),
            tls: namespace.is_some(),
            elsewhere: None,
            settings: Vec::new(),
            admin_token: OnceLock::new(),
            namespace,
            keep: false,
        };
        // The server's data must be traversable for the unprivileged user that weavers run as.
        set_mode(system.path(""), 0o711)?;
        for private in ["config", "state", "runtime"] {
            fs::create_dir(system.path(private))?;
            set_mode(system.path(private), 0o700)?;
        }
        Ok(system)
    }

    /// A path below the system's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The server's URL.
    #[must_use]
    pub fn url(&self) -> String {
        if let Some(url) = &self.elsewhere {
            return url.clone();
        }
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.listen.replace("0.0.0.0", "127.0.0.1"))
    }

    /// The namespace of the weavers on Kubernetes.
    #[must_use]
    pub const fn namespace(&self) -> Option<&Namespace> {
        self.namespace.as_ref()
    }

    /// The administrator's one-time sign-in token, from the file that the server wrote at its first start.
    pub fn sign_in_token(&self) -> Result<String> {
        let token = fs::read_to_string(self.path("data/admin.token")).context("reading the administrator's token")?;
        Ok(token.trim().to_owned())
    }

    /// The administrator's API token. The first call signs in.
    pub fn admin_token(&self) -> Result<String> {
        if let Some(token) = self.admin_token.get() {
            return Ok(token.clone());
        }
        let token = self.sign_in(&self.sign_in_token()?)?;
        Ok(self.admin_token.get_or_init(|| token).clone())
    }

    /// The environment of the system's user, as names and values.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let directory = |name| self.path(name).to_string_lossy().into_owned();
        let mut environment = vec![
            ("XDG_CONFIG_HOME", directory("config")),
            ("XDG_STATE_HOME", directory("state")),
            ("XDG_RUNTIME_DIR", directory("runtime")),
            ("LOOM_SERVER_URL", self.url()),
        ];
        if self.tls || self.elsewhere.is_some() {
            // The test's own CA signed the server's certificate.
            environment.extend(["SSL_CERT_FILE", "CURL_CA_BUNDLE"].map(|name| (name, directory("pki/ca.crt"))));
        }
        environment
    }

    /// The real `loom` with `arguments`, in the user's environment.
    #[must_use]
    pub fn loom(&self, arguments: &[&str]) -> Command {
        let mut command = self.program(&self.loom_binary());
        command.args(arguments);
        command
    }

    /// Another program in the user's environment.
    #[must_use]
    pub fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.envs(self.environment()).env("HOME", self.path("")).env_remove("LOOM_TOKEN").stdin(Stdio::null());
        command
    }

    /// The path of `loom`.
    #[must_use]
    pub fn loom_binary(&self) -> String {
        self.binaries.join("loom").to_string_lossy().into_owned()
    }

    /// Runs an operator's command of `loom-server` on the server's data; returns its standard output.
    pub fn manage(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.program(&self.binaries.join("loom-server").to_string_lossy());
        let output = command.args(arguments).arg("--data-dir").arg(self.path("data")).output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `loom`; returns its standard output, or an error with its standard error.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        if !output.status.success() {
            bail!("loom {arguments:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `loom`; its failure is not an error.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        self.loom(arguments).output().context("starting loom")
    }

    /// Runs `loom` with standard input.
    pub fn output_with_input(&self, arguments: &[&str], input: &[u8]) -> Result<Output> {
        output_with_input(self.loom(arguments), input)
    }

    /// Runs `loom … --json` and parses its output.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(arguments)?;
        serde_json::from_str(&text).with_context(|| format!("loom {arguments:?} printed {text:?}"))
    }

    /// Logs in with the administrator's token, as a program would.
    pub fn login_with_token(&self) -> Result<()> {
        let output = self.output_with_input(&["login", "--token", "-"], self.admin_token()?.as_bytes())?;
        ensure!(output.status.success(), "login: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Creates a weaver and waits until it is ready.
    pub fn new_weaver(&self, arguments: &[&str]) -> Result<Weaver> {
        let mut all = vec!["new", "--no-attach"];
        all.extend(arguments);
        Ok(Weaver { id: self.run(&all)?.trim().to_owned() })
    }

    /// A weaver as the API returns it.
    pub fn describe(&self, weaver: &Weaver) -> Result<Value> {
        let all = self.json(&["ps", "--all", "--json"])?;
        let list = all.as_array().context("ps --json is no array")?;
        list.iter().find(|item| item["id"] == weaver.id.as_str()).cloned().context("the weaver is not listed")
    }

    /// The weaver's directory on the local backend.
    #[must_use]
    pub fn weaver_directory(&self, weaver: &Weaver) -> PathBuf {
        self.path("data/weavers").join(weaver.id.trim_start_matches("W-"))
    }

    /// The weaver's sidecar process. On Kubernetes it is visible because this machine is the node.
    pub fn sidecar(&self, weaver: &Weaver) -> Result<Process> {
        eventually("the weaver's sidecar", TIMEOUT, || {
            let variable = format!("LOOM_WEAVER_ID={}", weaver.id);
            Ok(processes::with_variable(&variable).into_iter().find(|process| process.has("sidecar")))
        })
    }

    /// Whether a weaver's directory or pod still exists.
    pub fn has_left_something(&self, weaver: &Weaver) -> Result<bool> {
        match &self.namespace {
            None => Ok(self.weaver_directory(weaver).exists()),
            Some(namespace) => Ok(namespace.pod_uid(weaver)?.is_some()),
        }
    }

    /// Ends a weaver's pod behind the server's back.
    pub fn kill_pod(&self, weaver: &Weaver) -> Result<()> {
        if let Some(namespace) = &self.namespace {
            return namespace.delete_pod(weaver);
        }
        let supervisor = processes::belonging_to(&self.weaver_directory(weaver))
            .into_iter()
            .find(|process| process.arguments.iter().any(|argument| argument == "local-pod"))
            .context("a supervisor")?;
        supervisor.kill();
        Ok(())
    }

    /// Distinguishes a weaver's pod from a replacement.
    pub fn pod_identity(&self, weaver: &Weaver) -> Result<String> {
        match &self.namespace {
            None => {
                // Not the user's programs, which come and go.
                let lasting = |process: &Process| ["local-pod", "host", "sidecar"].iter().any(|word| process.has(word));
                let processes = processes::belonging_to(&self.weaver_directory(weaver));
                let pids: Vec<_> =
                    processes.iter().filter(|process| lasting(process)).map(|process| process.pid).collect();
                Ok(format!("{pids:?}"))
            }
            Some(namespace) => namespace.pod_uid(weaver)?.context("the weaver has no pod"),
        }
    }

    /// The user's background daemon, if it runs.
    #[must_use]
    pub fn daemon(&self) -> Option<Process> {
        processes::belonging_to(self.directory.path())
            .into_iter()
            .find(|process| process.arguments.get(1).is_some_and(|verb| verb == "daemon"))
    }

    /// Ends the server as a crash would.
    pub fn kill_server(&mut self) -> Result<()> {
        let mut server = self.server.take().context("the server does not run")?;
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// Waits until the server has ended by itself.
    pub fn wait_for_server_end(&mut self) -> Result<()> {
        let mut server = self.server.take().context("the server does not run")?;
        let ended = eventually("the server to end by itself", TIMEOUT, || Ok(server.try_wait()?));
        if ended.is_err() {
            self.server = Some(server);
        }
        ended.map(drop)
    }

    /// Sets a variable in the server's environment, from its next start on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// The number of pods of all weavers.
    pub fn count_pods(&self) -> Result<usize> {
        Ok(match &self.namespace {
            None => fs::read_dir(self.path("data/weavers")).map_or(0, Iterator::count),
            Some(namespace) => namespace.pods()?.len(),
        })
    }

    /// Restarts the server at the same address.
    pub fn start_server(&mut self) -> Result<()> {
        let listen_file = self.path("data/listen");
        let _ = fs::remove_file(&listen_file);
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("server.log"))?;
        let mut command = Command::new(self.binaries.join("loom-server"));
        command
            .args(["--data-dir", &self.path("data").to_string_lossy()])
            .args(["--listen", &self.listen])
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        let mut server = command.spawn().context("starting loom-server")?;
        let address = eventually("the server to listen", TIMEOUT, || {
            if let Some(status) = server.try_wait()? {
                bail!("loom-server ended with {status}:\n{}", self.server_log());
            }
            Ok(fs::read_to_string(&listen_file).ok().filter(|text| !text.is_empty()))
        })?;
        address.trim().clone_into(&mut self.listen);
        self.server = Some(server);
        Ok(())
    }

    /// The server's process id.
    #[must_use]
    pub fn server_pid(&self) -> Option<i32> {
        self.server.as_ref().map(|server| server.id().cast_signed())
    }

    /// The server's log so far.
    #[must_use]
    pub fn server_log(&self) -> String {
        fs::read_to_string(self.path("server.log")).unwrap_or_default()
    }

    /// Leaves everything running when dropped; returns the directory.
    pub fn keep(&mut self) -> &Path {
        self.keep = true;
        self.directory.disable_cleanup(true);
        self.directory.path()
    }

    /// Deletes all weavers, ends daemon and server, and checks that nothing is left behind.
    pub fn stop(mut self) -> Result<()> {
        let weavers = self.json(&["ps", "--json"])?;
        for weaver in weavers.as_array().into_iter().flatten() {
            self.run(&["delete", "--yes", weaver["id"].as_str().unwrap_or_default()])?;
        }
        eventually("the weavers' directories and pods to be removed", TIMEOUT, || {
            Ok((self.count_pods()? == 0).then_some(()))
        })?;
        if let Some(daemon) = self.daemon() {
            processes::signal(daemon.pid, Signal::TERM);
        }
        self.stop_server()?;
        eventually("all processes and mounts to be gone", TIMEOUT, || {
            Ok(processes::belonging_to(self.directory.path()).is_empty().then_some(()))
        })
        .with_context(|| format!("left: {:?}", processes::belonging_to(self.directory.path())))
    }

    /// Asks the server to stop, and waits until it has.
    pub fn stop_server(&mut self) -> Result<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        processes::signal(server.id().cast_signed(), Signal::TERM);
        let ended = eventually("the server to end", TIMEOUT, || Ok(server.try_wait()?));
        if ended.is_err() {
            let _ = server.kill();
            let _ = server.wait();
        }
        ended.map(drop)
    }
}

impl Drop for System {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            eprintln!("--- the server's log ends with ---\n{}", tail(&self.server_log()));
        }
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        for process in processes::belonging_to(self.directory.path()) {
            process.kill();
        }
    }
}

/// Runs a command with standard input.
pub fn output_with_input(mut command: Command, input: &[u8]) -> Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("standard input was piped")?;
    let writer = {
        let input = input.to_owned();
        // A program may end without reading all of its input.
        std::thread::spawn(move || drop(stdin.write_all(&input)))
    };
    let output = child.wait_with_output()?;
    let _ = writer.join();
    Ok(output)
}

/// The directory of the binaries that cargo built beside the running test.
fn built_binaries() -> Result<PathBuf> {
    let mut directory = std::env::current_exe()?;
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    Ok(directory)
}

/// A TCP port that nothing listens on, and that nothing is given unless it asks for it: below those that the kernel
/// gives to outgoing connections (`net.ipv4.ip_local_port_range`). No two calls of a process get the same one.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test processes that run at the same time begin at different places.
    let begin = std::process::id().wrapping_mul(97);
    for _ in 0..PORTS.len() {
        let number = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) as usize % PORTS.len();
        let port = PORTS.start + u16::try_from(number)?;
        if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no port in {PORTS:?} is free")
}

fn set_mode(path: impl AsRef<Path>, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
