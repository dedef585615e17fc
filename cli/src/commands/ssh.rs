//! `loom ssh`.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read, Write},
    net::Shutdown,
    os::fd::AsFd as _,
    thread,
};

use clap_complete::ArgValueCandidates;
use loom_api::tunnel::SSH_PORT;

use crate::{
    completion,
    context::Context,
    daemon::client,
    error::{CliError, Exit, Result},
    ssh::{self, Remote},
};

/// Bytes read at once for `--stdio`.
const COPY_BUFFER: usize = 64 * 1024;

/// Open a shell in a weaver, or run a command in one, over SSH
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  loom ssh ID                     a login shell; ~. at the beginning of a line ends the connection
  loom ssh ID -- make test        a command line, run by the shell there; its exit code is yours
  loom ssh ID -t -- htop          a command that wants a terminal

The tunnel is brought up by itself. No sshd, no keys, no question: the host is verified by the server's certificate.
For ssh, scp, rsync and editors: loom ssh-config")]
pub(crate) struct Args {
    /// The weaver: its id, a prefix of it, or its name
    #[arg(value_name = "ID", add = ArgValueCandidates::new(completion::weavers))]
    weaver: String,
    /// Run the command on a terminal
    #[arg(short = 't', long)]
    tty: bool,
    /// Carry another program's SSH connection on standard input and output: OpenSSH's ProxyCommand
    #[arg(long, conflicts_with_all = ["tty", "command"])]
    stdio: bool,
    /// A command line for the weaver's shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Result<Exit> {
    let connected = client::connect(context, &args.weaver, SSH_PORT).await?;
    if args.stdio {
        return stdio(connected.stream).await;
    }
    let command = (!args.command.is_empty()).then(|| args.command.join(" "));
    let terminal = args.tty || (command.is_none() && io::stdin().is_terminal());
    Box::pin(ssh::run(context, connected, Remote { command, terminal, env: Vec::new() })).await
}

/// Copies between standard input and output and a stream until the stream ends.
///
/// Uses two blocking threads, which cost less per packet than the async runtime.
async fn stdio(stream: tokio::net::UnixStream) -> Result<Exit> {
    let mut from = stream.into_std()?;
    from.set_nonblocking(false)?;
    let mut to = from.try_clone()?;
    // The raw descriptors: the standard library's handles buffer output until the end of a line.
    let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    // Not joined, because standard input may never end; the thread ends with the process.
    thread::spawn(move || {
        // An error here means that the other side is done, so there is nothing left to send.
        let _ = copy(&mut stdin, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let copied = tokio::task::spawn_blocking(move || copy(&mut from, &mut stdout)).await;
    match copied.map_err(io::Error::other).flatten() {
        Ok(()) => Ok(Exit::OK),
        // The program that started us has exited.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::OK),
        Err(error) => Err(CliError::failure(format!("the connection to the loom daemon broke: {error}"))),
    }
}

/// Copies until the end of the input.
///
/// Not [`io::copy`], which splices a socket into a pipe: while the kernel waits for the socket it holds the pipe's lock,
/// so the pipe's reader cannot get what is already in it.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
