//! The measured traffic: one TCP stream one way, and small messages to and fro. The same code on every path.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// One write or read.
const CHUNK: usize = 128 << 10;
/// Round trips of one latency measurement.
const ROUND_TRIPS: usize = 1_000;
/// Bytes of one small message.
const MESSAGE: usize = 32;

/// A stream as it was measured.
pub(crate) struct Throughput {
    /// Bits per second, in thousands of millions.
    pub(crate) gigabits: f64,
}

/// Round-trip times.
pub(crate) struct Latency {
    /// The middle one.
    pub(crate) median: Duration,
    /// One in a hundred is longer.
    pub(crate) p99: Duration,
}

/// Serves measurements at `port` of every address until it is killed: the first byte of a connection says which.
pub(crate) fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        std::thread::spawn(move || drop(serve_one(stream)));
    }
    Ok(())
}

fn serve_one(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0; CHUNK];
    match kind[0] {
        b'u' => {
            let mut total = 0_u64;
            loop {
                match stream.read(&mut buffer)? {
                    0 => break,
                    count => total += count as u64,
                }
            }
            stream.write_all(&total.to_be_bytes())?;
        }
        b'd' => {
            let mut seconds = [0];
            stream.read_exact(&mut seconds)?;
            let end = Instant::now() + Duration::from_secs(seconds[0].into());
            while Instant::now() < end {
                stream.write_all(&buffer)?;
            }
        }
        b'e' => loop {
            let message = &mut buffer[..MESSAGE];
            stream.read_exact(message)?;
            stream.write_all(message)?;
        },
        other => bail!("{other} is no measurement"),
    }
    Ok(())
}

/// Sends as fast as it goes for `seconds`; what arrived counts.
pub(crate) fn upload(server: impl ToSocketAddrs, seconds: u8) -> Result<Throughput> {
    let mut stream = connect(server, b'u')?;
    let buffer = vec![0; CHUNK];
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds.into());
    while Instant::now() < end {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total).context("the server's count")?;
    Ok(Throughput::of(u64::from_be_bytes(total), start.elapsed()))
}

/// Receives as fast as it comes for `seconds`.
pub(crate) fn download(server: impl ToSocketAddrs, seconds: u8) -> Result<Throughput> {
    let mut stream = connect(server, b'd')?;
    stream.write_all(&[seconds])?;
    let mut buffer = vec![0; CHUNK];
    let (start, mut total) = (Instant::now(), 0_u64);
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(Throughput::of(total, start.elapsed())),
            count => total += count as u64,
        }
    }
}

/// Sends small messages and waits for each to come back.
pub(crate) fn echo(server: impl ToSocketAddrs) -> Result<Latency> {
    let mut stream = connect(server, b'e')?;
    let mut message = [0; MESSAGE];
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(Latency { median: times[ROUND_TRIPS / 2], p99: times[ROUND_TRIPS * 99 / 100] })
}

fn connect(server: impl ToSocketAddrs, kind: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

impl Throughput {
    fn of(bytes: u64, elapsed: Duration) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let bits = bytes as f64 * 8.0;
        Self { gigabits: bits / elapsed.as_secs_f64() / 1e9 }
    }
}
