//! Two ways to send requests: a fixed number at a time, or at the times of a Poisson process.
//!
//! In the open loop a request's latency is counted from the time it was due, whether or not a connection
//! was free then, so that waiting is never hidden (no coordinated omission).

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::client::{Answer, Reply, Slate};
use super::random::Random;
use super::server::Server;

/// Connections of the open loop; more requests than these are never on their way at once.
const OPEN_LOOP_CONNECTIONS: usize = 128;

/// One request and what became of it.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    /// When it was sent or due, in seconds from the start.
    pub(super) at: f64,
    /// Milliseconds as the client sees them.
    pub(super) latency_ms: f64,
    /// The slate, or the type of the error.
    pub(super) slate: Result<Slate, String>,
}

/// Everything of one measurement.
#[derive(Clone, Debug)]
pub(super) struct Exchanges {
    pub(super) all: Vec<Exchange>,
    /// From the start to the last answer.
    pub(super) seconds: f64,
}

impl Exchanges {
    /// Milliseconds of the requests that were answered with a slate.
    pub(super) fn latencies(&self) -> Vec<f64> {
        self.all
            .iter()
            .filter(|exchange| exchange.slate.is_ok())
            .map(|exchange| exchange.latency_ms)
            .collect()
    }

    /// Slates of the requests that succeeded.
    pub(super) fn slates(&self) -> impl Iterator<Item = &Slate> {
        self.all.iter().filter_map(|exchange| exchange.slate.as_ref().ok())
    }

    /// Requests that were refused with a typed error.
    pub(super) fn refused(&self) -> usize {
        self.all.len() - self.slates().count()
    }
}

/// Sends all bodies, `concurrency` at a time.
///
/// # Errors
///
/// When a request got no answer, or one that is neither a slate nor a typed error.
pub(super) fn closed(server: &Server, bodies: &[Vec<u8>], concurrency: usize) -> Result<Exchanges> {
    send(server, bodies, concurrency, None)
}

/// Sends each body at its time of a Poisson process of `rate` requests a second.
///
/// # Errors
///
/// As [`closed`].
pub(super) fn open(server: &Server, bodies: &[Vec<u8>], rate: f64, seed: u64) -> Result<Exchanges> {
    let mut random = Random::new(seed);
    let mut time = 0.0;
    let mut due = || {
        time += random.gap(rate);
        time
    };
    let due: Vec<f64> = bodies.iter().map(|_| due()).collect();
    send(server, bodies, OPEN_LOOP_CONNECTIONS.min(bodies.len()), Some(&due))
}

fn send(server: &Server, bodies: &[Vec<u8>], connections: usize, due: Option<&[f64]>) -> Result<Exchanges> {
    let next = AtomicUsize::new(0);
    let replies: Mutex<Vec<(f64, f64, Result<Reply>)>> = Mutex::new(Vec::with_capacity(bodies.len()));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..connections {
            scope.spawn(|| {
                let client = server.client();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(body) = bodies.get(index) else { return };
                    let at = due.map_or_else(|| start.elapsed().as_secs_f64(), |due| due[index]);
                    let at_time = start + Duration::from_secs_f64(at);
                    std::thread::sleep(at_time.saturating_duration_since(Instant::now()));
                    let reply = client.recommend(body);
                    let late = match (&reply, due) {
                        // Without a schedule the client's own clock is the finer one.
                        (Ok(reply), None) => reply.elapsed,
                        _ => at_time.elapsed(),
                    };
                    if let Ok(mut replies) = replies.lock() {
                        replies.push((at, 1e3 * late.as_secs_f64(), reply));
                    }
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let replies = replies.into_inner().map_err(|_| anyhow!("a connection's thread panicked"))?;
    let mut all = Vec::with_capacity(replies.len());
    for (at, latency_ms, reply) in replies {
        let slate = match reply?.read()? {
            Answer::Slate(slate) => Ok(slate),
            Answer::Refused(kind) => Err(kind),
        };
        all.push(Exchange { at, latency_ms, slate });
    }
    all.sort_by(|a, b| a.at.total_cmp(&b.at));
    Ok(Exchanges { all, seconds })
}
