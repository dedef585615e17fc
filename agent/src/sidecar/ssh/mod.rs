//! The SSH server on port 22 of the weaver's address in the tunnel.
//!
//! The tunnel has already authenticated the device, so SSH requires no authentication; the client verifies the host key,
//! which the server's SSH CA has signed. There are sessions (shell, exec, sftp) that run in the user's container, and
//! connections to the weaver's own ports; nothing else.
//!
//! - [`session`]: a session channel's program; [`direct`]: a forwarded connection; [`environment`]: the client's
//!   variables.
//! - [`mod@inbox`]: the queue of a client's input for a channel's task.
//!
//! Each connection is a loop in `russh` that calls [`Connection`], where nothing may block. Each channel is a task.

mod direct;
mod environment;
mod inbox;
mod session;

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv6Addr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use loom_api::{Secret, WeaverId};
use loom_tunnel::TunnelStream;
use russh::{
    Channel, ChannelId, ChannelOpenFailure, ChannelWriteHalf, MethodKind, MethodSet, Sig, SshId,
    keys::{Certificate, PrivateKey},
    server::{Auth, ChannelOpenHandle, Config, Handler, Msg, Session},
};
use tokio::task::JoinSet;

use self::inbox::{HIGH_WATER, Inbox, Input, inbox};
use super::Sidecar;
use crate::protocol::{ExecRequest, HostClient, Program, Pty};

/// The receive window of a channel, in bytes.
const WINDOW: u32 = 4 << 20;
/// The window's target size while a program does not keep up: the window is reopened only when it is used up, and by
/// next to nothing.
const MINIMAL_WINDOW: u32 = 2;
/// Concurrent channels of one connection.
const MAX_CHANNELS: usize = 256;
/// Variables that a client may set on one channel.
const MAX_VARIABLES: usize = 128;

/// The SSH server's configuration, with the host key and its certificate.
pub(super) fn config(key: &PrivateKey, certificate: &str) -> Arc<Config> {
    let certificates = match Certificate::from_openssh(certificate) {
        Ok(certificate) => vec![certificate],
        Err(error) => {
            tracing::warn!("the server's certificate for the SSH host key cannot be used: {error}");
            Vec::new()
        }
    };
    Arc::new(Config {
        server_id: SshId::Standard(concat!("SSH-2.0-loom_", env!("CARGO_PKG_VERSION")).into()),
        methods: MethodSet::from(&[MethodKind::None][..]),
        auth_rejection_time: Duration::ZERO,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![key.clone()],
        certificates,
        window_size: WINDOW,
        inactivity_timeout: None,
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 3,
        nodelay: true,
        ..Config::default()
    })
}

/// Serves one connection until it ends.
pub(super) async fn serve(
    sidecar: &Sidecar,
    address: Ipv6Addr,
    user: &str,
    stream: TunnelStream,
) -> anyhow::Result<()> {
    let connection = Connection {
        host: sidecar.host.clone(),
        weaver: sidecar.config.weaver,
        address,
        user: user.to_owned(),
        channels: HashMap::new(),
        tasks: JoinSet::new(),
    };
    Ok(russh::server::run_stream(sidecar.ssh(), stream, connection).await?.await?)
}

/// A client's connection. Its channels end with it.
struct Connection {
    host: HostClient,
    weaver: WeaverId,
    address: Ipv6Addr,
    user: String,
    channels: HashMap<ChannelId, Slot>,
    tasks: JoinSet<()>,
}

/// A channel.
enum Slot {
    /// A session whose program was not requested yet.
    Waiting(Prepared),
    /// A task serves it.
    Running(Inbox),
}

/// A session's settings before its program is requested.
struct Prepared {
    write: ChannelWriteHalf<Msg>,
    env: BTreeMap<String, Secret>,
    pty: Option<Pty>,
}

impl Connection {
    /// Removes channels whose tasks have ended; returns whether there is room for another.
    fn has_room(&mut self) -> bool {
        while self.tasks.try_join_next().is_some() {}
        self.channels.retain(|_, slot| !matches!(slot, Slot::Running(inbox) if inbox.is_over()));
        self.channels.len() < MAX_CHANNELS
    }

    fn prepared(&mut self, channel: ChannelId) -> Option<&mut Prepared> {
        match self.channels.get_mut(&channel) {
            Some(Slot::Waiting(prepared)) => Some(prepared),
            _ => None,
        }
    }

