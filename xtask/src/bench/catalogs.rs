//! Time against the size of the catalog: section `catalogs`.
//!
//! Catalogs are random SIDs over the workload's codes, so that large ones have items that share an SID,
//! as real ones do.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::load::closed;
use super::random::Random;
use super::record::Record;
use super::server::Launch;
use super::workload::{Ask, Workload};

/// Users whose requests are measured.
const USERS: usize = 12;

/// Measures catalogs of each size, smallest first.
///
/// # Errors
///
/// When a catalog cannot be written or loaded, or requests fail.
pub(super) fn measure(
    launch: &Launch,
    work: &Path,
    workload: &Workload,
    sizes: &[usize],
    beams: usize,
) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for &size in sizes {
        let path = write(work, workload, size)?;
        let started = std::time::Instant::now();
        let server = launch.start(&workload.checkpoint, &["--catalog", &path.display().to_string()])?;
        eprintln!("  {size} items loaded in {:.1} s", started.elapsed().as_secs_f64());
        // Tokens, because items of the common prompts may not be in this catalog.
        for beams in [beams, 512] {
            for (visit, name) in [(0, "cold"), (1, "warm")] {
                let prompts = workload.prompts.iter().filter(|prompt| prompt.visit == visit);
                let bodies: Vec<Vec<u8>> = (0..USERS.div_ceil(prompts.clone().count().max(1)))
                    .flat_map(|round| prompts.clone().map(move |prompt| (round, prompt)))
                    .map(|(round, prompt)| {
                        let tenant = format!("catalogs-{beams}-{round}");
                        Ask { tenant: &tenant, user: &prompt.user, beams }.tokens(&prompt.token_ids)
                    })
                    .collect();
                let done = closed(&server, &bodies, 1)?;
                let mut record = Record::of(workload.shape.name, "catalogs", name, beams, 1, &done);
                record.x = Some(size as f64);
                record.resident_bytes = Some(server.resident_bytes()?);
                eprintln!("  {size} items, {name}, {beams} beams: P50 {:.1} ms", record.ms.p50);
                records.push(record);
            }
        }
    }
    Ok(records)
}

fn write(work: &Path, workload: &Workload, size: usize) -> Result<PathBuf> {
    let path = work.join(format!("{}-catalog-{size}.jsonl", workload.shape.name));
    if path.exists() {
        return Ok(path);
    }
    let unfinished = path.with_extension("part");
    let mut out = BufWriter::new(File::create(&unfinished)?);
    let mut random = Random::new(7);
    let codes = workload.shape.codes;
    for item in 0..size {
        let sid: [usize; 3] = std::array::from_fn(|_| random.below(codes));
        writeln!(out, r#"{{"item_id": "item-{item:08}", "sid": {sid:?}}}"#)?;
    }
    out.flush()?;
    fs::rename(unfinished, &path)?;
    Ok(path)
}
