//! Programs of others that the demo and the tests use, installed when they are missing.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::build;

/// wireguard-go, the foreign peer of the interoperability test, at a version that is known to work.
const WIREGUARD_GO: &str = "golang.zx2c4.com/wireguard@v0.0.0-20260522210424-ecfc5a8d5446";

/// What the version in tests/cluster/go.mod calls itself.
const KUBERNETES: &str = "v1.36.3";

/// A program (by its path, when it is on nobody's), the Debian package that holds it, and other places where the package
/// puts it.
struct Tool {
    program: &'static str,
    package: &'static str,
    directories: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package, directories: "" }
}

/// What the demo needs.
const DEMO: &[Tool] = &[
    tool("git", "git"),
    tool("curl", "curl"),
    tool("psql", "postgresql-client"),
    Tool { program: "initdb", package: "postgresql", directories: "/usr/lib/postgresql" },
];

/// What the tests need besides.
const TESTS: &[Tool] = &[
    tool("ssh", "openssh-client"),
    tool("sftp", "openssh-client"),
    tool("ip", "iproute2"),
    tool("openssl", "openssl"),
    tool("python3", "python3"),
    tool("nix-instantiate", "nix-bin"),
];

/// What images are built with.
const IMAGES: &[Tool] = &[tool("mmdebstrap", "mmdebstrap"), tool("strip", "binutils")];

/// What the cluster needs besides.
const CLUSTER: &[Tool] = &[
    tool("containerd", "containerd"),
    tool("runc", "runc"),
    tool("/usr/lib/cni/bridge", "containernetworking-plugins"),
    tool("iptables", "iptables"),
    tool("ipset", "ipset"),
    tool("ip", "iproute2"),
    tool("openssl", "openssl"),
    tool("docker-registry", "docker-registry"),
    tool("skopeo", "skopeo"),
    tool("/bin/busybox", "busybox-static"),
];

/// Installs what the demo needs.
pub(crate) fn for_demo() -> Result<()> {
    install(DEMO)
}

/// Installs what the tests need.
pub(crate) fn for_tests() -> Result<()> {
    install(DEMO)?;
    install(TESTS)?;
    wireguard_go()
}

/// Installs what images are built with.
pub(crate) fn for_images() -> Result<()> {
    install(IMAGES)
}

/// Installs what the cluster and its images need, and builds Kubernetes.
pub(crate) fn for_cluster() -> Result<()> {
    for_images()?;
    install(CLUSTER)?;
    kubernetes()
}

/// Where programs are kept that are built here.
pub(crate) fn directory() -> PathBuf {
    build::target().join("tools")
}

fn install(tools: &[Tool]) -> Result<()> {
    let mut missing: Vec<&str> = tools.iter().filter(|tool| !tool.is_there()).map(|tool| tool.package).collect();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let by_hand = format!("install them by hand, for example: sudo apt-get install {}", missing.join(" "));
    if !loom_tests::processes::am_root() || !on_path("apt-get") {
        bail!("these packages are needed: {}; {by_hand}", missing.join(", "));
    }
    eprintln!("installing {}", missing.join(", "));
    run(Command::new("apt-get").args(["-qq", "update"]))?;
    run(Command::new("apt-get")
        .args(["-qq", "install", "--yes", "--no-install-recommends"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive"))
    .context(by_hand)
}

impl Tool {
    fn is_there(&self) -> bool {
        is_file(Path::new(self.program))
            || on_path(self.program)
            || std::fs::read_dir(self.directories).is_ok_and(|versions| {
                versions.flatten().any(|version| version.path().join("bin").join(self.program).exists())
            })
    }
}

/// Builds wireguard-go with the Go toolchain into `target/tools`.
fn wireguard_go() -> Result<()> {
    let directory = directory();
    if directory.join("wireguard").exists() {
        return Ok(());
    }
    need_go("wireguard-go")?;
    eprintln!("building wireguard-go");
    std::fs::create_dir_all(&directory)?;
    run(Command::new("go").args(["install", WIREGUARD_GO]).env("GOBIN", &directory).env("CGO_ENABLED", "0"))
}

/// Builds Kubernetes, and the program that holds pods, from the Go module in `tests/cluster`; minutes at the first time.
fn kubernetes() -> Result<()> {
    let source = build::root().join("tests/cluster");
    // Built again when the module changes.
    let recipe = ["go.sum", "kube/main.go", "pause/main.go", "policies/go.sum", "helm/go.sum"]
        .map(|name| std::fs::read_to_string(source.join(name)))
        .into_iter()
        .collect::<std::io::Result<String>>()?;
    let recipe_file = directory().join("kube.recipe");
    if directory().join("kube").exists() && std::fs::read_to_string(&recipe_file).is_ok_and(|earlier| earlier == recipe)
    {
        return Ok(());
    }
    need_go("Kubernetes")?;
    eprintln!("building Kubernetes {KUBERNETES} and what goes with it: ten minutes, once");
    std::fs::create_dir_all(directory())?;
    let version = "-X k8s.io/component-base/version";
    let flags = format!("-s -w {version}.gitVersion={KUBERNETES} {version}.gitMajor=1 {version}.gitMinor=36");
    for (program, module, package) in [
        ("kube", ".", "./kube"),
        ("pause", ".", "./pause"),
        ("kube-router", "policies", "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"),
        ("helm", "helm", "helm.sh/helm/v3/cmd/helm"),
    ] {
        run(Command::new("go")
            .args(["build", "-trimpath", "-ldflags", &flags, "-o"])
            .arg(directory().join(program))
            .arg(package)
            .current_dir(source.join(module))
            .env("CGO_ENABLED", "0"))?;
    }
    Ok(std::fs::write(recipe_file, recipe)?)
}

/// Builds KWOK, which pretends to be many pods, for the benchmarks.
pub(crate) fn kwok() -> Result<()> {
    if directory().join("kwok").exists() {
        return Ok(());
    }
    need_go("KWOK")?;
    eprintln!("building KWOK");
    run(Command::new("go")
        .args(["build", "-trimpath", "-o"])
        .arg(directory().join("kwok"))
        .arg("sigs.k8s.io/kwok/cmd/kwok")
        .current_dir(build::root().join("tests/cluster/kwok"))
        .env("CGO_ENABLED", "0"))
}

fn need_go(what: &str) -> Result<()> {
    ensure!(on_path("go"), "Go (1.26 or newer, https://go.dev/dl) is needed to build {what} for the tests");
    Ok(())
}

/// Runs a program that has to succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {}", command.get_program().display()))?;
    ensure!(status.success(), "{} failed", command.get_program().display());
    Ok(())
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| is_file(&directory.join(program))))
}

fn is_file(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file())
}
