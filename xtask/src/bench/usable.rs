//! How much of the capacity of a queue is usable: section `open-loop` beside an M/D/1 queue whose
//! requests take the median of a request that is alone.
//!
//! `U` is the highest measured rate with P99 under the objective, over the highest rate of that queue.
//! Above 1, computing requests together won more than the server's overhead cost.

use serde::{Deserialize, Serialize};

use super::open_loop::TARGET_MS;
use super::record::Record;
use crate::mdone::{Queue, highest_rate};

/// What the queue does at the rate of a measured point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Beside {
    /// Median of a request that is alone, in milliseconds: what the queue takes for each.
    pub(super) alone_ms: f64,
    /// Rate times that.
    pub(super) load: f64,
    /// Milliseconds of the queue; nothing where more comes than it can take.
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
}

/// What of a queue is usable, for one kind of visit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Usable {
    pub(super) workload: String,
    pub(super) visit: String,
    pub(super) alone_ms: f64,
    /// Highest rates with P99 under the objective, a second: measured, and of the queue.
    pub(super) highest: f64,
    pub(super) queue: f64,
    /// The first over the second; nothing where one request alone takes longer than the objective.
    pub(super) u: Option<f64>,
}

impl Beside {
    pub(super) fn new(alone_ms: f64, rate: f64) -> Self {
        let queue = Queue::new(alone_ms, rate / 1e3);
        let at = |share| queue.and_then(|queue| queue.sojourn(share)).map(round);
        Self { alone_ms, load: round(alone_ms * rate / 1e3), p50: at(0.5), p99: at(0.99) }
    }
}

/// The highest rate, a second, at which a queue holds the objective; 0 if none.
pub(super) fn highest_of_the_queue(alone_ms: f64) -> f64 {
    highest_rate(alone_ms, 0.99, TARGET_MS) * 1e3
}

/// What the points of a run say, one entry a workload and kind of visit.
pub(super) fn usable<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<Usable> {
    let mut all: Vec<Usable> = Vec::new();
    for record in records.into_iter().filter(|record| record.section == "open-loop") {
        let (Some(beside), Some(rate)) = (record.beside, record.rate) else { continue };
        let same = |entry: &&mut Usable| entry.workload == record.workload && entry.visit == record.visit;
        let highest = if record.is_good(TARGET_MS) { rate } else { 0.0 };
        if let Some(entry) = all.iter_mut().find(same) {
            entry.highest = entry.highest.max(highest);
        } else {
            let queue = round(highest_of_the_queue(beside.alone_ms));
            let (workload, visit) = (record.workload.clone(), record.visit.clone());
            all.push(Usable { workload, visit, alone_ms: beside.alone_ms, highest, queue, u: None });
        }
    }
    for entry in &mut all {
        entry.u = (entry.queue > 0.0).then(|| round(entry.highest / entry.queue));
    }
    all
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::Percentiles;

    fn point(rate: f64, p99: f64, refused: usize) -> Record {
        Record {
            workload: "S".into(),
            section: "open-loop".into(),
            visit: "cold".into(),
            ms: Percentiles { p99, ..Percentiles::default() },
            requests: 100,
            refused,
            rate: Some(rate),
            beside: Some(Beside::new(20.0, rate)),
            ..Record::default()
        }
    }

    #[test]
    fn the_highest_rate_that_held_is_over_that_of_the_queue() {
        let points =
            [point(5.0, 40.0, 0), point(25.0, 99.0, 0), point(36.0, 101.0, 0), point(40.0, 20.0, 50)];
        let found = usable(&points);
        let [only] = &found[..] else { panic!("{found:?}") };
        assert_eq!(only.highest, 25.0, "late or refused is not good");
        assert_eq!(only.queue, 28.039);
        assert_eq!(only.u, Some(0.892));
    }

    #[test]
    fn where_one_alone_is_late_nothing_is_usable() {
        let slow = Record { beside: Some(Beside::new(500.0, 1.0)), ..point(1.0, 900.0, 0) };
        assert_eq!(usable(&[slow])[0].u, None);
    }

    #[test]
    fn a_queue_that_cannot_keep_up_has_no_percentiles() {
        let beside = Beside::new(20.0, 60.0);
        assert_eq!((beside.load, beside.p50, beside.p99), (1.2, None, None));
        let beside = Beside::new(20.0, 5.0);
        assert_eq!(beside.p50, Some(20.0));
        assert!(beside.p99.is_some_and(|p99| (30.0..45.0).contains(&p99)), "{beside:?}");
    }
}
