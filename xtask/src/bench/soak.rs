//! A long time under load: `cargo xtask bench --soak SECONDS`.
//!
//! Arrivals are Poisson; half of the visits are of users who come back, half of strangers. Every request
//! must be answered or refused with a typed error, memory must not grow, and the P99 of a minute must
//! not creep. Memory is compared with what the server was given: weights and KV pages. The rest is the
//! constant.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::load::{Exchanges, closed, open};
use super::record::Record;
use super::server::Launch;
use super::workload::{Population, Workload, strangers};

/// Users who come back.
const USERS: usize = 48;
/// How often memory is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Loads a server for `seconds` at `rate` arrivals a second.
///
/// # Errors
///
/// When a request gets no answer, or one that is neither a slate nor a typed error.
pub(super) fn measure(
    launch: &Launch,
    workload: &Workload,
    seconds: u64,
    rate: f64,
    beams: usize,
) -> Result<Vec<Record>> {
    let server = launch.start(&workload.checkpoint, &[])?;
    eprintln!("  {} MB resident when ready", server.resident_bytes()? / 1_000_000);
    let count = (rate * seconds as f64) as usize;
    let mut population = Population::new(workload, USERS, beams, 77);
    closed(&server, &population.first_visits(), 4)?;
    let known = population.next_visits(count.div_ceil(2));
    let new = strangers(workload, count / 2, beams, 78);
    let mut bodies = Vec::with_capacity(count);
    let (mut known, mut new) = (known.into_iter(), new.into_iter());
    while bodies.len() < count {
        bodies.extend(known.next());
        bodies.extend(new.next());
    }

    let over = AtomicBool::new(false);
    let (done, memory) = std::thread::scope(|scope| -> Result<_> {
        let watch = scope.spawn(|| -> Vec<(f64, u64)> {
            let start = Instant::now();
            let mut seen = Vec::new();
            while !over.load(Ordering::Relaxed) {
                if let Ok(bytes) = server.resident_bytes() {
                    seen.push((start.elapsed().as_secs_f64(), bytes));
                }
                std::thread::sleep(LOOK);
            }
            seen
        });
        let done = open(&server, &bodies, rate, 79);
        over.store(true, Ordering::Relaxed);
        Ok((done?, watch.join().unwrap_or_default()))
    })?;
    ensure!(done.all.len() == bodies.len(), "{} of {} requests got an answer", done.all.len(), bodies.len());

    let mut records = Vec::new();
    for minute in 0..seconds.div_ceil(60) {
        let inside = |at: f64| at >= 60.0 * minute as f64 && at < 60.0 * (minute + 1) as f64;
        let all: Vec<_> = done.all.iter().filter(|exchange| inside(exchange.at)).cloned().collect();
        if all.is_empty() {
            continue;
        }
        let exchanges = Exchanges { all, seconds: f64::min(60.0, seconds as f64 - 60.0 * minute as f64) };
        let mut record =
            Record::of(workload.shape.name, "soak", "half warm, half cold", beams, 0, &exchanges);
        record.x = Some((minute + 1) as f64);
        record.rate = None;
        record.resident_bytes = memory.iter().filter(|(at, _)| inside(*at)).map(|&(_, bytes)| bytes).max();
        eprintln!(
            "  minute {}: {} answered, {} refused, P50 {:.1} ms, P99 {:.1} ms, at most {} MB resident",
            minute + 1,
            record.requests,
            record.refused,
            record.ms.p50,
            record.ms.p99,
            record.resident_bytes.unwrap_or(0) / 1_000_000
        );
        records.push(record);
    }
    Ok(records)
}
