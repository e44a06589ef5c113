//! The part of users' contexts that is cached, by the size of the memory: `cargo xtask hit-rate`.
//!
//! Times are those of requests alone, from a cost curve: what a hit saves, without any waiting.

use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::curve::{Curve, Visit as Work};
use crate::logs::{Log, Visit};
use crate::outcome::round;
use crate::parallel;
use crate::replay::{Found, PAGE_SIZE, Setting, context_tokens, pages_of_all, replay};

/// Items that fit into a context; the value of workload S.
const FIT: usize = 64;
/// Pool sizes, as fractions of the size of all users' last contexts.
const BUDGETS: [f64; 7] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];
/// Size of host memory, as a multiple of the pool.
const HOST: usize = 4;
/// Speed of copying a page to and from host memory, in bytes per microsecond: 10 GB/s.
const COPY: f64 = 10_000.0;

/// The result of one log with one memory size.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Name of the log.
    pub log: &'static str,
    /// A visit ends after this many seconds without an event.
    pub gap_s: f64,
    /// Number of requests.
    pub visits: usize,
    /// Number of users.
    pub users: usize,
    /// Number of items that are dropped at a time from a long history.
    pub cut: usize,
    /// Size of the pool, as a fraction of the size of all users' last contexts.
    pub budget: f64,
    /// Size of the pool, in bytes.
    pub pool_bytes: usize,
    /// Size of the host memory behind the pool, in bytes.
    pub host_bytes: usize,
    /// Size of both, in bytes per user.
    pub bytes_per_user: f64,
    /// Fraction of the context tokens that were in the pool.
    pub cached: f64,
    /// Fraction of the context tokens that came back from host memory.
    pub restored: f64,
    /// Mean number of tokens of a context.
    pub mean_tokens: f64,
    /// Median time of a request alone, in milliseconds.
    pub p50_ms: f64,
    /// The 99th percentile of that time, in milliseconds.
    pub p99_ms: f64,
    /// Mean of that time, in milliseconds.
    pub mean_ms: f64,
    /// Mean of that time in milliseconds if nothing were cached.
    pub cold_mean_ms: f64,
}

/// One combination of log, memory and cut.
struct Case<'a> {
    log: &'a Log,
    gap: f64,
    visits: &'a [Visit],
    budget: f64,
    host: bool,
    cut: usize,
}

/// Replays every log of the directory.
///
/// # Errors
///
/// When the directory has no log, or a log is damaged.
pub fn all(data: &Path, curve: &Curve) -> Result<Vec<Record>> {
    let mut logs = Vec::new();
    let (movielens, beauty) = (Log::movielens(data)?, Log::beauty(data)?);
    for (log, name, gaps) in [
        (movielens, "ml-100k/ml-100k.inter", &[0.0, 60.0, 1800.0][..]),
        (beauty, "beauty/sequences.txt", &[0.0]),
    ] {
        match log {
            Some(log) => logs.extend(gaps.iter().map(|gap| (log.visits(*gap), log.clone(), *gap))),
            None => eprintln!("SKIPPED: no {name} in {}", data.display()),
        }
    }
    if logs.is_empty() {
        bail!("no log in {}", data.display());
    }
    let mut cases = Vec::new();
    for (visits, log, gap) in &logs {
        for host in [false, true] {
            for budget in BUDGETS {
                cases.push(Case { log, gap: *gap, visits, budget, host, cut: FIT / 4 });
            }
        }
        for cut in [1, FIT / 8, FIT / 2] {
            for budget in [0.1, 1.0] {
                cases.push(Case { log, gap: *gap, visits, budget, host: false, cut });
            }
        }
    }
    parallel::each(&cases, |case| case.run(curve))
}

impl Case<'_> {
    fn run(&self, curve: &Curve) -> Result<Record> {
        let page_bytes = curve.position_bytes * PAGE_SIZE;
        // The pool must hold one request and one page more than that needs.
        let least = context_tokens(FIT).div_ceil(PAGE_SIZE) + 3;
        let pages = ((pages_of_all(self.log, FIT) as f64 * self.budget) as usize).max(least);
        let host_bytes = self.host.then_some(HOST * pages * page_bytes);
        let setting = Setting { pages, host_bytes, page_bytes, fit: FIT, step: self.cut };
        let found = replay(self.log, self.visits, setting)?;
        let pool_bytes = pages * page_bytes;
        let both = pool_bytes + host_bytes.unwrap_or(0);
        let users = self.log.users.len();
        let tokens: usize = found.iter().map(|found| found.context).sum();
        let share = |part: fn(&Found) -> usize| {
            round(found.iter().map(part).sum::<usize>() as f64 / tokens.max(1) as f64)
        };
        let mut times: Vec<f64> = found.iter().map(|found| milliseconds(curve, *found)).collect();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| round(times[((share * times.len() as f64).ceil() as usize).max(1) - 1]);
        let mean = |times: &mut dyn Iterator<Item = f64>| round(times.sum::<f64>() / found.len() as f64);
        let cold = |found: &Found| milliseconds(curve, Found { cached: 0, restored: 0, ..*found });
        Ok(Record {
            log: self.log.name,
            gap_s: self.gap,
            visits: found.len(),
            users,
            cut: self.cut,
            budget: self.budget,
            pool_bytes,
            host_bytes: host_bytes.unwrap_or(0),
            bytes_per_user: round(both as f64 / users as f64),
            cached: share(|found| found.cached),
            restored: share(|found| found.restored),
            mean_tokens: round(tokens as f64 / found.len() as f64),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            mean_ms: mean(&mut times.iter().copied()),
            cold_mean_ms: mean(&mut found.iter().map(cold)),
        })
    }
}

/// Time of a visit alone, in milliseconds. Its last row is computed even if everything was cached.
fn milliseconds(curve: &Curve, found: Found) -> f64 {
    let cached = (found.cached + found.restored).min(found.context - 1);
    let work = Work { name: String::new(), context: found.context, cached, beams: 32, steps: 3 };
    let copied = (found.restored * curve.position_bytes) as f64 / COPY;
    (curve.alone(&work) as f64 + copied) / 1e3
}
