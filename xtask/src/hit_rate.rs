//! `cargo xtask hit-rate`: how much of what real users ask for is cached, by memory.
//!
//! `crates/simulation` replays the logs and prints JSON. Here it becomes `bench/results/hit-rate.*`, for
//! people.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::plot::{Axis, Curve, Panel, draw};
use crate::simulate::{simulation, write};

const MIB: f64 = 1024.0 * 1024.0;

/// Flags of `cargo xtask hit-rate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory with ml-100k/ml-100k.inter (RecBole's file of MovieLens 100K), beauty/sequences.txt (a
    /// user and items a line), or both. What is not there is skipped.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Name of the results: NAME.json, NAME.md and NAME.svg.
    #[arg(long, default_value = "bench/results/hit-rate")]
    out: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Found {
    records: Vec<Record>,
}

/// One log with one memory; `crates/simulation` says what is what.
#[derive(Debug, Deserialize)]
struct Record {
    log: String,
    gap_s: f64,
    visits: usize,
    users: usize,
    cut: usize,
    budget: f64,
    pool_bytes: usize,
    host_bytes: usize,
    bytes_per_user: f64,
    cached: f64,
    restored: f64,
    mean_tokens: f64,
    p50_ms: f64,
    p99_ms: f64,
    mean_ms: f64,
    cold_mean_ms: f64,
}

/// Replays and writes the results.
///
/// # Errors
///
/// When there is no log, or something cannot be built, run or written.
pub(crate) fn run(args: &Args) -> Result<()> {
    let data = std::path::absolute(&args.data)?;
    let found = simulation(&["hit-rate", "--data", &data.display().to_string()])?;
    let read: Found = serde_json::from_value(found.clone()).context("what the replay printed")?;
    write(&args.out, &found, &markdown(&read.records), &draw(&panels(&read.records)))
}

impl Record {
    fn name(&self) -> String {
        match self.gap_s {
            0.0 => format!("{}, after every event", self.log),
            gap if gap < 60.0 => format!("{}, after a pause of {gap:.0} s", self.log),
            gap => format!("{}, after a pause of {:.0} min", self.log, gap / 60.0),
        }
    }
}

fn names(records: &[Record]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in records.iter().map(Record::name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn markdown(records: &[Record]) -> String {
    let mut out = String::from(
        "# Hit rates of real logs\n\nWritten by `cargo xtask hit-rate --data DIR`; do not edit. The real bookkeeping of the cache, no model. An item is five \
         tokens, a history has at most 64 items, a page 32 tokens, and a token of workload S 6,144 bytes. A budget is the pool over what all users' last contexts take; \
         host memory, where there is any, is four times the pool. Times are those of requests that are alone, by the cost curve of S.\n",
    );
    for name in names(records) {
        let own: Vec<&Record> = records.iter().filter(|record| record.name() == name).collect();
        let first = own[0];
        let _ = writeln!(
            out,
            "\n## {name}\n\n{} users, {} visits, {:.0} tokens of context on average; {:.1} ms on average if nothing is cached.\n",
            first.users, first.visits, first.mean_tokens, first.cold_mean_ms
        );
        out.push_str("| budget | pool MiB | host MiB | KiB per user | cut at a time | cached | restored | mean ms | P50 ms | P99 ms |\n");
        let _ = writeln!(out, "|{}", " --- |".repeat(10));
        for r in own {
            let _ = writeln!(
                out,
                "| {:.0} % | {:.0} | {} | {:.0} | {} | {:.0} % | {:.0} % | {:.1} | {:.1} | {:.1} |",
                100.0 * r.budget,
                r.pool_bytes as f64 / MIB,
                if r.host_bytes > 0 { format!("{:.0}", r.host_bytes as f64 / MIB) } else { String::new() },
                r.bytes_per_user / 1024.0,
                r.cut,
                100.0 * r.cached,
                100.0 * r.restored,
                r.mean_ms,
                r.p50_ms,
                r.p99_ms
            );
        }
    }
    out
}

/// Share that was not computed, by memory per user; a panel a log.
fn panels(records: &[Record]) -> Vec<Panel> {
    let coarse = records.first().map_or(0, |record| record.cut);
    let panel = |name: String| {
        let curve = |host: bool| {
            let own =
                records.iter().filter(|r| r.name() == name && r.cut == coarse && (r.host_bytes > 0) == host);
            let name = if host { "pool and four times as much host memory" } else { "pool only" };
            let points = own.map(|r| (r.bytes_per_user / 1024.0, 100.0 * (r.cached + r.restored)));
            Curve { name: name.into(), points: points.collect() }
        };
        let (x, y) = (Axis::logarithmic("KiB per user"), Axis::linear("context tokens not computed, %"));
        Panel { curves: vec![curve(false), curve(true)], title: name, x, y }
    };
    names(records).into_iter().map(panel).collect()
}
