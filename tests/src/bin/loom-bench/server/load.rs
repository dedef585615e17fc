//! Many clients at once, each of which sends its next request when the last one was answered.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::http::Connection;

/// What one client, or all of them, saw.
#[derive(Default)]
pub(super) struct Tally {
    /// How long each kind of request took.
    times: BTreeMap<&'static str, Vec<Duration>>,
    statuses: BTreeMap<u16, usize>,
    /// From the first request to the last answer.
    elapsed: Duration,
}

/// A client under load.
pub(super) struct Client<'a> {
    connection: Connection,
    token: &'a str,
    tally: Tally,
}

impl Client<'_> {
    /// Makes a request and counts it as one of `kind`; the status and body of its answer.
    pub(super) fn request(&mut self, kind: &'static str, method: &str, path: &str, body: &str) -> Result<(u16, &[u8])> {
        let start = Instant::now();
        let (status, body) = self.connection.request(method, path, self.token, body)?;
        self.tally.times.entry(kind).or_default().push(start.elapsed());
        *self.tally.statuses.entry(status).or_default() += 1;
        Ok((status, body))
    }
}

/// Has `clients` do `work` again and again for so long.
pub(super) fn run(
    server: SocketAddr,
    token: &str,
    clients: usize,
    duration: Duration,
    work: impl Fn(&mut Client<'_>) -> Result<()> + Sync,
) -> Result<Tally> {
    let start = Instant::now();
    each(clients, |_| {
        let mut client = Client { connection: Connection::open(server)?, token, tally: Tally::default() };
        while start.elapsed() < duration {
            work(&mut client)?;
        }
        Ok(client.tally)
    })
    .map(|tallies| Tally::of(tallies, start.elapsed()))
}

/// Does `work` in so many threads, which are numbered; what each returns.
pub(super) fn each<T: Send>(threads: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..threads).map(|number| scope.spawn(move || work(number))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

impl Tally {
    fn of(tallies: Vec<Self>, elapsed: Duration) -> Self {
        let mut all = Self { elapsed, ..Self::default() };
        for tally in tallies {
            for (kind, times) in tally.times {
                all.times.entry(kind).or_default().extend(times);
            }
            for (status, count) in tally.statuses {
                *all.statuses.entry(status).or_default() += count;
            }
        }
        all.times.values_mut().for_each(|times| times.sort());
        all
    }

    /// Only one of a hundred requests of a kind took longer.
    pub(super) fn p99(&self, kind: &str) -> Duration {
        self.times.get(kind).and_then(|times| times.get(times.len() * 99 / 100)).copied().unwrap_or_default()
    }

    /// How many requests were answered with a status that `wanted` names.
    pub(super) fn count(&self, wanted: impl Fn(u16) -> bool) -> usize {
        self.statuses.iter().filter(|(status, _)| wanted(**status)).map(|(_, count)| count).sum()
    }

    /// Fails unless all was answered with success.
    pub(super) fn all_succeeded(self) -> Result<Self> {
        ensure!(self.count(|status| !(200..300).contains(&status)) == 0, "answers by status: {:?}", self.statuses);
        Ok(self)
    }

    /// A row of the table of requests for each kind.
    pub(super) fn rows(&self, load: &str) -> Vec<String> {
        let milliseconds = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        let row = |(kind, times): (&&str, &Vec<Duration>)| {
            #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
            let rate = times.len() as f64 / self.elapsed.as_secs_f64();
            let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
            let [median, p99, worst] = [median, self.p99(kind), worst].map(milliseconds);
            format!("| {load} | {kind} | {rate:.0} | {median} | {p99} | {worst} |")
        };
        self.times.iter().map(row).collect()
    }
}
