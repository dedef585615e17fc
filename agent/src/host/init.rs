//! The host's lifecycle, as PID 1 or as a subreaper: what it starts, which signals it forwards, and how it ends.

use std::{ffi::OsString, io, path::Path, pin::pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use rustix::process::{Signal, getpid, set_child_subreaper};
use tokio::{
    signal::unix::{Signal as Signals, SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::task::TaskTracker;

use super::{Host, socket};
use crate::protocol::LINGER;

/// Between `SIGTERM` and killing everything.
const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// How long to wait for the exit to be reported when the host was told to stop: the sidecar is usually gone already.
const LINGER_WHEN_STOPPED: Duration = Duration::from_millis(500);
/// Between checks of the listening ports, while a client watches.
const PORTS_INTERVAL: Duration = Duration::from_secs(1);
/// The signals that are forwarded to the main program's process group.
const FORWARDED: [Signal; 6] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// Runs until the main program has ended and the sidecar knows it; returns its exit code.
///
/// # Errors
///
/// When the host cannot listen in `run_dir`, or not handle signals.
pub(super) async fn run(run_dir: &Path, image: Vec<(OsString, OsString)>) -> anyhow::Result<u8> {
    // PID 1 inherits orphans anyway; any other process must ask for it.
    set_child_subreaper(Some(getpid())).context("cannot become the reaper of orphans")?;
    let (host, started) = Host::new(image);
    let host = Arc::new(host);
    let children_ended = signal(SignalKind::child()).context("cannot handle signals")?;
    let mut signals = forwarded_signals().context("cannot handle signals")?;
    let listener = socket::bind(run_dir).with_context(|| format!("cannot listen in {}", run_dir.display()))?;
    let connections = TaskTracker::new();
    let mut serving = pin!(socket::serve(&host, &listener, &connections));
    let mut reaping = pin!(reap(&host, children_ended));
    let mut watching = pin!(watch_ports(&host));
    let program = async {
        let Ok(program) = started.await else {
            return std::future::pending().await;
        };
        let main = host.main.borrow().clone().expect("set before the program is handed over");
        (main.terminal.run(program).await, main)
    };
    let mut program = pin!(program);
    let mut deadline = None;
    let mut linger = LINGER;
    let (status, main) = loop {
        tokio::select! {
            ended = &mut program => break ended,
            Some(signal) = signals.recv() => {
                let Some(main) = host.main.borrow().clone() else {
                    tracing::info!(signal = signal.as_raw(), "stopped before the main program was started");
                    return Ok(code(128 + signal.as_raw()));
                };
                for signal in main.terminal.signals_for(signal) {
                    host.children.signal_group(main.terminal.leader(), signal);
                }
                if signal == Signal::TERM {
                    linger = LINGER_WHEN_STOPPED;
                    deadline.get_or_insert_with(|| Instant::now() + GRACE_PERIOD);
                }
            }
            () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                tracing::warn!("the main program did not end in time; killing all processes");
                host.children.kill_all();
                deadline = None;
            }
            () = &mut serving => unreachable!("never returns"),
            () = &mut reaping => unreachable!("never returns"),
            () = &mut watching => unreachable!("never returns"),
        }
    };
    tracing::info!(code = status.code, "the main program has ended");
    host.finish(status.code, &main.terminal.tail());
    connections.close();
    let heard = async {
        host.reported.cancelled().await;
        connections.wait().await;
    };
    tokio::select! {
        () = heard => {}
        () = tokio::time::sleep(linger) => {}
        () = serving => {}
        () = reaping => {}
    }
    host.children.kill_all();
    Ok(code(status.code))
}

async fn reap(host: &Host, mut children_ended: Signals) {
    loop {
        // Children may have ended before the signal handler was installed.
        host.children.reap();
        if children_ended.recv().await.is_none() {
            return std::future::pending().await;
        }
    }
}

async fn watch_ports(host: &Host) {
    let mut interval = tokio::time::interval(PORTS_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if host.state.receiver_count() > 0 {
            host.refresh_ports();
        }
    }
}

/// All forwarded signals in one queue. As usual with signals, several of a kind may be merged into one.
fn forwarded_signals() -> io::Result<mpsc::Receiver<Signal>> {
    let (sender, queue) = mpsc::channel(FORWARDED.len());
    for kind in FORWARDED {
        let mut arrivals = signal(SignalKind::from_raw(kind.as_raw()))?;
        let sender = sender.clone();
        // Ends with the host, when the receiver is dropped.
        tokio::spawn(async move { while arrivals.recv().await.is_some() && sender.send(kind).await.is_ok() {} });
    }
    Ok(queue)
}

/// The operating system keeps one byte of an exit code.
fn code(code: i32) -> u8 {
    u8::try_from(code & 0xff).expect("masked")
}
