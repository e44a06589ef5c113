//! `cargo xtask simulate`: what the scheduler makes of a traffic, beside reference policies, in virtual time.
//!
//! `crates/simulation` simulates and prints JSON; here it becomes `bench/results/simulate.*`, for people.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::mdone::Queue;
use crate::plot::{Axis, Curve, Panel, draw};
use crate::root;

/// Policies without deadlines, in the order of tables and pictures; ours first.
const POLICIES: [&str; 4] = ["beamline", "first come", "sharing", "shortest first"];
/// Curves and visits that the picture shows.
const SHOWN: [&str; 6] = [
    "S, cold",
    "S, warm",
    "M, cold",
    "HSTU retrieval, warm",
    "HSTU ranking, warm",
    "Qwen3-1.7B on an H100, 5000 tokens",
];
/// Length of a window of the goodput, in seconds; and when the overload begins and ends.
const WINDOW: f64 = 5.0;
const OVERLOAD: [usize; 2] = [30, 90];

/// Flags of `cargo xtask simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Fewer requests: a look, no results.
    #[arg(long)]
    quick: bool,
    /// Cost curves in the format of crates/simulation/curves.json, instead of those.
    #[arg(long, value_name = "FILE")]
    curves: Option<PathBuf>,
    /// Instead: print the cost curve of a machine, out of a results file of
    /// `cargo xtask bench --sections beams,contexts`.
    #[arg(long, value_name = "FILE")]
    fit: Option<PathBuf>,
    /// Which workload of that file.
    #[arg(long, default_value = "S", requires = "fit")]
    workload: String,
    /// Name of the results: NAME.json, NAME.md and NAME.svg.
    #[arg(long, default_value = "bench/results/simulate")]
    out: PathBuf,
}

/// What was simulated.
#[derive(Debug, Deserialize)]
struct Found {
    curves: Vec<CostCurve>,
    records: Vec<Record>,
}

#[derive(Debug, Deserialize)]
struct CostCurve {
    name: String,
    source: String,
}

/// One class of one run; `crates/simulation` says what is what.
#[derive(Debug, Deserialize)]
struct Record {
    section: String,
    curve: String,
    case: String,
    class: String,
    policy: String,
    load: Option<f64>,
    alone_ms: f64,
    requests: usize,
    late: usize,
    refused: usize,
    lost: usize,
    p50_ms: f64,
    p99_ms: f64,
    p999_ms: f64,
    unfairness: Option<f64>,
    #[serde(default)]
    goodput: Vec<f64>,
    recovery_s: Option<f64>,
}

/// Simulates and writes the results.
///
/// # Errors
///
/// When something cannot be built, run or written.
pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(results) = &args.fit {
        let results = std::path::absolute(results)?;
        let curve = simulation(&["fit", &results.display().to_string(), "--workload", &args.workload])?;
        return print(&curve);
    }
    let mut arguments = vec!["simulate".to_owned()];
    if args.quick {
        arguments.push("--quick".into());
    }
    if let Some(curves) = &args.curves {
        arguments.extend(["--curves".into(), std::path::absolute(curves)?.display().to_string()]);
    }
    let found = simulation(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    let read: Found = serde_json::from_value(found.clone()).context("what the simulation printed")?;
    let page = markdown(&read);
    if args.quick {
        eprintln!("{page}");
        return Ok(());
    }
    write(&args.out, &found, &page, &draw(&panels(&read)))
}

/// Runs the simulation as it was built, and reads what it prints.
///
/// # Errors
///
/// When it fails.
pub(crate) fn simulation(arguments: &[&str]) -> Result<Value> {
    // As the tests build it, so that nothing is built twice: the binary comes with its package's tests.
    crate::run(&mut crate::cargo(&[
        "test",
        "--release",
        "--workspace",
        "--test",
        "simulation_command",
        "--no-run",
    ]))?;
    let mut command = Command::new(root().join("target/release/beamline-simulation"));
    command.args(arguments).stderr(std::process::Stdio::inherit());
    eprintln!("$ {command:?}");
    let done = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}", done.status);
    }
    serde_json::from_slice(&done.stdout).context("what the simulation printed")
}

