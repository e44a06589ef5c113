//! How long a step of a model takes on a machine, depending on its rows.
//!
//! A step takes a fixed time (weights are read, threads wake), a time for each context row and for
//! each branch row, and a time for every earlier position that a row reads. `curves.json` holds
//! measured numbers; [`crate::fit`] fits them to a benchmark of another machine.
//!
//! Left out are noise, and the slow-down of rows of different requests that compete for the CPU
//! caches.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The curves that come with this crate.
const CURVES: &str = include_str!("../curves.json");

/// The cost curve of a model on a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Curve {
    /// Name of the model and the machine.
    pub name: String,
    /// Where the numbers come from.
    pub source: String,
    /// Fixed time of a step, in microseconds.
    pub fixed_us: f64,
    /// Time of a context row, in microseconds.
    pub context_row_us: f64,
    /// Time per earlier position that a context row reads, in nanoseconds.
    pub context_read_ns: f64,
    /// Points (branch rows of a step, microseconds that they take) of a line that begins at the
    /// origin and goes on with its last slope.
    pub branch_us: Vec<(f64, f64)>,
    /// Time per context position that a branch row reads, in nanoseconds.
    pub branch_read_ns: f64,
    /// Size of keys and values per context position, in bytes.
    pub position_bytes: usize,
    /// Typical requests of this model.
    pub visits: Vec<Visit>,
}

/// The work of one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Visit {
    /// Name of the visit.
    pub name: String,
    /// Number of context positions.
    pub context: usize,
    /// Context positions that an earlier visit left in the cache: whole pages.
    pub cached: usize,
    /// Number of branch rows of a branch step.
    pub beams: usize,
    /// Number of expansions; the branch steps are one fewer.
    pub steps: usize,
}

/// The rows of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Number of context rows.
    pub context: u64,
    /// Earlier positions that the context rows read, all rows together.
    pub context_reads: u64,
    /// Number of branch rows.
    pub branch: u64,
    /// Context positions that the branch rows read, all rows together.
    pub branch_reads: u64,
}

impl Rows {
    /// Adds context rows at positions `from` to `to`.
    pub fn add_context(&mut self, from: usize, to: usize) {
        let (from, to) = (from as u64, to as u64);
        self.context += to - from;
        // Position n reads n other positions.
        self.context_reads += (from + to).saturating_sub(1) * (to - from) / 2;
    }

    /// Adds a branch step over a context.
    pub fn add_branch(&mut self, beams: usize, context: usize) {
        self.branch += beams as u64;
        self.branch_reads += beams as u64 * context as u64;
    }
}

impl Curve {
    /// The curves that come with this crate.
    ///
    /// # Errors
    ///
    /// When the file is damaged.
    pub fn all() -> Result<Vec<Self>> {
        Self::read(CURVES)
    }

    /// Reads curves from the text of a file.
    ///
    /// # Errors
    ///
    /// When the text is not a list of curves, or a curve is not meaningful.
    pub fn read(text: &str) -> Result<Vec<Self>> {
        let curves: Vec<Self> = serde_json::from_str(text).context("cost curves")?;
        for curve in &curves {
            curve.check().with_context(|| format!("the curve {:?}", curve.name))?;
        }
        Ok(curves)
    }

    fn check(&self) -> Result<()> {
        let numbers = [self.fixed_us, self.context_row_us, self.context_read_ns, self.branch_read_ns];
        ensure!(
            numbers.iter().all(|number| number.is_finite() && *number >= 0.0),
            "a time is less than nothing"
        );
        let mut before = (0.0, 0.0);
        for &(rows, us) in &self.branch_us {
            ensure!(rows > before.0 && us >= before.1 && us.is_finite(), "branch_us does not rise");
            before = (rows, us);
        }
        for Visit { name, context, cached, beams, steps } in &self.visits {
            ensure!(cached < context && *beams > 0 && *steps > 0, "the visit {name:?} means nothing");
        }
        Ok(())
    }

    /// The visit of this name.
    ///
    /// # Errors
    ///
    /// When the curve has no such visit.
    pub fn visit(&self, name: &str) -> Result<&Visit> {
        let found = self.visits.iter().find(|visit| visit.name == name);
        found.with_context(|| format!("the curve {:?} has no visit {name:?}", self.name))
    }

    /// Time of a step, in microseconds; at least 1.
    #[must_use]
    pub fn step(&self, rows: Rows) -> u64 {
        let reads =
            rows.context_reads as f64 * self.context_read_ns + rows.branch_reads as f64 * self.branch_read_ns;
        let context = rows.context as f64 * self.context_row_us;
        let us = self.fixed_us + context + self.branches(rows.branch as f64) + reads / 1e3;
        (us.round() as u64).max(1)
    }

