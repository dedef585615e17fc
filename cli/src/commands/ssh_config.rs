//! `loom ssh-config`.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use loom_api::tunnel::SshAuthority;
use russh::keys::PublicKey;

use crate::{
    context::Context,
    error::{CliError, Exit, Result},
    output,
    ssh::quote,
};

/// Let ssh, scp, sftp, rsync and editors reach weavers as ID.loom
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Writes ~/.ssh/loom/config and ~/.ssh/loom/known_hosts, and one Include line at the top of ~/.ssh/config. Then:
  ssh W-….loom
  scp file W-….loom:
Hosts are whole ids, because these are what the weavers' host certificates are for; names and prefixes are for loom ssh.
The host is verified by the server's certificate: no question, and no StrictHostKeyChecking no. Run it again after another login.")]
pub(crate) struct Args {
    /// Print what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
}

const INCLUDE: &str = "Include loom/config";

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let home = std::env::var_os("HOME").map(PathBuf::from).ok_or_else(|| CliError::failure("HOME is not set"))?;
    let ssh = home.join(".ssh");
    let loom = ssh.join("loom");
    let authority: SshAuthority = context.client()?.get("/api/ssh-ca").await?;
    let program = std::env::current_exe()?;
    let program = program.to_str().ok_or_else(|| {
        CliError::failure(format!(
            "cannot put {} into OpenSSH's configuration: the path is not UTF-8",
            program.display()
        ))
    })?;
    let server_url = context.server_url()?;
    let config = config(program, &loom, &server_url);
    let known_hosts = known_hosts(&authority.public_key)?;
    if args.dry_run {
        output::line(&format!(
            "# {}\n{config}\n# {}\n{known_hosts}",
            loom.join("config").display(),
            loom.join("known_hosts").display()
        ))?;
        return Ok(Exit::OK);
    }
    write_private(&loom, "config", &config)?;
    write_private(&loom, "known_hosts", &known_hosts)?;
    include(&ssh)?;
    output::note(&format!("OpenSSH now reaches every weaver of {server_url} as ID.loom"));
    Ok(Exit::OK)
}

/// The file for OpenSSH (ssh_config(5)). Host names are weavers' ids, because the host certificates are for these.
fn config(program: &str, directory: &Path, server_url: &str) -> String {
    // OpenSSH first expands percent signs, then a shell runs the command.
    let command = quote(&[program, "ssh", "--server-url", server_url, "--stdio"].map(ToOwned::to_owned));
    let known_hosts = directory.join("known_hosts");
    format!(
        "# Written by loom ssh-config for {server_url}.\n\
         Host *.loom\n\
         \x20   User loom\n\
         \x20   ProxyCommand {} %h\n\
         \x20   UserKnownHostsFile \"{}\"\n\
         \x20   GlobalKnownHostsFile /dev/null\n\
         \x20   StrictHostKeyChecking yes\n\
         \x20   HostKeyAlgorithms ssh-ed25519-cert-v01@openssh.com\n\
         \x20   CheckHostIP no\n",
        command.replace('%', "%%"),
        known_hosts.display().to_string().replace('%', "%%"),
    )
}

/// The line for OpenSSH's known_hosts file (sshd(8)).
///
/// # Errors
///
/// When the server's answer is not a key, and could add other lines to the file.
fn known_hosts(authority: &str) -> Result<String> {
    let key = PublicKey::from_openssh(authority.trim())
        .ok()
        .and_then(|key| key.to_openssh().ok())
        .ok_or_else(|| CliError::failure("the server's SSH CA key cannot be parsed"))?;
    let line: Vec<&str> = key.split_whitespace().take(2).collect();
    Ok(format!("@cert-authority *.loom {}\n", line.join(" ")))
}

/// Adds the Include line to the user's own file, unless it is there. It must be at the top: further down it would belong
/// to a Host block.
fn include(ssh: &Path) -> Result<()> {
    let path = ssh.join("config");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(CliError::failure(format!("reading {}: {error}", path.display()))),
    };
    if text.lines().any(|line| line.trim() == INCLUDE) {
        return Ok(());
    }
    // If the file is a link, change its target.
    let path = fs::canonicalize(&path).unwrap_or(path);
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(CliError::failure(format!("{} cannot be written", path.display())));
    };
    write_private(directory, name, &format!("{INCLUDE}\n\n{text}"))
}

/// Replaces a file atomically, with mode 0600 in a 0700 directory.
fn write_private(directory: &Path, name: &str, text: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let temporary = directory.join(format!(".{name}.{}", std::process::id()));
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?
            .write_all(text.as_bytes())?;
        fs::rename(temporary, directory.join(name))
    };
    write().map_err(|error| CliError::failure(format!("writing {}: {error}", directory.join(name).display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const AUTHORITY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ loom\n";

    #[test]
    fn the_include_line_is_put_first_and_once() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("config"), "Host a\n  User b\n").unwrap();
        include(directory.path()).unwrap();
        include(directory.path()).unwrap();
        let text = fs::read_to_string(directory.path().join("config")).unwrap();
        assert_eq!(text, "Include loom/config\n\nHost a\n  User b\n");
    }

    #[test]
    fn what_is_written_is_the_users_alone() {
        let home = tempfile::tempdir().unwrap();
        let loom = home.path().join(".ssh/loom");
        write_private(&loom, "config", "x").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&loom.join("config")), 0o600);
        assert_eq!(mode(&loom), 0o700);
        assert_eq!(mode(loom.parent().unwrap()), 0o700);
        assert_eq!(fs::read_dir(&loom).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn odd_paths_reach_openssh_as_they_are() {
        let text = config("/opt/my tools/100%/loom", Path::new("/home/a b/.ssh/loom"), "https://loom.example");
        assert!(
            text.contains("ProxyCommand '/opt/my tools/100%%/loom' ssh --server-url https://loom.example --stdio %h\n"),
            "{text}"
        );
        assert!(text.contains("UserKnownHostsFile \"/home/a b/.ssh/loom/known_hosts\"\n"), "{text}");
    }

    #[test]
    fn a_server_cannot_add_lines_to_the_known_hosts() {
        assert_eq!(
            known_hosts(AUTHORITY).unwrap(),
            "@cert-authority *.loom ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ\n"
        );
        for hostile in ["", "nonsense", "ssh-ed25519 AAAA\n* ssh-ed25519 BBBB"] {
            assert!(known_hosts(hostile).is_err(), "{hostile:?}");
        }
    }
}
