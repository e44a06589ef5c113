//! Poisson arrivals, whatever the server does: section `open-loop`.
//!
//! First the time of a request that is alone, back to back. Then arrivals at fixed shares of the rate
//! that this median allows, and a search for the highest rate with a P99 under [`TARGET_MS`].
//! [`super::usable`] compares both with a queue of that median.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::load::{Exchanges, closed, open};
use super::rates::warm_population;
use super::record::Record;
use super::server::Server;
use super::usable::{Beside, highest_of_the_queue};
use super::workload::{Population, Workload, strangers};

/// The P99 that the search asks for, in milliseconds.
pub(super) const TARGET_MS: f64 = 100.0;
/// Shares of the back-to-back rate that are always measured.
const LOADS: [f64; 3] = [0.1, 0.3, 0.5];
/// Requests before the first that counts: buffers grow to their size.
const WARM_UP: usize = 4;
/// Fewest requests of a point, however slow the model: of fewer, a P99 is the slowest request.
const FEWEST: usize = 20;
/// How far the search goes at a time while it looks for a rate that is good and one that is not.
const STRIDE: f64 = 1.25;
/// Rates below this share of the queue's are not looked for.
const HOPELESS: f64 = 0.05;

/// What is common to the points.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) beams: usize,
    /// Requests of a point. Of fewer than a thousand, a P99 is the few that met somebody else's burst.
    pub(super) requests: usize,
    /// Longest time of a point; a slow model gets fewer requests.
    pub(super) longest: Duration,
    /// Halvings of the interval in which the highest rate lies.
    pub(super) bisections: usize,
}

/// Cold and warm visits.
///
/// # Errors
///
/// When requests get no answer.
pub(super) fn measure(server: &Server, workload: &Workload, plan: Plan) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for visit in ["cold", "warm"] {
        let population = warm_population(server, workload, plan.beams, 43)?;
        let (alone_ms, seed) = (0.0, 4300);
        let mut points = Points { server, workload, plan, visit, population, seed, alone_ms, records };
        points.alone()?;
        points.search()?;
        records = points.records;
    }
    Ok(records)
}

/// The points of one kind of visit.
struct Points<'a> {
    server: &'a Server,
    workload: &'a Workload,
    plan: Plan,
    visit: &'static str,
    population: Population<'a>,
    seed: u64,
    /// Median of a request that is alone.
    alone_ms: f64,
    records: Vec<Record>,
}

impl Points<'_> {
    /// Measures requests back to back.
    fn alone(&mut self) -> Result<()> {
        let first = self.bodies(WARM_UP);
        let seconds = closed(self.server, &first, 1)?.seconds / WARM_UP as f64;
        let count = self.count(1.0 / seconds.max(1e-6)).div_ceil(10).max(FEWEST);
        let bodies = self.bodies(count);
        let done = closed(self.server, &bodies, 1)?;
        let record = self.record(&done);
        self.alone_ms = record.ms.p50;
        ensure!(record.refused == 0 && self.alone_ms > 0.0, "requests that were alone were refused");
        eprintln!(
            "  {}, back to back: P50 {:.1} ms, {} requests",
            self.visit, self.alone_ms, record.requests
        );
        Ok(())
    }

    /// Measures the fixed loads, then looks for the highest rate that holds the objective.
    fn search(&mut self) -> Result<()> {
        let full = 1e3 / self.alone_ms;
        let (mut good, mut bad) = (0.0, f64::INFINITY);
        for load in LOADS {
            let rate = load * full;
            if self.holds(rate)? { good = rate } else { bad = rate.min(bad) }
        }
        let queue = highest_of_the_queue(self.alone_ms);
        if queue == 0.0 {
            eprintln!("  {}: one request alone takes longer than {TARGET_MS} ms", self.visit);
            return Ok(());
        }
        if good > bad {
            // A burst of somebody else's: a higher load held.
            bad = f64::INFINITY;
        }
        while bad.is_infinite() {
            let rate = if good < queue { queue } else { good * STRIDE };
            if self.holds(rate)? { good = rate } else { bad = rate }
        }
        while good == 0.0 && bad > HOPELESS * queue {
            let rate = bad / STRIDE;
            if self.holds(rate)? { good = rate } else { bad = rate }
        }
        for _ in 0..self.plan.bisections {
            if good == 0.0 {
                break;
            }
            let middle = f64::sqrt(good * bad);
            if self.holds(middle)? { good = middle } else { bad = middle }
        }
        Ok(())
    }

    /// Measures one rate. Returns whether the objective held.
    fn holds(&mut self, rate: f64) -> Result<bool> {
        let bodies = self.bodies(self.count(rate));
        let done = open(self.server, &bodies, rate, self.seed)?;
        let mut record = self.record(&done);
        record.rate = Some(significant(rate));
        let beside = Beside::new(self.alone_ms, rate);
        let good = record.is_good(TARGET_MS);
        let queue = beside.p99.map_or_else(String::new, |p99| format!("; {p99:.1} ms of the queue"));
        eprintln!(
            "  {}, {rate:.2}/s, load {:.2}: P50 {:.1} ms, P99 {:.1} ms{queue}",
            self.visit, beside.load, record.ms.p50, record.ms.p99
        );
        record.beside = Some(beside);
        self.records.push(record);
        Ok(good)
    }

    fn bodies(&mut self, count: usize) -> Vec<Vec<u8>> {
        self.seed += 1;
        if self.visit == "cold" {
            strangers(self.workload, count, self.plan.beams, self.seed)
        } else {
            self.population.next_visits(count)
        }
    }

    fn count(&self, rate: f64) -> usize {
        let in_time = (rate * self.plan.longest.as_secs_f64()) as usize;
        self.plan.requests.min(in_time).max(FEWEST)
    }

    fn record(&self, done: &Exchanges) -> Record {
        Record::of(self.workload.shape.name, "open-loop", self.visit, self.plan.beams, 0, done)
    }
}

/// Three digits, so that slow models keep theirs.
fn significant(rate: f64) -> f64 {
    let unit = 10f64.powi(rate.log10().floor() as i32 - 2);
    // Divided by a power of ten that is whole, if there is one: 0.1 is none.
    if unit < 1.0 { (rate / unit).round() / (1.0 / unit).round() } else { (rate / unit).round() * unit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_keep_three_digits() {
        assert_eq!([0.174_53, 20.714, 147.6, 1234.0].map(significant), [0.175, 20.7, 148.0, 1230.0]);
    }
}
