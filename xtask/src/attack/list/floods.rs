//! More requests than can be answered.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::neighbours::history;
use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::server::Server;
use crate::attack::wire;

const CLIENTS: usize = 150;
/// Arrivals each second of the open flood.
const RATE: f64 = 400.0;
/// How soon the server must serve again.
const RECOVERY: Duration = Duration::from_secs(10);

fn request(arena: &Arena) -> Result<String> {
    let history = history(&arena.checkpoint, 30)?;
    let body = format!(r#"{{"history":{history},"num_items":10,"beam_width":50,"timeout_ms":3000}}"#);
    Ok(wire::post("/v1/recommend", &body).replacen("host: x", "host: x\r\nconnection: close", 1))
}

/// Clients that each ask again as soon as they were answered.
pub(super) fn closed(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let request = request(arena)?;
    let (over, counts) = (AtomicBool::new(false), Counts::default());
    let bystanders = Bystanders::watch(&server);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    counts.ask(&server, &request);
                }
            });
        }
        std::thread::sleep(arena.time);
        over.store(true, Ordering::Relaxed);
    });
    Ok(judge(&server, &counts, bystanders))
}

/// Requests that arrive at a rate. Their answers are read by threads that come and go.
pub(super) fn open(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let request = request(arena)?;
    let counts = Counts::default();
    let bystanders = Bystanders::watch(&server);
    std::thread::scope(|scope| {
        let start = Instant::now();
        let total = (arena.time.as_secs_f64() * RATE) as usize;
        for index in 0..total {
            let due = start + Duration::from_secs_f64(index as f64 / RATE);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            scope.spawn(|| counts.ask(&server, &request));
        }
    });
    Ok(judge(&server, &counts, bystanders))
}

#[derive(Default)]
struct Counts {
    answered: AtomicUsize,
    refused: AtomicUsize,
    late: AtomicUsize,
    failed: AtomicUsize,
}

impl Counts {
    fn ask(&self, server: &Server, request: &str) {
        let answer = wire::connect(server.address).and_then(|mut stream| {
            stream.write_all(request.as_bytes())?;
            Ok(wire::read_all(&mut stream, Duration::from_secs(10)))
        });
        let counter = match answer.map_or(0, |answer| wire::status(&answer)) {
            200 => &self.answered,
            429 | 503 => &self.refused,
            504 => &self.late,
            _ => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn judge(server: &Server, counts: &Counts, bystanders: Bystanders) -> Outcome {
    let witness = bystanders.stop();
    let [answered, refused, late, failed] = [&counts.answered, &counts.refused, &counts.late, &counts.failed]
        .map(|count| count.load(Ordering::Relaxed));
    let small = r#"{"history":[],"num_items":5}"#;
    let recovered = server.within(RECOVERY, |server| {
        server.post("/v1/recommend", small).is_ok_and(|answer| answer.status == 200)
    });
    let mut outcome = Outcome {
        happened: format!(
            "{answered} answered, {refused} refused, {late} too late, {failed} without an answer"
        ),
        witness: Some(witness),
        ..Outcome::default()
    };
    outcome.expect(failed == 0, format!("{failed} requests had no answer"));
    outcome.expect(answered > 0, "nothing was answered");
    outcome.expect(recovered, "the server does not recover");
    outcome
}
