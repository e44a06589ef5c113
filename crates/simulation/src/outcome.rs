//! The results of requests, in numbers.

use serde::Serialize;

use crate::traffic::{Class, End, Fate};

/// Length of a window in which answers are counted, in microseconds.
pub const WINDOW: u64 = 5_000_000;
/// Length of a window that is checked for recovery, in microseconds.
const LOOK: u64 = 1_000_000;
/// Number of good windows in a row that count as recovery: one alone may be luck.
const GOOD_SECONDS: usize = 3;

/// Counts and times of the requests of a class.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Number of requests that arrived.
    pub requests: usize,
    /// Number of requests that were answered, however late.
    pub answered: usize,
    /// Number of requests that were answered too late to be useful.
    pub late: usize,
    /// Number of requests that were refused on arrival.
    pub refused: usize,
    /// Number of requests that were accepted and given up.
    pub lost: usize,
    /// Mean time from arrival to answer of the answered requests, in milliseconds.
    pub mean_ms: f64,
    /// Median of that time, in milliseconds.
    pub p50_ms: f64,
    /// The 99th percentile of that time, in milliseconds.
    pub p99_ms: f64,
    /// The 99.9th percentile of that time, in milliseconds.
    pub p999_ms: f64,
}

impl Summary {
    /// Summarises the requests of one class.
    #[must_use]
    pub fn of(fates: &[Fate], index: usize, class: &Class) -> Self {
        let own: Vec<Fate> = fates.iter().filter(|fate| fate.job.class == index).copied().collect();
        let count = |ending| own.iter().filter(|fate| fate.ending == ending).count();
        let late = own.iter().filter(|fate| fate.ending == End::Answered && !in_time(fate, class)).count();
        let mut times = milliseconds(&own);
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = ((share * times.len() as f64).ceil() as usize).max(1) - 1;
            round(times.get(index).copied().unwrap_or(0.0))
        };
        Self {
            requests: own.len(),
            answered: count(End::Answered),
            late,
            refused: count(End::Refused),
            lost: count(End::Lost),
            mean_ms: round(times.iter().sum::<f64>() / times.len().max(1) as f64),
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
        }
    }
}

/// Times from arrival to answer of the answered requests, in milliseconds.
#[must_use]
pub fn milliseconds(fates: &[Fate]) -> Vec<f64> {
    let answered = fates.iter().filter(|fate| fate.ending == End::Answered);
    answered.map(|fate| (fate.ended - fate.job.arrived) as f64 / 1e3).collect()
}

/// Answers in time per second, in windows of [`WINDOW`] from the start.
#[must_use]
pub fn goodput(fates: &[Fate], class: &Class, until: u64) -> Vec<f64> {
    let mut windows = vec![0.0; until.div_ceil(WINDOW) as usize];
    for fate in fates.iter().filter(|fate| in_time(fate, class)) {
        if let Some(window) = windows.get_mut((fate.ended / WINDOW) as usize) {
            *window += 1e6 / WINDOW as f64;
        }
    }
    windows.into_iter().map(round).collect()
}

/// Seconds after `from` until requests are served well again: until the first of [`GOOD_SECONDS`]
/// windows in a row in each of which at least nine in ten arrivals are answered within `well`
/// microseconds. `None` if there is no such window.
#[must_use]
pub fn recovery(fates: &[Fate], from: u64, until: u64, well: u64) -> Option<f64> {
    let mut seconds = vec![(0_usize, 0_usize); ((until - from) / LOOK) as usize];
    for fate in fates.iter().filter(|fate| fate.job.arrived >= from) {
        if let Some((all, good)) = seconds.get_mut(((fate.job.arrived - from) / LOOK) as usize) {
            let took = fate.ended - fate.job.arrived;
            *all += 1;
            *good += usize::from(fate.ending == End::Answered && took <= well);
        }
    }
    let good = |(all, good): &(usize, usize)| good * 10 >= all * 9;
    seconds.windows(GOOD_SECONDS).position(|row| row.iter().all(good)).map(|second| second as f64)
}

fn in_time(fate: &Fate, class: &Class) -> bool {
    let took = fate.ended - fate.job.arrived;
    fate.ending == End::Answered && class.patience.is_none_or(|patience| took <= patience)
}

/// Rounds milliseconds to whole microseconds.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curve::Visit;
    use crate::traffic::{Arrivals, Job};

    fn class(patience: u64) -> Class {
        let visit = Visit { name: "v".into(), context: 1, cached: 0, beams: 1, steps: 1 };
        let arrivals = Arrivals::Poisson(vec![]);
        Class { name: "c", tenant: 0, visit, patience: Some(patience), arrivals }
    }

    fn fate(arrived: u64, took: u64, ending: End) -> Fate {
        Fate { job: Job { id: arrived, class: 0, arrived }, ended: arrived + took, ending }
    }

    #[test]
    fn percentiles_are_of_answers_and_late_ones_are_counted() {
        let mut fates: Vec<Fate> = (1..=100).map(|n| fate(0, n * 1000, End::Answered)).collect();
        fates.extend([fate(0, 0, End::Refused), fate(0, 9000, End::Lost)]);
        let found = Summary::of(&fates, 0, &class(90_000));
        let counts = (found.requests, found.answered, found.late, found.refused, found.lost);
        assert_eq!(counts, (102, 100, 10, 1, 1));
        assert_eq!((found.mean_ms, found.p50_ms, found.p99_ms, found.p999_ms), (50.5, 50.0, 99.0, 100.0));
        assert_eq!(Summary::of(&fates, 1, &class(1)), Summary::default());
    }

    #[test]
    fn goodput_counts_what_was_in_time_in_the_window_in_which_it_ended() {
        let fates = [
            fate(0, 1000, End::Answered),
            fate(WINDOW - 1, 1000, End::Answered),
            fate(WINDOW, 5001, End::Answered),
            fate(WINDOW, 10, End::Refused),
        ];
        assert_eq!(goodput(&fates, &class(5000), 2 * WINDOW), [0.2, 0.2]);
    }

    #[test]
    fn recovery_is_the_beginning_of_three_good_seconds() {
        let at = |second: u64, took| fate(second * LOOK, took, End::Answered);
        let fates = [500, 50, 50, 500, 50, 50, 50, 500].into_iter().enumerate();
        let fates: Vec<Fate> = fates.map(|(second, took)| at(second as u64, took)).collect();
        assert_eq!(recovery(&fates, 0, 8 * LOOK, 100), Some(4.0));
        assert_eq!(recovery(&fates, 4 * LOOK, 8 * LOOK, 100), Some(0.0));
        assert_eq!(recovery(&fates, 0, 6 * LOOK, 100), None);
    }
}
