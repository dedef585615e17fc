//! A server with real weavers, and devices on its relay.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use loom_tests::{System, api::metrics, eventually, keys::KeyPair, system::free_port};
use serde_json::{Value, json};
use tungstenite::{ClientRequestBuilder, WebSocket, protocol::WebSocketConfig};

use super::{http::Connection, load::each};

/// For what takes minutes.
const LONG: Duration = Duration::from_secs(600);
/// Clients that make the weavers and their devices, and delete them.
const HANDS: usize = 8;
/// Between two looks at the devices' connections: the server waits 40 s for the answer to a ping.
const LOOK: Duration = Duration::from_secs(1);

/// The server, its weavers, and who may use them.
pub(super) struct Fleet {
    pub(super) system: System,
    pub(super) server: SocketAddr,
    /// The administrator's, who makes the weavers.
    pub(super) token: String,
    pub(super) pid: i32,
    /// The organisation of the weavers.
    org: String,
    metrics: String,
    devices: Option<Devices>,
}

impl Fleet {
    /// Starts a server without weavers.
    pub(super) fn start() -> Result<Self> {
        let metrics = format!("127.0.0.1:{}", free_port()?);
        let system = System::start_with(&[
            ("LOOM_SERVER_MAX_WEAVERS", "2000"),
            // All agents are at one address here, with a connection each on which they registered.
            ("LOOM_SERVER_MAX_CONNECTIONS_PER_ADDRESS", "4096"),
            ("LOOM_SERVER_METRICS_LISTEN", &metrics),
        ])?;
        system.manage(&["org", "create", "bench"])?;
        system.manage(&["org", "add-member", "bench", "admin"])?;
        let token = system.admin_token()?;
        let me = system.request(Some(&token), "GET", "/api/me", None)?.body;
        let organisations = me["organisations"].as_array().into_iter().flatten();
        let org = organisations.filter(|org| org["name"] == "bench").find_map(|org| org["id"].as_str());
        let org = org.context("the organisation")?.to_owned();
        let server = system.url().trim_start_matches("http://").parse()?;
        let pid = system.server_pid().context("the server runs")?;
        Ok(Self { system, server, token, pid, org, metrics, devices: None })
    }

    /// The path of the list of all weavers.
    pub(super) fn list(&self) -> String {
        format!("/api/weavers?org={}", self.org)
    }

    /// The weavers that are listed.
    fn weavers(&self) -> Result<Vec<Value>> {
        let mut connection = Connection::open(self.server)?;
        let (status, body) = connection.request("GET", &self.list(), &self.token, "")?;
        ensure!(status == 200, "listing: {status}");
        Ok(serde_json::from_slice(body)?)
    }

    /// Makes so many weavers, and waits until all run and their agents are connected.
    pub(super) fn make_weavers(&self, count: usize) -> Result<()> {
        let body = json!({"org_id": self.org, "command": ["sleep", "100000"]}).to_string();
        each(HANDS, |hand| {
            let mut connection = Connection::open(self.server)?;
            for _ in (hand..count).step_by(HANDS) {
                let (status, answer) = connection.request("POST", "/api/weavers", &self.token, &body)?;
                ensure!(status == 201, "making a weaver: {status} {}", String::from_utf8_lossy(answer));
            }
            Ok(())
        })?;
        eventually("the weavers to run", LONG, || {
            thread::sleep(LOOK);
            let running = |weaver: &&Value| weaver["status"] == "Running" && weaver["agent"]["connected"] == true;
            Ok((self.weavers()?.iter().filter(running).count() == count).then_some(()))
        })
    }

    /// Connects one more device to the relay for each weaver, all of them another user's.
    pub(super) fn connect_devices(&mut self) -> Result<()> {
        let token = self.system.add_user("ada")?;
        self.system.manage(&["org", "add-member", "bench", "ada"])?;
        let weavers = self.weavers()?;
        let sockets = each(HANDS, |hand| {
            let mut connection = Connection::open(self.server)?;
            let weavers = weavers.iter().skip(hand).step_by(HANDS).filter_map(|weaver| weaver["id"].as_str());
            weavers
                .map(|weaver| connect_device(&mut connection, self.server, &token, weaver))
                .collect::<Result<Vec<_>>>()
        })?;
        self.devices = Some(Devices::keep(sockets.into_iter().flatten().collect()));
        Ok(())
    }

