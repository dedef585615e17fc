//! A small HTTP client for load: one kept connection, and as little work for each request as there can be, because the
//! client takes its time from the same two cores as the server.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// After so long a request counts as not answered.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to the server.
pub(super) struct Connection {
    stream: BufReader<TcpStream>,
    line: String,
    body: Vec<u8>,
}

impl Connection {
    pub(super) fn open(server: SocketAddr) -> Result<Self> {
        Self::over(TcpStream::connect(server)?)
    }

    /// Uses a connection that is open already.
    pub(super) fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::with_capacity(64 << 10, stream), line: String::new(), body: Vec::new() })
    }

    /// Sends a request; the status of its answer, and the answer's body.
    pub(super) fn request(&mut self, method: &str, path: &str, token: &str, body: &str) -> Result<(u16, &[u8])> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.get_mut().write_all(head.as_bytes())?;
        let status = self.read_line()?.split(' ').nth(1).context("no status")?.parse()?;
        let mut length = 0;
        loop {
            let line = self.read_line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
            ensure!(!line.starts_with("transfer-encoding:"), "an answer in chunks is not for this client");
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body)?;
        Ok((status, &self.body))
    }

    fn read_line(&mut self) -> Result<&str> {
        self.line.clear();
        ensure!(self.stream.read_line(&mut self.line)? > 0, "the server closed the connection");
        Ok(self.line.trim_end())
    }
}
