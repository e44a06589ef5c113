//! Time against how full the page pool is: section `pages`.
//!
//! The pool is made small and filled with contexts of strangers; past full, every new context pushes old
//! ones out.

use anyhow::Result;

use super::load::closed;
use super::record::Record;
use super::server::Launch;
use super::workload::{Population, Workload, strangers};

/// Memory of the pool.
const KV_MEMORY: &str = "256MiB";
/// Requests of one point.
const REQUESTS: usize = 20;

/// Measures cold and warm visits while the pool fills.
///
/// # Errors
///
/// When requests fail.
pub(super) fn measure(launch: &Launch, workload: &Workload, beams: usize) -> Result<Vec<Record>> {
    let server = launch.start(&workload.checkpoint, &["--kv-memory", KV_MEMORY])?;
    let mut records = Vec::new();
    let mut seed = 900;
    let used = || -> Result<(f64, f64)> {
        let all = server.metric("beamline_pages")?;
        let free = server.metric("beamline_pages{state=\"free\"}")?;
        Ok(((all - free) / all, server.metric("beamline_page_evictions_total")?))
    };
    closed(&server, &strangers(workload, 4, beams, 899), 1)?;
    for target in [0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.5] {
        // Past full, the evictions count on: one and a half pools were written.
        loop {
            let (share, evictions) = used()?;
            let all = server.metric("beamline_pages")?;
            if share + evictions / all >= target - 0.01 {
                break;
            }
            seed += 1;
            closed(&server, &strangers(workload, 8, beams, seed), 4)?;
        }
        seed += 1;
        let cold = closed(&server, &strangers(workload, REQUESTS, beams, seed), 1)?;
        let mut population = Population::new(workload, 4, beams, seed);
        closed(&server, &population.first_visits(), 1)?;
        let warm = closed(&server, &population.next_visits(REQUESTS), 1)?;
        let (share, evictions) = used()?;
        eprintln!("  {:.0} % of the pages in use, {evictions} evictions", 100.0 * share);
        for (visit, done) in [("cold", cold), ("warm", warm)] {
            let mut record = Record::of(workload.shape.name, "pages", visit, beams, 1, &done);
            record.x = Some(((share + evictions / server.metric("beamline_pages")?) * 100.0).round() / 100.0);
            record.resident_bytes = Some(server.resident_bytes()?);
            records.push(record);
        }
    }
    Ok(records)
}