    /// How many agents' control links and how many devices' relay connections are up.
    pub(super) fn connected(&self) -> Result<(usize, usize)> {
        let text = metrics(&self.metrics)?;
        let agents = text.lines().find_map(|line| line.strip_prefix("loom_weavers_agents "));
        let agents = agents.context("no count of agents")?.trim().parse()?;
        Ok((agents, self.devices.as_ref().map_or(0, |devices| devices.open.load(Ordering::Relaxed))))
    }

    /// Waits until nothing is left of weavers that were made and deleted besides the first ones.
    pub(super) fn settle(&self, count: usize) -> Result<()> {
        eventually("deleted weavers to be gone", LONG, || {
            let agents = self.connected()?.0;
            Ok((self.system.count_pods()? == count && agents == count).then_some(()))
        })
    }

    /// Deletes all and stops.
    pub(super) fn stop(self) -> Result<Duration> {
        let start = Instant::now();
        let weavers = self.weavers()?;
        each(HANDS, |hand| {
            let mut connection = Connection::open(self.server)?;
            for weaver in weavers.iter().skip(hand).step_by(HANDS) {
                let path = format!("/api/weavers/{}", weaver["id"].as_str().context("an id")?);
                connection.request("DELETE", &path, &self.token, "")?;
            }
            Ok(())
        })?;
        self.settle(0)?;
        let elapsed = start.elapsed();
        drop(self.devices);
        self.system.stop()?;
        Ok(elapsed)
    }
}

/// Has a new device admitted to a weaver, and connects it to the relay.
fn connect_device(
    connection: &mut Connection,
    server: SocketAddr,
    token: &str,
    weaver: &str,
) -> Result<WebSocket<TcpStream>> {
    let device = KeyPair::generate()?;
    let (_, challenge) = connection.request("GET", "/api/wireguard/challenge", token, "")?;
    let body = device.admission(&serde_json::from_slice(challenge)?)?.to_string();
    let (status, answer) = connection.request("POST", &format!("/api/weavers/{weaver}/tunnel"), token, &body)?;
    ensure!(status == 200, "admitting a device: {status} {}", String::from_utf8_lossy(answer));

    let uri = format!("ws://{server}/api/relay?key={}", device.in_url()).parse()?;
    let request = ClientRequestBuilder::new(uri)
        .with_header("Authorization", format!("Bearer {token}"))
        .with_sub_protocol("loom.relay.v1");
    let config = WebSocketConfig::default().read_buffer_size(4 << 10);
    let (socket, _) = tungstenite::client::client_with_config(request, TcpStream::connect(server)?, Some(config))
        .map_err(|error| anyhow!("connecting to the relay: {error}"))?;
    socket.get_ref().set_nonblocking(true)?;
    Ok(socket)
}

/// Devices' relay connections. A thread answers the server's pings until this is dropped.
struct Devices {
    open: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Devices {
    fn keep(mut sockets: Vec<WebSocket<TcpStream>>) -> Self {
        let (open, stop) = (Arc::new(AtomicUsize::new(sockets.len())), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (open, stop) = (Arc::clone(&open), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    sockets.retain_mut(is_open);
                    open.store(sockets.len(), Ordering::Relaxed);
                    thread::sleep(LOOK);
                }
            })
        };
        Self { open, stop, thread: Some(thread) }
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Reads what has come, which answers pings; whether the connection is still open.
fn is_open(socket: &mut WebSocket<TcpStream>) -> bool {
    loop {
        match socket.read() {
            Ok(_) => {}
            Err(tungstenite::Error::Io(error)) => return error.kind() == ErrorKind::WouldBlock,
            Err(_) => return false,
        }
    }
}
