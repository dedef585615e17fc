//! The images of the project, and those that only tests need, as OCI archives in `target/images`.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::{
    build,
    oci::{self, Runs},
    tools,
};

/// The Debian release that images are made from.
const RELEASE: &str = "bookworm";
/// Documentation and translations, which nobody reads in a container.
const EXCLUDED: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// Builds an image as an OCI archive, without Docker.
#[derive(Args)]
pub(crate) struct Options {
    /// The image to build
    image: Image,
}

/// The images of a release.
#[derive(Clone, Copy, ValueEnum)]
enum Image {
    /// The agent, for the sidecar of weavers' pods.
    Agent,
    /// The server.
    Server,
    /// The official image of weavers: Debian with everyday tools.
    Weaver,
}

/// Builds one image for release, and says where it is.
pub(crate) fn run(options: &Options) -> Result<()> {
    tools::for_images()?;
    let archive = match options.image {
        Image::Agent => program("agent", &build::binaries(true)?)?,
        Image::Server => program("server", &build::binaries(true)?)?,
        Image::Weaver => weaver()?,
    };
    println!("{}", archive.display());
    Ok(())
}

/// All images in the test cluster's registry.
pub(crate) fn for_tests(binaries: &Path) -> Result<Vec<PathBuf>> {
    Ok(vec![pause()?, program("agent", binaries)?, program("server", binaries)?, weaver()?, postgres()?, alone()?])
}

/// The image of `loom-agent` or `loom-server`: the static binary, and what it needs of a system.
fn program(name: &str, binaries: &Path) -> Result<PathBuf> {
    let (directory, archive) = place(name)?;
    let binary = format!("loom-{name}");
    let target = directory.join("usr/local/bin").join(&binary);
    add(&directory, "etc/passwd", "loom:x:1000:1000:loom:/tmp:/sbin/nologin\n")?;
    add(&directory, "etc/group", "loom:x:1000:\n")?;
    let authorities = fs::read_to_string("/etc/ssl/certs/ca-certificates.crt")
        .context("the system's certificate authorities (package ca-certificates)")?;
    add(&directory, "etc/ssl/certs/ca-certificates.crt", &authorities)?;
    add(&directory, &format!("usr/local/bin/{binary}"), "")?;
    tools::run(Command::new("strip").arg("-o").arg(&target).arg(binaries.join(&binary)))?;
    executable(&target)?;
    let runs = Runs { entrypoint: vec![format!("/usr/local/bin/{binary}")], user: "1000:1000", ..Runs::default() };
    finish(&directory, &archive, &runs)
}

/// The official image.
fn weaver() -> Result<PathBuf> {
    debian("weaver", &official()?)
}

/// What the official image is made of.
fn official() -> Result<Debian> {
    let runs = Runs {
        command: vec!["/bin/bash".to_owned()],
        env: vec!["LANG=C.UTF-8".to_owned()],
        user: "1000:1000",
        directory: "/workspace",
        ..Runs::default()
    };
    Debian::new(&build::root().join("weaver-image/packages"), None, runs)
}

/// For tests: a database's image with an entrypoint of its own.
fn postgres() -> Result<PathBuf> {
    let source = build::root().join("tests/cluster/images/postgres");
    let runs = Runs {
        entrypoint: vec!["/usr/local/bin/entrypoint.sh".to_owned()],
        command: ["postgres", "-c", "listen_addresses=localhost", "-c", "unix_socket_directories=/tmp"]
            .map(str::to_owned)
            .into(),
        env: vec!["PGDATA=/tmp/data".to_owned()],
        user: "999:999",
        ..Runs::default()
    };
    debian("postgres", &Debian::new(&source.join("packages"), Some(source.join("entrypoint.sh")), runs)?)
}

/// For tests: an image with one program and nothing else, not even a shell, in the registry behind a password.
fn alone() -> Result<PathBuf> {
    let (directory, archive) = place("private-alone")?;
    fs::copy("/bin/busybox", directory.join("busybox")).context("the package busybox-static")?;
    finish(&directory, &archive, &Runs::default())
}

/// The program that holds a pod's namespaces.
fn pause() -> Result<PathBuf> {
    let (directory, archive) = place("pause")?;
    fs::copy(tools::directory().join("pause"), directory.join("pause"))?;
    finish(&directory, &archive, &Runs { entrypoint: vec!["/pause".to_owned()], ..Runs::default() })
}