/// Writes NAME.json, NAME.md and NAME.svg.
///
/// # Errors
///
/// When a file cannot be written.
pub(crate) fn write(name: &std::path::Path, found: &Value, page: &str, picture: &str) -> Result<()> {
    let name = if name.is_absolute() { name.to_owned() } else { root().join(name) };
    std::fs::write(name.with_extension("json"), format!("{}\n", serde_json::to_string_pretty(found)?))?;
    std::fs::write(name.with_extension("md"), page)?;
    std::fs::write(name.with_extension("svg"), picture)?;
    eprintln!("results: {}.json, .md, .svg", name.display());
    Ok(())
}

#[allow(clippy::print_stdout, reason = "a curve goes into a file")]
fn print(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn markdown(found: &Found) -> String {
    let mut out = String::from(
        "# Simulated scheduling\n\nWritten by `cargo xtask simulate`; do not edit. Virtual time: no machine and no model took part. \
         [SCHEDULING.md](../../docs/SCHEDULING.md) explains it.\n\nCost curves:\n\n",
    );
    for CostCurve { name, source } in &found.curves {
        let _ = writeln!(out, "- **{name}**: {source}.");
    }
    poisson(&mut out, &found.records);
    for (section, title) in [
        ("heavy", "Small requests beside heavy ones"),
        ("bursts", "Bursts"),
        ("tenants", "A polite tenant beside a greedy one"),
    ] {
        neighbours(&mut out, title, found.records.iter().filter(|record| record.section == section));
    }
    overload(&mut out, found.records.iter().filter(|record| record.section == "overload"));
    out
}

/// P99 by load, a table a curve.
fn poisson(out: &mut String, records: &[Record]) {
    out.push_str("\n## Poisson arrivals of one kind of request\n\nP99 in ms by load: arrivals over what requests back to back leave room for. M/D/1 is exact; \"first come\" is the same queue, simulated.\n");
    let all = || records.iter().filter(|record| record.section == "poisson");
    let mut curves: Vec<&str> = all().map(|record| record.curve.as_str()).collect();
    curves.dedup();
    for curve in curves {
        let own: Vec<&Record> = all().filter(|record| record.curve == curve).collect();
        let alone = own.first().map_or(0.0, |record| record.alone_ms);
        let _ = writeln!(out, "\n### {curve}: {alone:.1} ms alone\n");
        let _ = writeln!(
            out,
            "| load | beamline P50 | P99 | P999 | refused | M/D/1 P99 | {} | beamline over M/D/1 |",
            POLICIES[1..].join(" | ")
        );
        let _ = writeln!(out, "|{}", " --- |".repeat(10));
        for ours in own.iter().filter(|record| record.policy == POLICIES[0]) {
            let exact = md1_p99(ours);
            let others: Vec<String> = POLICIES[1..]
                .iter()
                .filter_map(|policy| own.iter().find(|r| r.policy == *policy && r.case == ours.case))
                .map(|record| format!("{:.1}", record.p99_ms))
                .collect();
            let _ = writeln!(
                out,
                "| {} | {:.1} | {:.1} | {:.1} | {} | {:.1} | {} | {:.2} |",
                ours.case,
                ours.p50_ms,
                ours.p99_ms,
                ours.p999_ms,
                ours.refused,
                exact,
                others.join(" | "),
                ours.p99_ms / exact
            );
        }
    }
}

/// The P99 of the queue that takes as long as a request alone.
fn md1_p99(record: &Record) -> f64 {
    let rate = record.load.unwrap_or(0.0) / record.alone_ms;
    Queue::new(record.alone_ms, rate).and_then(|queue| queue.sojourn(0.99)).unwrap_or(f64::NAN)
}

/// Classes beside each other.
fn neighbours<'a>(out: &mut String, title: &str, records: impl Iterator<Item = &'a Record>) {
    let _ = writeln!(
        out,
        "\n## {title}\n\n| case | class | policy | requests | refused, lost or late | P50 ms | P99 ms | P999 ms | P99 over alone |"
    );
    let _ = writeln!(out, "|{}", " --- |".repeat(9));
    for r in records {
        let unfairness = r.unfairness.map_or_else(String::new, |ratio| format!("{ratio:.1}"));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {:.1} | {:.1} | {:.1} | {unfairness} |",
            r.case,
            r.class,
            r.policy,
            r.requests,
            r.refused + r.lost + r.late,
            r.p50_ms,
            r.p99_ms,
            r.p999_ms
        );
    }
}