    /// Starts the session's program; a second one on the same channel is refused.
    fn start(&mut self, channel: ChannelId, program: Program, session: &mut Session) -> Result<(), russh::Error> {
        let Some(Prepared { write, mut env, pty }) = self.channels.remove(&channel).and_then(|slot| match slot {
            Slot::Waiting(prepared) => Some(prepared),
            running @ Slot::Running(_) => {
                self.channels.insert(channel, running);
                None
            }
        }) else {
            return session.channel_failure(channel);
        };
        env.insert("LOOM_USER".to_owned(), Secret::from(self.user.clone()));
        let (inbox, inputs) = inbox();
        self.channels.insert(channel, Slot::Running(inbox));
        let client = session::Client { write, handle: session.handle() };
        let request = ExecRequest { program, env, cwd: None, pty };
        // The reply must precede anything that the task sends.
        session.channel_success(channel)?;
        self.tasks.spawn(session::run(self.host.clone(), request, client, inputs));
        Ok(())
    }

    /// Queues a client's input; closes the channel if the client ignores its window.
    fn push(&mut self, channel: ChannelId, input: Input, session: &mut Session) -> Result<(), russh::Error> {
        if let Some(Slot::Running(inbox)) = self.channels.get(&channel)
            && !inbox.push(input)
        {
            tracing::warn!(user = self.user, "a client exceeds its window; closing the channel");
            self.channels.remove(&channel);
            session.close(channel)?;
        }
        Ok(())
    }
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_none(&mut self, _user: &str) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        // Drop the reading half, a bounded queue on which the loop would block.
        let (_, write) = channel.split();
        self.channels.insert(write.id(), Slot::Waiting(Prepared { write, env: BTreeMap::new(), pty: None }));
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host_to_connect: &str,
        port_to_connect: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let port = u16::try_from(port_to_connect).ok().filter(|port| *port > 0);
        let Some(port) = port.filter(|_| direct::is_the_weaver(host_to_connect, self.weaver, self.address)) else {
            reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
            return Ok(());
        };
        if !self.has_room() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let (_, write) = channel.split();
        let (inbox, inputs) = inbox();
        self.channels.insert(write.id(), Slot::Running(inbox));
        self.tasks.spawn(direct::run(self.host.clone(), port, reply, write, inputs));
        Ok(())
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        variable_name: &str,
        variable_value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        if environment::may_set(variable_name, variable_value)
            && let Some(prepared) = self.prepared(channel)
            && prepared.env.len() < MAX_VARIABLES
        {
            prepared.env.insert(variable_name.to_owned(), Secret::from(variable_value.to_owned()));
            return session.channel_success(channel);
        }
        session.channel_failure(channel)
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        term: &str,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        _modes: &[(russh::Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let Some(prepared) = self.prepared(channel) else { return session.channel_failure(channel) };
        prepared.pty = Some(Pty { term: term.to_owned(), rows: cells(row_height), cols: cells(col_width) });
        session.channel_success(channel)
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.start(channel, Program::LoginShell, session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        data: &[u8],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match std::str::from_utf8(data) {
            Ok(line) => self.start(channel, Program::Shell(line.to_owned()), session),
            Err(_) => session.channel_failure(channel),
        }
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        match name {
            "sftp" => self.start(channel, Program::Sftp, session),
            _ => session.channel_failure(channel),
        }
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        col_width: u32,
        row_height: u32,
        _pix_width: u32,
        _pix_height: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        let (rows, cols) = (cells(row_height), cells(col_width));
        self.push(channel, Input::Resize { rows, cols }, session)?;
        session.channel_success(channel)
    }

    async fn signal(&mut self, channel: ChannelId, signal: Sig, session: &mut Session) -> Result<(), Self::Error> {
        self.push(channel, Input::Signal(signal_name(signal)), session)
    }

    async fn data(&mut self, channel: ChannelId, data: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        self.push(channel, Input::Data(Bytes::copy_from_slice(data)), session)
    }

    fn adjust_window(&mut self, _channel: ChannelId, _current: u32) -> u32 {
        // The target applies to the whole connection, so one slow program holds up all input, though no output.
        let lags = |slot: &Slot| matches!(slot, Slot::Running(inbox) if inbox.waiting() > HIGH_WATER);
        if self.channels.values().any(lags) { MINIMAL_WINDOW } else { WINDOW }
    }

    async fn channel_eof(&mut self, channel: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        self.push(channel, Input::Eof, session)
    }

    async fn channel_close(&mut self, channel: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.channels.remove(&channel);
        Ok(())
    }
}

/// A terminal's width or height.
fn cells(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

/// A signal's name without `SIG` (RFC 4254 §6.10).
fn signal_name(signal: Sig) -> String {
    match signal {
        Sig::Custom(name) => name.chars().take(32).collect(),
        known => format!("{known:?}"),
    }
}
