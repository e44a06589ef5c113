//! The questions: how long requests wait at each load, beside heavy ones, in bursts and beside a
//! greedy tenant, and how well a machine serves under more load than it can handle.

use anyhow::Result;
use beamline_scheduler::SchedulerConfig;
use serde::Serialize;

use crate::curve::Curve;
use crate::ours;
use crate::outcome::{Summary, goodput, recovery, round};
use crate::parallel;
use crate::reference::{self, Policy};
use crate::traffic::{Arrivals, Class, Fate, Phase};

const SECOND: u64 = 1_000_000;
/// Goal for the time of an answer, in microseconds.
const OBJECTIVE: u64 = 100_000;
/// Loads of the single class, as fractions of the rate of requests back to back.
const LOADS: [f64; 10] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95];
/// Number of requests of a point: a P999 is the twentieth slowest.
const REQUESTS: f64 = 20_000.0;
/// Number of requests of a point in a short run.
const FEW_REQUESTS: f64 = 2_000.0;
const SEED: u64 = 7;

/// The policies to compare; `None` is the real scheduler.
const POLICIES: [(&str, Option<Policy>); 5] = [
    ("beamline", None),
    ("first come", Some(Policy::Fifo)),
    ("first come, late given up", Some(Policy::FifoInTime)),
    ("sharing", Some(Policy::Sharing)),
    ("shortest first", Some(Policy::Shortest)),
];

/// The result of one class in one run.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// `poisson`, `heavy`, `bursts`, `tenants` or `overload`.
    pub section: &'static str,
    /// Name of the curve, and of the visit where the curve has several.
    pub curve: String,
    /// Name of the varied setting.
    pub case: String,
    /// Name of the class.
    pub class: &'static str,
    /// Name of the policy.
    pub policy: &'static str,
    /// Arrival rate, as a fraction of the rate of requests back to back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// Time of a request alone, in milliseconds.
    pub alone_ms: f64,
    /// Counts and times of the requests.
    #[serde(flatten)]
    pub summary: Summary,
    /// P99, as a multiple of that of the same class without the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfairness: Option<f64>,
    /// Answers in time per second, in windows of five seconds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub goodput: Vec<f64>,
    /// Seconds from the end of the overload until requests are served well again; `None` if they
    /// never were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_s: Option<f64>,
}

/// One run: a traffic that every policy gets.
struct Run {
    section: &'static str,
    curve: Curve,
    name: String,
    case: String,
    load: Option<f64>,
    classes: Vec<Class>,
    /// End of the observed time, in microseconds.
    until: u64,
    /// When the overload ends, in microseconds.
    relief: Option<u64>,
}

/// Simulates everything, on as many threads as there are.
///
/// # Errors
///
/// When a curve lacks a visit, or the scheduler breaks its promises.
pub fn all(curves: &[Curve], quick: bool) -> Result<Vec<Record>> {
    let mut runs = Vec::new();
    for curve in curves {
        runs.extend(poisson(curve, if quick { FEW_REQUESTS } else { REQUESTS }));
    }
    if let Some(curve) = curves.iter().find(|curve| curve.name == "S") {
        let part = if quick { 10 } else { 1 };
        runs.extend(heavy(curve, 600 * SECOND / part)?);
        runs.extend(bursts(curve, 600 * SECOND / part)?);
        runs.extend(tenants(curve, 300 * SECOND / part)?);
        runs.extend(overload(curve)?);
    }
    let jobs: Vec<(&Run, usize)> =
        runs.iter().flat_map(|run| run.policies().map(move |policy| (run, policy))).collect();
    let found = parallel::each(&jobs, |(run, policy)| run.under(*policy))?;
    let mut records: Vec<Record> = found.into_iter().flatten().collect();
    compare(&mut records);
    Ok(records)
}

impl Run {
    /// The policies that make a difference: without deadlines no request is given up.
    fn policies(&self) -> impl Iterator<Item = usize> + use<> {
        let deadlines = self.classes.iter().any(|class| class.patience.is_some());
        (0..POLICIES.len()).filter(move |policy| deadlines || POLICIES[*policy].1 != Some(Policy::FifoInTime))
    }

    fn under(&self, policy: usize) -> Result<Vec<Record>> {
        let (name, policy) = POLICIES[policy];
        let fates: Vec<Fate> = match policy {
            None => ours::run(&self.curve, &self.classes, SEED, SchedulerConfig::default())?,
            Some(policy) => reference::run(policy, &self.curve, &self.classes, SEED),
        };
        let record = |(index, class): (usize, &Class)| {
            let mut record = Record {
                section: self.section,
                curve: self.name.clone(),
                case: self.case.clone(),
                class: class.name,
                policy: name,
                load: self.load,
                alone_ms: self.curve.alone(&class.visit) as f64 / 1e3,
                summary: Summary::of(&fates, index, class),
                unfairness: None,
                goodput: Vec::new(),
                recovery_s: None,
            };
            if let Some(relief) = self.relief {
                record.goodput = goodput(&fates, class, self.until);
                record.recovery_s = recovery(&fates, relief, self.until, OBJECTIVE);
            }
            record
        };
        Ok(self.classes.iter().enumerate().map(record).collect())
    }
}