/// What is answered in time while more comes than can be done, and after.
fn overload<'a>(out: &mut String, records: impl Iterator<Item = &'a Record>) {
    out.push_str("\n## Overload\n\nGoodput: answers within the deadline, over what the machine could answer back to back; in windows of 5 s within the overload. Recovery: seconds after the overload until three seconds in a row in each of which nine in ten arrivals are answered within 100 ms. The reference policies know how long each request takes.\n\n| case | policy | requests | refused | lost | late | goodput, mean | least window | P99 ms | recovery s |\n");
    let _ = writeln!(out, "|{}", " --- |".repeat(10));
    for r in records {
        let full = 1e3 / r.alone_ms;
        let [from, to] = OVERLOAD.map(|second| second / WINDOW as usize);
        let windows: Vec<f64> = r.goodput.iter().take(to).skip(from).map(|rate| rate / full).collect();
        let mean = windows.iter().sum::<f64>() / windows.len().max(1) as f64;
        let least = windows.iter().copied().fold(f64::INFINITY, f64::min);
        let recovery =
            r.recovery_s.map_or_else(|| "not within 120 s".to_owned(), |seconds| format!("{seconds:.0}"));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {mean:.2} | {least:.2} | {:.0} | {recovery} |",
            r.case, r.policy, r.requests, r.refused, r.lost, r.late, r.p99_ms
        );
    }
}

fn panels(found: &Found) -> Vec<Panel> {
    let mut panels = Vec::new();
    for shown in SHOWN {
        let own: Vec<&Record> =
            found.records.iter().filter(|r| r.section == "poisson" && r.curve == shown).collect();
        let percent = |record: &Record| record.load.unwrap_or(0.0) * 100.0;
        let mut curves: Vec<Curve> = POLICIES
            .iter()
            .map(|policy| {
                let points = own.iter().filter(|r| r.policy == *policy).map(|r| (percent(r), r.p99_ms));
                Curve { name: (*policy).into(), points: points.collect() }
            })
            .collect();
        let exact = own.iter().filter(|r| r.policy == POLICIES[0]).map(|r| (percent(r), md1_p99(r)));
        curves.push(Curve { name: "M/D/1, exact".into(), points: exact.collect() });
        curves.retain(|curve| !curve.points.is_empty());
        if !curves.is_empty() {
            let (x, y) = (Axis::linear("load, %"), Axis::logarithmic("P99, ms"));
            panels.push(Panel { title: shown.into(), x, y, curves });
        }
    }
    let overloads: Vec<&Record> = found.records.iter().filter(|r| r.section == "overload").collect();
    let mut cases: Vec<&str> = overloads.iter().map(|r| r.case.as_str()).collect();
    cases.dedup();
    for case in cases {
        let own = overloads.iter().filter(|r| r.case == case);
        let curve = |r: &&Record| {
            let at = |index: usize| (index as f64 + 0.5) * WINDOW;
            let points =
                r.goodput.iter().enumerate().map(|(index, rate)| (at(index), rate * r.alone_ms / 10.0));
            Curve { name: r.policy.clone(), points: points.collect() }
        };
        let (x, y) = (Axis::linear("second"), Axis::linear("answered in time, % of full load"));
        panels.push(Panel { title: case.into(), x, y, curves: own.copied().map(|r| curve(&r)).collect() });
    }
    panels
}
