//! Strangers: whoever can reach the server's port, and has no token. Each has an address of its own on loopback, because
//! the server's limits are per address.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

use crate::system::TIMEOUT;

/// Connections that one address makes at once during an attack.
const FLOOD: usize = 500;
/// The lowest priority: strangers have machines of their own, and take no time from the server's and the user's.
const NICE: i32 = 19;
/// Connections a second that come from as many addresses.
const PER_SECOND: u32 = 36;

/// A stranger's machine.
pub struct Stranger {
    pub server: SocketAddr,
    pub address: Ipv4Addr,
    /// Which one it is.
    pub number: usize,
}

impl Stranger {
    pub fn connect(&self) -> Result<TcpStream> {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&socket, &SocketAddr::new(IpAddr::V4(self.address), 0))?;
        connect(&socket, &self.server)?;
        let stream = TcpStream::from(socket);
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(stream)
    }

    /// Sends the head of a request without its end.
    pub fn send_half_a_head(&self) -> Result<TcpStream> {
        let mut stream = self.connect()?;
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: here\r\nX-Long: ")?;
        stream.write_all(&[b'a'; 8 << 10])?;
        Ok(stream)
    }

    /// Sends a request's body without its end.
    pub fn send_an_unfinished_body(&self) -> Result<TcpStream> {
        let mut stream = self.connect()?;
        stream.write_all(
            b"POST /api/login/device HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n\
              Content-Length: 1048576\r\n\r\n{\"client_name\": \"",
        )?;
        // Some send almost all of it, others stop before the server has had enough.
        let length = if self.number.is_multiple_of(2) { 1 << 20 } else { 2 << 10 };
        // One who is answered before may be cut off.
        let _ = stream.write_all(&vec![b'a'; length - 100]);
        Ok(stream)
    }
}

/// Attacks the server with [`PER_SECOND`] connections, each from another address and left as `open` leaves it, and with
/// [`FLOOD`] at once from one address. Meanwhile it calls `honest` again and again; the first failure of that is
/// returned, else the connections.
pub fn attack(
    server: SocketAddr,
    duration: Duration,
    open: impl Fn(&Stranger) -> Result<TcpStream> + Sync,
    mut honest: impl FnMut() -> Result<()>,
) -> Result<Vec<TcpStream>> {
    let start = Instant::now();
    let open = |address, number| open(&Stranger { server, address, number });
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            yield_to_others();
            (0..FLOOD).flat_map(|number| open(Ipv4Addr::new(127, 0, 0, 66), number)).collect()
        });
        let many = scope.spawn(|| {
            yield_to_others();
            let mut streams = Vec::new();
            for number in 0.. {
                let next = start + Duration::from_secs(1) * number / PER_SECOND;
                if next > start + duration {
                    break;
                }
                thread::sleep(next.saturating_duration_since(Instant::now()));
                let [_, _, high, low] = (number + 1).to_be_bytes();
                streams.extend(open(Ipv4Addr::new(127, 1, high, low), number as usize));
            }
            streams
        });
        while start.elapsed() < duration {
            honest()?;
        }
        let mut streams: Vec<TcpStream> = flood.join().unwrap_or_default();
        streams.extend(many.join().unwrap_or_default());
        Ok(streams)
    })
}

/// Gives this thread, on Linux not the process, the lowest priority.
fn yield_to_others() {
    // If that fails, the attack is only more of a burden.
    let _ = rustix::process::setpriority_process(None, NICE);
}

/// Whether the server has closed a connection, whatever it said before.
#[must_use]
pub fn is_closed(mut stream: &TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return true;
    }
    let mut answer = [0; 1024];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}
