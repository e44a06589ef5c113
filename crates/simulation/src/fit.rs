//! Fits a cost curve to what `cargo xtask bench --sections beams,contexts` measured on a machine.
//!
//! Section `contexts` gives the time of a context row and of its reads (a cold visit), the time of
//! a step that computes next to nothing (the same request again), and the time of branch rows by
//! what they read. Section `beams` gives the time of more branch rows. All fits weigh relative
//! errors, so that short contexts count as much as long ones.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::curve::{Curve, Visit};

/// Branch steps of every request of the benchmark.
const BRANCH_STEPS: f64 = 2.0;
/// Longest context whose second visit is used for the fixed time of a step: it reads little.
const SHORT: f64 = 300.0;

/// The fields of a record that are needed here.
#[derive(Clone, Deserialize)]
struct Record {
    workload: String,
    section: String,
    visit: String,
    beams: usize,
    context_tokens: u64,
    cached_tokens: u64,
    server_ms: Option<Times>,
}

#[derive(Clone, Copy, Deserialize)]
struct Times {
    prefill: f64,
    decode: f64,
}

/// A measured visit.
#[derive(Clone, Copy)]
struct Point {
    context: f64,
    beams: f64,
    prefill_us: f64,
    branch_step_us: f64,
}

/// Fits the curve of a workload to the text of a results file.
///
/// # Errors
///
/// When the text is not a results file, or lacks the records that are needed.
pub fn fit(results: &str, workload: &str, source: &str) -> Result<Curve> {
    let results: Value = serde_json::from_str(results).context("the results")?;
    let mut records: Vec<Record> = Vec::new();
    for record in results["runs"].as_array().into_iter().flatten().flat_map(|run| run["records"].as_array()) {
        for record in record {
            records.push(serde_json::from_value(record.clone()).context("a record")?);
        }
    }
    records.retain(|record| record.workload == workload);
    let points = |section: &str, visit: &str| -> Vec<Point> {
        let found = records.iter().filter(|record| record.section == section && record.visit == visit);
        // A visit that found less than it should have is not usable.
        let whole = |r: &&Record| visit != "again" || r.cached_tokens == r.context_tokens;
        found.filter(whole).filter_map(Record::point).collect()
    };
    let (cold, again, beams) =
        (points("contexts", "cold"), points("contexts", "again"), points("beams", "warm"));
    ensure!(
        cold.len() >= 2 && again.len() >= 2 && !beams.is_empty(),
        "no sections `contexts` and `beams` of {workload} in the results"
    );
    let short: Vec<f64> = again.iter().filter(|p| p.context < SHORT).map(|p| p.prefill_us).collect();
    let fixed = median(short).context("no short context came again")?;
    let (row, read) = context_rows(&cold, fixed);
    let branch_read = branch_reads(&again);
    let branch_us = branch_rows(&beams, fixed, branch_read);
    let visit =
        |name: &str, context, cached| Visit { name: name.into(), context, cached, beams: 32, steps: 3 };
    let whole = beams[0].context as usize;
    Ok(Curve {
        name: workload.into(),
        source: source.into(),
        fixed_us: round(fixed),
        context_row_us: round(row),
        context_read_ns: round(read * 1e3),
        branch_us,
        branch_read_ns: round(branch_read * 1e3),
        // The benchmark does not report this; `beamline inspect` does.
        position_bytes: 0,
        visits: vec![visit("cold", whole - 20, 0), visit("warm", whole, (whole - 20) / 32 * 32)],
    })
}

impl Record {
    fn point(&self) -> Option<Point> {
        let times = self.server_ms?;
        Some(Point {
            context: self.context_tokens as f64,
            beams: self.beams as f64,
            prefill_us: times.prefill * 1e3,
            branch_step_us: times.decode * 1e3 / BRANCH_STEPS,
        })
    }
}

/// Time of a context row, and of an earlier position that it reads, in microseconds.
fn context_rows(cold: &[Point], fixed: f64) -> (f64, f64) {
    let equations = cold.iter().map(|point| {
        let (n, us) = (point.context, (point.prefill_us - fixed).max(1.0));
        // Divided by the time, so that errors are relative.
        ([n / us, n * (n - 1.0) / 2.0 / us], 1.0)
    });
    let [row, read] = least_squares(equations);
    (row.max(0.0), read.max(0.0))
}

