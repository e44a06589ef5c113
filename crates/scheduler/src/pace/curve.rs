//! The time of a step as a line: a fixed part, and a part for each row.
//!
//! The fixed part is what requests save by sharing a step: weights are read once, kernels are
//! started once. On a CPU it is small beside a context and large beside a beam; on a GPU it is
//! nearly all of a step. The line is fitted to the newest steps by least squares.

use crate::time::Micros;

/// Weight of a step is multiplied by this with each newer step: after 64 steps it counts about a
/// third.
const KEPT: f64 = 63.0 / 64.0;
/// Weight of an imaginary step of no rows that takes no time. It makes the line go through the
/// origin where all steps are alike, so that time is not taken for fixed without evidence.
const ORIGIN: f64 = 0.5;
/// A step counts at most as this many times its expected time: a step that the operating system
/// interrupted says little.
const OUTLIER: f64 = 3.0;
/// Least part of a step's time that is assumed to depend on its rows.
const LEAST_SLOPE: f64 = 1.0 / 64.0;
/// The rows of a step should take at least this many times the fixed part.
const LEAST_WORK: u64 = 8;
/// Least spread of the rows of steps, as variance over squared mean. Below it the two parts of the
/// line cannot be distinguished.
const LEAST_SPREAD: f64 = 0.02;

/// The time of a step, by its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Curve {
    /// Fixed time of a step, in nanoseconds.
    pub(crate) per_step: u64,
    /// Time of each row, in nanoseconds; at least 1.
    pub(crate) per_row: u64,
    /// Whether the two parts could be distinguished: steps of different sizes were seen.
    pub(crate) is_known: bool,
}

impl Curve {
    /// Time of `steps` steps that hold `rows` rows together.
    pub(crate) fn time_of(&self, steps: u64, rows: u64) -> Micros {
        let nanos = steps.saturating_mul(self.per_step).saturating_add(rows.saturating_mul(self.per_row));
        Micros(nanos / 1000)
    }

    /// Number of rows of a step that takes `time`. At least as many rows as take eight times the
    /// fixed part: shorter steps would waste the processor.
    pub(crate) fn rows_in(&self, time: Micros) -> usize {
        let left = time.0.saturating_mul(1000).saturating_sub(self.per_step);
        usize::try_from(left.max(self.per_step.saturating_mul(LEAST_WORK)) / self.per_row)
            .unwrap_or(usize::MAX)
    }
}

/// Weighted sums over the newest steps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fit {
    weight: f64,
    rows: f64,
    rows_squared: f64,
    nanos: f64,
    rows_nanos: f64,
}

impl Fit {
    /// Records that a step of `rows` rows took `took`.
    pub(super) fn observe(&mut self, took: Micros, rows: usize) {
        let rows = rows as f64;
        let mut nanos = took.0 as f64 * 1000.0;
        if let Some(line) = self.line().filter(|_| self.weight > 8.0) {
            nanos = nanos.min(OUTLIER * (line.per_step + line.per_row * rows));
        }
        for (sum, value) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.rows_squared, rows * rows),
            (&mut self.nanos, nanos),
            (&mut self.rows_nanos, rows * nanos),
        ] {
            *sum = *sum * KEPT + value;
        }
    }

    /// The fitted line; `None` before a step was seen.
    pub(super) fn curve(&self) -> Option<Curve> {
        let line = self.line()?;
        let mean = self.rows / self.weight;
        let spread = (self.rows_squared / self.weight - mean * mean) / (mean * mean);
        // Casts from floats saturate, and NaN becomes 0.
        let per_row = (line.per_row as u64).max(1);
        Some(Curve { per_step: line.per_step as u64, per_row, is_known: spread >= LEAST_SPREAD })
    }

    fn line(&self) -> Option<Line> {
        if self.weight == 0.0 || self.rows == 0.0 {
            return None;
        }
        let weight = self.weight + ORIGIN;
        let (rows, nanos) = (self.rows / weight, self.nanos / weight);
        let variance = self.rows_squared / weight - rows * rows;
        let slope = (self.rows_nanos / weight - rows * nanos) / variance;
        let through_origin = self.rows_nanos / self.rows_squared;
        let per_row = slope.clamp(through_origin * LEAST_SLOPE, through_origin);
        Some(Line { per_step: (nanos - per_row * rows).max(0.0), per_row })
    }
}

struct Line {
    per_step: f64,
    per_row: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(steps: impl IntoIterator<Item = (u64, usize)>) -> Curve {
        let mut fit = Fit::default();
        steps.into_iter().for_each(|(micros, rows)| fit.observe(Micros(micros), rows));
        fit.curve().expect("steps were seen")
    }

    fn close(found: u64, expected: u64) -> bool {
        found.abs_diff(expected) * 20 <= expected
    }

    #[test]
    fn steps_of_different_sizes_tell_the_fixed_part() {
        let time = |rows: usize| (2000 + 40 * rows as u64, rows);
        let curve = fitted((0..200).map(|step| time([320, 32, 32][step % 3])));
        assert!(curve.is_known);
        assert!(close(curve.per_step, 2_000_000) && close(curve.per_row, 40_000), "{curve:?}");
        assert!(curve.time_of(2, 100).0.abs_diff(8000) < 400);
        let rows = curve.rows_in(Micros(20_000));
        assert!((430..470).contains(&rows), "{rows}");
        assert!(curve.rows_in(Micros(1)) >= 380, "a step is worth its fixed part");
    }

    #[test]
    fn steps_that_are_all_alike_tell_nothing_of_it() {
        let curve = fitted((0..200).map(|_| (5000, 100)));
        assert!(!curve.is_known);
        assert!(close(curve.per_row, 50_000) && curve.per_step < 100_000, "{curve:?}");
    }

    #[test]
    fn a_device_whose_steps_all_take_the_same_time() {
        let curve = fitted((0..200).map(|step| (5000, [40, 400, 4000][step % 3])));
        assert!(curve.is_known);
        assert!(curve.per_step > 4_000_000, "{curve:?}");
        assert!(curve.rows_in(Micros(20_000)) > 10_000, "{curve:?}");
    }

    #[test]
    fn one_interrupted_step_changes_little_and_a_slower_machine_much() {
        let time = |step: usize| (2000 + 40 * [320, 32, 32][step % 3] as u64, [320, 32, 32][step % 3]);
        let interrupted = (0..100).map(time).chain([(2_000_000, 32)]).chain((0..9).map(time));
        let curve = fitted(interrupted);
        assert!(curve.time_of(1, 320).0 < 16_000, "{curve:?}");
        let slower = (0..100).map(time).chain((0..200).map(|step| (time(step).0 * 4, time(step).1)));
        assert!(close(fitted(slower).time_of(1, 320).0, 59_200));
    }
}