/// An image of Debian packages. Made again when what it is made of changes.
fn debian(name: &str, image: &Debian) -> Result<PathBuf> {
    let images = build::target().join("images");
    let (archive, recipe_file) = (images.join(format!("{name}.tar")), images.join(format!("{name}.recipe")));
    let recipe = image.recipe()?;
    if archive.exists() && fs::read_to_string(&recipe_file).is_ok_and(|earlier| earlier == recipe) {
        return Ok(archive);
    }
    eprintln!("building the image {name} from Debian packages");
    fs::create_dir_all(images)?;
    image.build(&archive)?;
    fs::write(recipe_file, recipe)?;
    Ok(archive)
}

/// What an image of Debian packages is made of.
struct Debian {
    packages: Vec<String>,
    entrypoint: Option<PathBuf>,
    runs: Runs,
}

impl Debian {
    /// `list` is a file with one package on each line.
    fn new(list: &Path, entrypoint: Option<PathBuf>, runs: Runs) -> Result<Self> {
        let text = fs::read_to_string(list).with_context(|| format!("reading {}", list.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        Ok(Self { packages: lines.map(str::to_owned).collect(), entrypoint, runs })
    }

    /// All that it depends on, but Debian itself.
    fn recipe(&self) -> Result<String> {
        let script = self.entrypoint.as_ref().map(fs::read_to_string).transpose()?.unwrap_or_default();
        Ok(format!("{RELEASE}\n{}\n{script}\n{:?}\n", self.packages.join("\n"), self.runs))
    }

    /// Builds it by mmdebstrap. The same packages give the same bytes.
    fn build(&self, archive: &Path) -> Result<()> {
        let layer = archive.with_extension("layer.tar");
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--quiet", "--variant=minbase", "--aptopt=APT::Install-Recommends \"false\""])
            .args(EXCLUDED.map(|path| format!("--dpkgopt=path-exclude={path}")))
            .arg(format!("--include={}", self.packages.join(",")))
            // Whoever a pod runs as has a name, and a home.
            .arg("--customize-hook=chroot \"$1\" useradd --create-home --uid 1000 --shell /bin/bash loom")
            // What says when and where it was built.
            .arg("--customize-hook=rm -rf \"$1\"/var/log/* \"$1\"/var/cache/ldconfig/aux-cache \"$1\"/etc/machine-id")
            .env("SOURCE_DATE_EPOCH", oci::EPOCH);
        if let Some(entrypoint) = &self.entrypoint {
            command.arg(format!("--customize-hook=copy-in {} /usr/local/bin", entrypoint.display()));
        }
        tools::run(command.arg(RELEASE).arg(&layer))?;
        oci::write(archive, &layer, &self.runs)
    }
}

/// An empty directory for an image's files, and its archive's path.
fn place(name: &str) -> Result<(PathBuf, PathBuf)> {
    let images = build::target().join("images");
    let directory = images.join(name);
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    Ok((directory, images.join(format!("{name}.tar"))))
}

fn add(directory: &Path, name: &str, content: &str) -> Result<()> {
    let path = directory.join(name);
    fs::create_dir_all(path.parent().context("a file in a directory")?)?;
    Ok(fs::write(path, content)?)
}

fn executable(path: &Path) -> Result<()> {
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn finish(directory: &Path, archive: &Path, runs: &Runs) -> Result<PathBuf> {
    let layer = archive.with_extension("layer.tar");
    oci::tar(directory, &layer)?;
    oci::write(archive, &layer, runs)?;
    fs::remove_dir_all(directory)?;
    Ok(archive.to_owned())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn the_official_image_is_the_same_whenever_it_is_built() {
        tools::for_images().unwrap();
        let directory = build::target().join("images/again");
        fs::create_dir_all(&directory).unwrap();
        let image = official().unwrap();
        let build = |name| {
            let archive = directory.join(name);
            image.build(&archive).unwrap();
            oci::sha256(&archive).unwrap()
        };
        let (first, second) = thread::scope(|scope| {
            let first = scope.spawn(|| build("first.tar"));
            (build("second.tar"), first.join().unwrap())
        });
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(first, second);
    }
}
