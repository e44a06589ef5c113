//! Many requests at once: section `concurrency` (so many on their way at any time) and `open-loop` (so many arrive a
//! second, whatever the server does).

use std::time::Duration;

use anyhow::Result;

use super::load::{closed, open};
use super::record::Record;
use super::server::Server;
use super::workload::{Population, Workload, strangers};

/// The P99 that the sweep asks for, in milliseconds.
pub(super) const TARGET_MS: f64 = 100.0;
/// Fewest requests of a measurement of the open loop.
const FEWEST: usize = 300;
/// Users of the population that comes back.
const USERS: usize = 64;

/// What is common to these measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) beams: usize,
    /// Length of one measurement.
    pub(super) window: Duration,
    /// Most halvings of the interval in which the highest rate lies.
    pub(super) bisections: usize,
}

/// Cold and warm visits at each concurrency.
///
/// # Errors
///
/// When requests fail.
pub(super) fn concurrency(
    server: &Server,
    workload: &Workload,
    levels: &[usize],
    plan: Plan,
) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let mut population = warm_population(server, workload, plan, 41)?;
    for visit in ["cold", "warm"] {
        let mut seed = 4100;
        let mut bodies = |count| {
            seed += 1;
            if visit == "cold" {
                strangers(workload, count, plan.beams, seed)
            } else {
                population.next_visits(count)
            }
        };
        let alone = closed(server, &bodies(4), 1)?;
        let rate = alone.all.len() as f64 / alone.seconds;
        for &level in levels {
            let count = ((rate * plan.window.as_secs_f64()) as usize).clamp(2 * level, 5000);
            let done = closed(server, &bodies(count), level)?;
            let record = Record::of(workload.shape.name, "concurrency", visit, plan.beams, level, &done);
            eprintln!("  {visit}, {level} at once: {:.1}/s, P50 {:.1} ms", record.per_second, record.ms.p50);
            records.push(record);
        }
    }
    Ok(records)
}

/// Looks for the highest rate of arrivals whose P99 stays under [`TARGET_MS`], cold and warm.
///
/// # Errors
///
/// When requests get no answer.
pub(super) fn sweep(server: &Server, workload: &Workload, plan: Plan) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for visit in ["cold", "warm"] {
        let mut population = warm_population(server, workload, plan, 43)?;
        let mut seed = 4300;
        let mut try_rate = |rate: f64, records: &mut Vec<Record>| -> Result<bool> {
            seed += 1;
            // Of fewer requests a P99 would be the one or two that met somebody else's burst.
            let count = ((rate * plan.window.as_secs_f64()) as usize).clamp(FEWEST, 5000);
            let bodies = if visit == "cold" {
                strangers(workload, count, plan.beams, seed)
            } else {
                population.next_visits(count)
            };
            let done = open(server, &bodies, rate, seed)?;
            let mut record = Record::of(workload.shape.name, "open-loop", visit, plan.beams, 0, &done);
            record.rate = Some((rate * 10.0).round() / 10.0);
            let good = record.refused == 0 && record.ms.p99 < TARGET_MS;
            eprintln!("  {visit}, {rate:.1}/s: P50 {:.1} ms, P99 {:.1} ms", record.ms.p50, record.ms.p99);
            records.push(record);
            Ok(good)
        };
        // Upwards until it is too much, then between.
        let (mut good, mut bad) = (0.0, f64::INFINITY);
        let mut rate = 8.0;
        while bad.is_infinite() {
            if try_rate(rate, &mut records)? {
                good = rate;
                rate *= 2.0;
            } else {
                bad = rate;
            }
        }
        for _ in 0..plan.bisections {
            if good == 0.0 {
                break;
            }
            let middle = f64::sqrt(good * bad);
            if try_rate(middle, &mut records)? { good = middle } else { bad = middle }
        }
    }
    Ok(records)
}

fn warm_population<'a>(
    server: &Server,
    workload: &'a Workload,
    plan: Plan,
    seed: u64,
) -> Result<Population<'a>> {
    let population = Population::new(workload, USERS, plan.beams, seed);
    closed(server, &population.first_visits(), 4)?;
    Ok(population)
}