    /// Number of earlier positions that a context row reads in the same time as its other work
    /// takes.
    #[must_use]
    pub fn pairs_per_row(&self) -> u64 {
        // The cast from a float saturates. Attention that costs nothing has no limit.
        ((self.context_row_us * 1e3 / self.context_read_ns) as u64).max(1)
    }

    /// Time of a request alone, in microseconds: one step for its context, one for each branch
    /// step.
    #[must_use]
    pub fn alone(&self, visit: &Visit) -> u64 {
        let (mut context, mut branch) = (Rows::default(), Rows::default());
        context.add_context(visit.cached, visit.context);
        branch.add_branch(visit.beams, visit.context);
        self.step(context) + (visit.steps as u64 - 1) * self.step(branch)
    }

    /// Time of branch rows without their reads, in microseconds.
    fn branches(&self, rows: f64) -> f64 {
        let mut before = (0.0, 0.0);
        let mut slope = 0.0;
        for &(at, us) in &self.branch_us {
            slope = (us - before.1) / (at - before.0);
            if rows <= at {
                break;
            }
            before = (at, us);
        }
        before.1 + (rows - before.0) * slope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        Curve {
            name: "made up".into(),
            source: "nowhere".into(),
            fixed_us: 100.0,
            context_row_us: 10.0,
            context_read_ns: 1000.0,
            branch_us: vec![(10.0, 50.0), (20.0, 80.0)],
            branch_read_ns: 0.0,
            position_bytes: 1,
            visits: vec![],
        }
    }

    #[test]
    fn a_step_is_the_sum_of_its_parts() {
        let mut rows = Rows::default();
        rows.add_context(2, 5);
        assert_eq!(rows, Rows { context: 3, context_reads: 2 + 3 + 4, branch: 0, branch_reads: 0 });
        assert_eq!(curve().step(rows), 100 + 30 + 9);
        let branch = |beams| {
            let mut rows = Rows::default();
            rows.add_branch(beams, 7);
            curve().step(rows)
        };
        assert_eq!([5, 10, 15, 20, 30].map(branch), [125, 150, 165, 180, 210]);
    }

    #[test]
    fn a_visit_takes_a_step_for_its_context_and_one_for_each_branch_step() {
        let visit = Visit { name: "v".into(), context: 4, cached: 3, beams: 10, steps: 3 };
        assert_eq!(curve().alone(&visit), (100 + 10 + 3) + 2 * 150);
    }

    #[test]
    fn the_curves_of_this_crate_are_sound_and_meet_what_was_measured() {
        let curves = Curve::all().unwrap();
        let ms = |curve: &str, visit: &str| {
            let curve = curves.iter().find(|all| all.name == curve).unwrap();
            curve.alone(curve.visit(visit).unwrap()) as f64 / 1e3
        };
        // Medians of `bench.md`, `hstu-zen4.md` and `published.jsonl`.
        let measured = [
            ("S", "cold", 19.1),
            ("S", "warm", 6.7),
            ("M", "cold", 456.0),
            ("M", "warm", 103.0),
            ("HSTU retrieval", "cold", 64.1),
            ("HSTU retrieval", "warm", 2.75),
            ("HSTU ranking", "cold", 87.6),
            ("HSTU ranking", "warm", 21.5),
            ("Qwen3-1.7B on an H100", "1000 tokens", 17.6),
            ("Qwen3-1.7B on an H100", "5000 tokens", 42.3),
        ];
        for (curve, visit, measured) in measured {
            let ms = ms(curve, visit);
            assert!((ms / measured - 1.0).abs() < 0.2, "{curve}, {visit}: {ms} ms, {measured} were measured");
        }
    }

    #[test]
    fn curves_that_mean_nothing_are_refused() {
        let text = |curve: &Curve| serde_json::to_string(&[curve]).unwrap();
        assert!(Curve::read(&text(&curve())).is_ok());
        let falling = Curve { branch_us: vec![(10.0, 50.0), (20.0, 40.0)], ..curve() };
        let negative = Curve { fixed_us: -1.0, ..curve() };
        let visit = Visit { name: "v".into(), context: 4, cached: 4, beams: 10, steps: 3 };
        let nothing_to_do = Curve { visits: vec![visit], ..curve() };
        for bad in [falling, negative, nothing_to_do] {
            assert!(Curve::read(&text(&bad)).is_err(), "{bad:?}");
        }
    }
}
