//! Many requests at once, a constant number on their way at any time: section `concurrency`.

use std::time::Duration;

use anyhow::Result;

use super::load::closed;
use super::record::Record;
use super::server::Server;
use super::workload::{Population, Workload, strangers};

/// Users of the population that comes back.
const USERS: usize = 64;

/// What is common to these measurements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) beams: usize,
    /// Length of one measurement.
    pub(super) window: Duration,
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
    let mut population = warm_population(server, workload, plan.beams, 41)?;
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

/// Users whose contexts are in the cache.
///
/// # Errors
///
/// When requests fail.
pub(super) fn warm_population<'a>(
    server: &Server,
    workload: &'a Workload,
    beams: usize,
    seed: u64,
) -> Result<Population<'a>> {
    let population = Population::new(workload, USERS, beams, seed);
    closed(server, &population.first_visits(), 4)?;
    Ok(population)
}
