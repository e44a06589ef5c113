//! A file of runs as a table for people: ratios to the peers first, then every section.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::open_loop::TARGET_MS;
use super::record::Record;
use super::usable::{Usable, usable};

/// A results file: one run after the other.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) runs: Vec<Run>,
}

/// What one command measured.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) command: String,
    pub(super) label: String,
    pub(super) commit: String,
    /// Seconds since 1970.
    pub(super) started: u64,
    pub(super) threads: usize,
    pub(super) server_arguments: Vec<String>,
    pub(super) machine: Value,
    pub(super) versions: Value,
    /// What `open-loop` found, beside M/D/1 queues.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) usable: Vec<Usable>,
    pub(super) records: Vec<Record>,
}

/// The whole file as Markdown.
pub(super) fn markdown(report: &Report) -> String {
    let mut out = String::from("# Measurements\n\nWritten by `cargo xtask bench`; do not edit.\n");
    for run in &report.runs {
        let cpu = run.machine["cpu"].as_str().unwrap_or("?");
        let flags: Vec<&str> =
            run.machine["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let _ = write!(
            out,
            "\n## {}\n\n`{}`, commit {}, {} threads, {cpu} ({}), {} cores.\n",
            if run.label.is_empty() { "Run" } else { &run.label },
            run.command,
            run.commit,
            run.threads,
            flags.join(" "),
            run.machine["cores"],
        );
        ratios(&mut out, &run.records);
        for section in
            ["visits", "beams", "contexts", "concurrency", "open-loop", "catalogs", "pages", "soak"]
        {
            for workload in ["S", "M"] {
                let records: Vec<&Record> =
                    run.records.iter().filter(|r| r.section == section && r.workload == workload).collect();
                if !records.is_empty() {
                    table(&mut out, section, workload, &records);
                }
            }
        }
    }
    out
}

fn table(out: &mut String, section: &str, workload: &str, records: &[&Record]) {
    let _ = writeln!(out, "\n### {workload}, {section}\n");
    if section == "open-loop" {
        highest(out, records);
    }
    let varied = match section {
        "open-loop" => "arrivals/s",
        "catalogs" => "items",
        "pages" => "share of pages in use",
        "soak" => "minute",
        _ => "",
    };
    let _ = writeln!(
        out,
        "| engine | visit | {}beams | context | cached | at once | requests | P50 ms | P90 ms | P99 ms | in the server: queue, prefill, decode, total ms | answered/s |",
        if varied.is_empty() { String::new() } else { format!("{varied} | ") }
    );
    let _ = writeln!(out, "|{}", " --- |".repeat(11 + usize::from(!varied.is_empty()) + 1));
    for r in records {
        let server = r.server_ms.map_or_else(String::new, |t| {
            format!("{:.1}, {:.1}, {:.1}, {:.1}", t.queue, t.prefill, t.decode, t.total)
        });
        let x = r.rate.or(r.x).map_or_else(String::new, |x| format!("{x} | "));
        let many = if r.ms.p99 > 0.0 {
            format!("{:.1} | {:.1} | {:.1}", r.ms.p50, r.ms.p90, r.ms.p99)
        } else {
            format!("{:.1} | | ", r.ms.p50)
        };
        let refused = if r.refused > 0 { format!(" (+{} refused)", r.refused) } else { String::new() };
        let once = if r.concurrency > 0 { r.concurrency.to_string() } else { String::new() };
        let rate = if r.per_second > 0.0 { format!("{:.1}", r.per_second) } else { String::new() };
        let _ = writeln!(
            out,
            "| {} | {} | {x}{} | {} | {} | {once} | {}{refused} | {many} | {server} | {rate} |",
            r.engine, r.visit, r.beams, r.context_tokens, r.cached_tokens, r.requests
        );
    }
}

/// What the search found, and what a queue would hold.
fn highest(out: &mut String, records: &[&Record]) {
    for visit in ["cold", "warm"] {
        let good = |r: &&&Record| r.visit == visit && r.is_good(TARGET_MS);
        let best = records.iter().filter(good).filter_map(|r| r.rate).fold(0.0, f64::max);
        if best > 0.0 {
            let _ = writeln!(out, "Highest rate with P99 under {TARGET_MS} ms, {visit}: {best} a second.");
        } else if records.iter().any(|r| r.visit == visit) {
            let _ = writeln!(out, "No rate has a P99 under {TARGET_MS} ms, {visit}.");
        }
    }
    for found in usable(records.iter().copied()) {
        let Some(u) = found.u else { continue };
        let _ = writeln!(
            out,
            "A queue that takes {} ms for each (M/D/1), {}: {:.1} a second. U = {u:.2}.",
            found.alone_ms, found.visit, found.queue
        );
    }
    out.push('\n');
    beside_the_queue(out, records);
}