/// One kind of request, at every load.
fn poisson(curve: &Curve, requests: f64) -> Vec<Run> {
    let mut runs = Vec::new();
    for visit in curve.visits.iter().filter(|visit| visit.name != "heavy") {
        for load in LOADS {
            let per_second = load * 1e6 / curve.alone(visit) as f64;
            let until = (requests / per_second * 1e6) as u64;
            let arrivals = Arrivals::Poisson(vec![Phase { until, per_second }]);
            let class = Class { name: "all", tenant: 0, visit: visit.clone(), patience: None, arrivals };
            runs.push(Run {
                section: "poisson",
                curve: curve.clone(),
                name: format!("{}, {}", curve.name, visit.name),
                case: format!("{:.0} %", 100.0 * load),
                load: Some(load),
                classes: vec![class],
                until,
                relief: None,
            });
        }
    }
    runs
}

/// Requests of visit `cold` at a load, of one tenant.
fn small(curve: &Curve, load: f64, tenant: u8, patience: Option<u64>, until: u64) -> Result<Class> {
    let visit = curve.visit("cold")?.clone();
    let per_second = load * 1e6 / curve.alone(&visit) as f64;
    let arrivals = Arrivals::Poisson(vec![Phase { until, per_second }]);
    Ok(Class { name: "small", tenant, visit, patience, arrivals })
}

fn run(section: &'static str, curve: &Curve, case: &str, classes: Vec<Class>, until: u64) -> Run {
    let (curve, name) = (curve.clone(), curve.name.clone());
    Run { section, curve, name, case: case.into(), load: None, classes, until, relief: None }
}

/// Small requests at a tenth of the machine, beside clients that send the largest allowed requests
/// without a pause.
fn heavy(curve: &Curve, until: u64) -> Result<Vec<Run>> {
    let mut runs = vec![run("heavy", curve, "alone", vec![small(curve, 0.1, 0, None, until)?], until)];
    for clients in [1, 16] {
        for (tenant, whose) in [(0, "of the same tenant"), (1, "of another tenant")] {
            let visit = curve.visit("heavy")?.clone();
            let arrivals = Arrivals::Closed { clients, retry: SECOND, until };
            let heavy = Class { name: "heavy", tenant, visit, patience: None, arrivals };
            let case = format!("beside {clients} heavy, {whose}");
            runs.push(run("heavy", curve, &case, vec![small(curve, 0.1, 0, None, until)?, heavy], until));
        }
    }
    Ok(runs)
}

/// Thirty requests at once every five seconds, on top of a steady fifth of the machine.
fn bursts(curve: &Curve, until: u64) -> Result<Vec<Run>> {
    let steady = small(curve, 0.2, 0, None, until)?;
    let arrivals = Arrivals::Bursts { every: 5 * SECOND, size: 30, until };
    let burst = Class { name: "burst", arrivals, ..steady.clone() };
    Ok(vec![
        run("bursts", curve, "alone", vec![steady.clone()], until),
        run("bursts", curve, "beside 30 at once every 5 s", vec![steady, burst], until),
    ])
}

/// A tenant that uses a tenth of the machine, beside one with 1,500 clients.
fn tenants(curve: &Curve, until: u64) -> Result<Vec<Run>> {
    let polite = Class { name: "polite", ..small(curve, 0.1, 1, Some(10 * SECOND), until)? };
    let arrivals = Arrivals::Closed { clients: 1500, retry: SECOND, until };
    let greedy = Class { name: "greedy", tenant: 2, arrivals, ..polite.clone() };
    Ok(vec![
        run("tenants", curve, "alone", vec![polite.clone()], until),
        run("tenants", curve, "beside 1,500 greedy clients", vec![polite, greedy], until),
    ])
}

/// Half of what the machine can do for 30 s, several times that for 60 s, then half again for two
/// minutes.
fn overload(curve: &Curve) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for (factor, patience) in [(2.0, 1), (4.0, 1), (10.0, 1), (4.0, 10)] {
        let visit = curve.visit("cold")?.clone();
        let full = 1e6 / curve.alone(&visit) as f64;
        let phases = [(30, 0.5), (90, factor), (210, 0.5)];
        let phases = phases.map(|(until, load)| Phase { until: until * SECOND, per_second: load * full });
        let arrivals = Arrivals::Poisson(phases.into());
        let class = Class { name: "all", tenant: 0, visit, patience: Some(patience * SECOND), arrivals };
        let case = format!("{factor} times for 60 s, deadline {patience} s");
        let mut overload = run("overload", curve, &case, vec![class], 210 * SECOND);
        overload.relief = Some(90 * SECOND);
        runs.push(overload);
    }
    Ok(runs)
}

/// Compares the P99 of each class with that of the same class alone.
fn compare(records: &mut [Record]) {
    let alone: Vec<Record> = records.iter().filter(|record| record.case == "alone").cloned().collect();
    for record in records.iter_mut() {
        let same = |alone: &&Record| {
            let of = |record: &Record| (record.section, record.curve.clone(), record.class, record.policy);
            of(alone) == of(record)
        };
        let alone = alone.iter().find(same).map(|alone| alone.summary.p99_ms).filter(|p99| *p99 > 0.0);
        record.unfairness = alone.map(|alone| round(record.summary.p99_ms / alone));
    }
}
