//! Who must not notice an attack: health checks every 20 ms, and a polite client with small requests.
//!
//! Each runs on a thread of its own and opens a connection for every question, as orchestrators do.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::server::Server;
use super::wire;

/// How often health is asked for.
const HEALTH_EVERY: Duration = Duration::from_millis(20);
/// How often the polite client asks.
const ASK_EVERY: Duration = Duration::from_millis(60);
/// Longest time that either waits for an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the polite client wants.
const SMALL: &str = r#"{"user_id":"polite","history":[],"num_items":5,"beam_width":10}"#;

/// What one of them saw.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Times of answers with status 200, sorted.
    pub(super) answered: Vec<Duration>,
    /// Answers that refused.
    pub(super) refused: usize,
    /// No answer at all.
    pub(super) failed: usize,
    /// What the first of those that were not answered with 200 got.
    pub(super) first_loss: Option<String>,
}

impl Seen {
    /// A quantile of the times.
    pub(super) fn quantile(&self, quantile: f64) -> Duration {
        let last = self.answered.len().saturating_sub(1);
        let index = (last as f64 * quantile).ceil() as usize;
        self.answered.get(index.min(last)).copied().unwrap_or_default()
    }

    /// The longest time.
    pub(super) fn worst(&self) -> Duration {
        self.answered.last().copied().unwrap_or_default()
    }

    /// Everything that was asked.
    pub(super) fn asked(&self) -> usize {
        self.answered.len() + self.refused + self.failed
    }

    fn ask(&mut self, address: SocketAddr, request: &[u8]) {
        let start = Instant::now();
        let answer = wire::connect(address).and_then(|mut stream| {
            stream.write_all(request)?;
            Ok(wire::read_all(&mut stream, PATIENCE))
        });
        let status = answer.as_ref().map_or(0, |answer| wire::status(answer));
        match status {
            200 => self.answered.push(start.elapsed()),
            0 => self.failed += 1,
            _ => self.refused += 1,
        }
        if status != 200 && self.first_loss.is_none() {
            let got = answer.map_or_else(|error| format!("{error:#}"), |answer| quote(&answer));
            self.first_loss = Some(format!("{got} after {} ms", start.elapsed().as_millis()));
        }
    }
}

/// The first line of an answer.
fn quote(answer: &str) -> String {
    match answer.lines().next() {
        Some(line) => line.chars().take(80).collect(),
        None => "nothing".into(),
    }
}

/// What all of them saw.
#[derive(Clone, Debug, Default)]
pub(super) struct Witness {
    pub(super) health: Seen,
    pub(super) polite: Seen,
}

/// Asks in the background until it is told to stop.
pub(super) struct Bystanders {
    over: Arc<AtomicBool>,
    health: JoinHandle<Seen>,
    polite: JoinHandle<Seen>,
}

impl Bystanders {
    /// They begin to ask.
    pub(super) fn watch(server: &Server) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let health = "GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned();
        let polite =
            wire::post("/v1/recommend", SMALL).replacen("host: x", "host: x\r\nconnection: close", 1);
        Self {
            health: ask_on(server.address, health, HEALTH_EVERY, Arc::clone(&over)),
            polite: ask_on(server.address, polite, ASK_EVERY, Arc::clone(&over)),
            over,
        }
    }

    /// They stop, and tell.
    pub(super) fn stop(self) -> Witness {
        self.over.store(true, Ordering::Relaxed);
        let tell = |thread: JoinHandle<Seen>| thread.join().unwrap_or_default();
        Witness { health: tell(self.health), polite: tell(self.polite) }
    }
}

fn ask_on(address: SocketAddr, request: String, every: Duration, over: Arc<AtomicBool>) -> JoinHandle<Seen> {
    std::thread::spawn(move || {
        let mut seen = Seen::default();
        while !over.load(Ordering::Relaxed) {
            let start = Instant::now();
            seen.ask(address, request.as_bytes());
            std::thread::sleep(every.saturating_sub(start.elapsed()));
        }
        seen.answered.sort_unstable();
        seen
    })
}