/// Time per context position that a branch row reads, in microseconds.
fn branch_reads(again: &[Point]) -> f64 {
    let equations = again.iter().map(|point| {
        let us = point.branch_step_us;
        ([1.0 / us, point.beams * point.context / us], 1.0)
    });
    let [_, read] = least_squares(equations);
    read.max(0.0)
}

/// Time of branch rows beyond the step and the reads, in microseconds; never less for more rows.
fn branch_rows(beams: &[Point], fixed: f64, read: f64) -> Vec<(f64, f64)> {
    let mut points: Vec<(f64, f64)> = beams
        .iter()
        .map(|p| (p.beams, (p.branch_step_us - fixed - read * p.beams * p.context).max(0.0)))
        .collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points.dedup_by_key(|point| point.0 as u64);
    let mut most = 0.0_f64;
    for (_, us) in &mut points {
        most = most.max(*us);
        *us = round(most);
    }
    points
}

/// The two factors that solve all equations best, by least squares.
fn least_squares(equations: impl Iterator<Item = ([f64; 2], f64)>) -> [f64; 2] {
    let (mut aa, mut ab, mut bb, mut ay, mut by) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for ([a, b], y) in equations {
        aa += a * a;
        ab += a * b;
        bb += b * b;
        ay += a * y;
        by += b * y;
    }
    let determinant = aa * bb - ab * ab;
    if determinant == 0.0 {
        return [if aa > 0.0 { ay / aa } else { 0.0 }, 0.0];
    }
    [(ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant]
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Rounds to three decimal places, which are enough.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::curve::Rows;

    /// The results that a benchmark of a machine with this curve would report.
    fn results(curve: &Curve) -> String {
        let step = |context: (usize, usize), branch: (usize, usize)| {
            let mut rows = Rows::default();
            rows.add_context(context.0, context.1);
            rows.add_branch(branch.0, branch.1);
            curve.step(rows) as f64 / 1e3
        };
        let record = |section: &str, visit: &str, beams: usize, context: usize, cached: usize| {
            let computed = if cached == context { context - 1 } else { cached };
            json!({
                "workload": "S", "section": section, "visit": visit, "beams": beams,
                "context_tokens": context, "cached_tokens": cached,
                "server_ms": {"prefill": step((computed, context), (0, 0)), "decode": 2.0 * step((0, 0), (beams, context))},
            })
        };
        let mut records = Vec::new();
        for context in [64, 256, 1024, 4096] {
            records.push(record("contexts", "cold", 32, context, 0));
            records.push(record("contexts", "again", 32, context, context));
        }
        for beams in [8, 32, 128, 512] {
            records.push(record("beams", "warm", beams, 341, 320));
        }
        json!({"runs": [{"records": records}]}).to_string()
    }

    #[test]
    fn the_curve_that_was_measured_is_found() {
        let curve = Curve {
            name: "S".into(),
            source: "a test".into(),
            fixed_us: 500.0,
            context_row_us: 30.0,
            context_read_ns: 25.0,
            branch_us: vec![(8.0, 400.0), (32.0, 1500.0), (128.0, 5000.0), (512.0, 12_000.0)],
            branch_read_ns: 40.0,
            position_bytes: 0,
            visits: vec![],
        };
        let found = fit(&results(&curve), "S", "a test").unwrap();
        let near = |a: f64, b: f64, what: &str| assert!((a / b - 1.0).abs() < 0.1, "{what}: {a}, {b}");
        near(found.fixed_us, 500.0, "fixed");
        near(found.context_row_us, 30.0, "context row");
        near(found.context_read_ns, 25.0, "context read");
        near(found.branch_read_ns, 40.0, "branch read");
        for ((rows, us), (asked, expected)) in found.branch_us.iter().zip(&curve.branch_us) {
            assert_eq!(rows, asked);
            near(*us, *expected, "branch rows");
        }
        assert_eq!(found.visit("warm").unwrap().cached, 320);
    }

    #[test]
    fn a_file_without_the_sections_is_refused() {
        assert!(fit(r#"{"runs": []}"#, "S", "").is_err());
        assert!(fit("no JSON", "S", "").is_err());
    }
}