/// Every rate beside the queue's percentiles.
fn beside_the_queue(out: &mut String, records: &[&Record]) {
    if records.iter().all(|r| r.beside.is_none()) {
        return;
    }
    out.push_str("| visit | load | arrivals/s | requests | P50 ms | M/D/1 | P99 ms | M/D/1 | P99 over that of M/D/1 |\n");
    let _ = writeln!(out, "|{}", " --- |".repeat(9));
    for r in records {
        let (Some(beside), Some(rate)) = (r.beside, r.rate) else { continue };
        let of_queue = |ms: Option<f64>| ms.map_or_else(String::new, |ms| format!("{ms:.1}"));
        let ratio = beside.p99.map_or_else(String::new, |p99| format!("{:.2}", r.ms.p99 / p99));
        let _ = writeln!(
            out,
            "| {} | {:.2} | {rate} | {} | {:.1} | {} | {:.1} | {} | {ratio} |",
            r.visit,
            beside.load,
            r.requests,
            r.ms.p50,
            of_queue(beside.p50),
            r.ms.p99,
            of_queue(beside.p99)
        );
    }
    out.push('\n');
}

/// Medians beside the peers'.
fn ratios(out: &mut String, records: &[Record]) {
    let visits: Vec<&Record> = records.iter().filter(|r| r.section == "visits").collect();
    if !visits.iter().any(|r| r.engine != "beamline") {
        return;
    }
    out.push_str("\n### Against other engines\n\nMedian milliseconds a request. Hugging Face searches the same trie; CTranslate2, OpenVINO and vLLM search without\none, which is less work. beamline's times include HTTP, the others' do not.\n\n");
    out.push_str("| workload | visit | beams | beamline | fastest other | ratio | all others |\n| --- | --- | --- | --- | --- | --- | --- |\n");
    for line in compare(&visits) {
        let all: Vec<String> = line.others.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        let (fastest, ms) = &line.others[0];
        let _ = writeln!(
            out,
            "| {} | {} | {} | {:.1} | {fastest} {ms:.1} | {:.1} | {} |",
            line.workload,
            line.visit,
            line.beams,
            line.own,
            ms / line.own,
            all.join(", ")
        );
    }
}

/// One row of the comparison.
#[derive(Debug, PartialEq)]
pub(super) struct Comparison {
    pub(super) workload: String,
    pub(super) visit: String,
    pub(super) beams: usize,
    /// beamline's median; the slower one if it was measured before and after the others.
    pub(super) own: f64,
    /// The others' medians, fastest first.
    pub(super) others: Vec<(String, f64)>,
}

/// Puts medians of the same work side by side.
pub(super) fn compare(visits: &[&Record]) -> Vec<Comparison> {
    let mut lines: Vec<Comparison> = Vec::new();
    for own in visits.iter().filter(|r| r.engine == "beamline") {
        let same = |r: &&Record| r.workload == own.workload && r.visit == own.visit && r.beams == own.beams;
        if let Some(line) = lines
            .iter_mut()
            .find(|line| line.workload == own.workload && line.visit == own.visit && line.beams == own.beams)
        {
            line.own = line.own.max(own.ms.p50);
            continue;
        }
        let others = visits.iter().copied().filter(same).filter(|r| r.engine != "beamline");
        let mut others: Vec<(String, f64)> = others.map(|r| (r.engine.clone(), r.ms.p50)).collect();
        others.sort_by(|a, b| a.1.total_cmp(&b.1));
        if !others.is_empty() {
            lines.push(Comparison {
                workload: own.workload.clone(),
                visit: own.visit.clone(),
                beams: own.beams,
                own: own.ms.p50,
                others,
            });
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Percentiles;

    fn record(engine: &str, beams: usize, p50: f64) -> Record {
        let ms = Percentiles { p50, ..Percentiles::default() };
        let visits = ("S".to_owned(), "visits".to_owned(), "cold".to_owned());
        Record {
            workload: visits.0,
            section: visits.1,
            visit: visits.2,
            engine: engine.into(),
            beams,
            ms,
            ..Record::default()
        }
    }

    #[test]
    fn the_fastest_other_of_the_same_work_is_compared() {
        let all = [
            record("beamline", 32, 10.0),
            record("a", 32, 50.0),
            record("b", 32, 40.0),
            record("c", 128, 1.0),
            record("beamline", 32, 12.0),
        ];
        let lines = compare(&all.iter().collect::<Vec<_>>());
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].own, 12.0);
        assert_eq!(lines[0].others, [("b".to_owned(), 40.0), ("a".to_owned(), 50.0)]);
    }
}
