//! How long steps take: the time that pending work needs, the time that sharing a step saves, and
//! the widest beam that still makes its deadline.
//!
//! Rows are rows of work here, see `limits`: a row that attends to many positions counts as more.
//!
//! Two estimates are made from the measured steps. The *mean per row* says how fast pending work is
//! done: it decides which requests come too late to be accepted, and how wide a beam may be. The
//! *curve* says that a step takes a fixed time and a time for each row: it decides which requests
//! share a step and how many rows a step holds.
//!
//! The same steps give the same numbers, so a replay makes the same decisions.

mod curve;
mod load;

pub(crate) use curve::Curve;

use crate::{event::Degraded, time::Micros};
use curve::Fit;
use load::Load;

/// A step of this many rows weighs as much as all steps before it. A step of a few rows takes
/// mostly the time that every step takes, so it says little about the time of many rows.
const INERTIA: u64 = 512;
/// Number of rows after which the estimate is trusted enough to refuse requests.
const TRUSTED: u64 = 1024;
/// Shares are counted in 1024ths. A new share counts for an eighth.
const WHOLE: u64 = 1024;
const SHARE_INERTIA: u64 = 8;

/// Mean nanoseconds per row, weighted by rows, the newest most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The mean; `None` until a step was seen.
    nanos_per_row: Option<u64>,
    rows_seen: u64,
    /// Rows that admitted requests had to compute, as a share (in 1024ths) of the rows without a
    /// cache.
    computed_share: u64,
    fit: Fit,
    load: Load,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            nanos_per_row: None,
            rows_seen: 0,
            computed_share: WHOLE,
            fit: Fit::default(),
            load: Load::default(),
        }
    }
}

/// A beam whose width is to be chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beam {
    /// The widest and the narrowest acceptable beam.
    pub(crate) width: usize,
    pub(crate) least: usize,
    /// Branch steps after the first expansion.
    pub(crate) branch_steps: usize,
    /// Work of a thousand rows of this beam.
    pub(crate) per_thousand: u64,
    /// Rows of the step that makes the first expansion, and how many of them belong to other
    /// requests. The steps after it are assumed to hold as many rows of other requests.
    pub(crate) rows_now: usize,
    pub(crate) rows_of_others: usize,
}

impl Pace {
    /// Records that a step of `rows` rows took `took`.
    pub(crate) fn observe(&mut self, took: Micros, rows: usize) {
        if rows == 0 {
            return;
        }
        self.fit.observe(took, rows);
        let rows = rows as u64;
        let sample = took.0.saturating_mul(1000) / rows;
        self.rows_seen = self.rows_seen.saturating_add(rows);
        let old = INERTIA.min(self.rows_seen - rows);
        self.nanos_per_row = Some(match self.nanos_per_row {
            None => sample,
            Some(mean) => {
                let (mean, sample) = (u128::from(mean), u128::from(sample));
                let sum = mean * u128::from(old) + sample * u128::from(rows);
                u64::try_from(sum / u128::from(old + rows)).unwrap_or(u64::MAX)
            }
        });
    }

    /// Records that a request was admitted for `rows` rows and would need `uncached` with an empty
    /// cache.
    pub(crate) fn observe_admission(&mut self, rows: u64, uncached: u64) {
        let share = rows.saturating_mul(WHOLE) / uncached.max(1);
        self.computed_share =
            self.computed_share - self.computed_share / SHARE_INERTIA + share.min(WHOLE) / SHARE_INERTIA;
    }

    /// Rows that requests are expected to need, given the rows that they would need with an empty
    /// cache.
    pub(crate) fn expected_work(&self, uncached: u64) -> u64 {
        uncached.saturating_mul(self.computed_share) / WHOLE
    }

    /// The time that `rows` rows will take, once the estimate can be trusted.
    pub(crate) fn time_of(&self, rows: u64) -> Option<Micros> {
        let nanos = self.nanos_per_row.filter(|_| self.rows_seen >= TRUSTED)?;
        Some(Micros(rows.saturating_mul(nanos) / 1000))
    }

    /// Records that a step that took `took` has ended at `now`.
    pub(crate) fn observe_end(&mut self, now: Micros, took: Micros) {
        self.load.observe(now, took);
    }

    /// How many times over a moment saved now is saved: every request that arrives before the next
    /// pause gains it. Depends on the load of the last second.
    pub(crate) fn worth(&self) -> u64 {
        self.load.worth()
    }

    /// The time of a step by its rows, once the estimate can be trusted.
    pub(crate) fn curve(&self) -> Option<Curve> {
        self.fit.curve().filter(|_| self.rows_seen >= TRUSTED)
    }

    /// The widest acceptable beam that is estimated to end within `left`, and why it is not the
    /// whole one. Never narrower than the least width: an estimate may be wrong, so the deadline
    /// itself decides.
    pub(crate) fn fit(&self, beam: Beam, left: Micros) -> (usize, Option<Degraded>) {
        assert!(beam.least >= 1 && beam.least <= beam.width);
        assert!(beam.rows_of_others <= beam.rows_now);
        let whole = (beam.width, None);
        let Some(nanos) = self.nanos_per_row else { return whole };
        if beam.least == beam.width || beam.branch_steps == 0 {
            return whole;
        }
        let steps = beam.branch_steps as u64;
        let own = (beam.width as u64).saturating_mul(beam.per_thousand) / 1000;
        let rows_per_step = (beam.rows_of_others as u64).saturating_add(own);
        let rows = (beam.rows_now as u64).saturating_add(steps.saturating_mul(rows_per_step));
        let needed = Micros(rows.saturating_mul(nanos) / 1000);
        if needed <= left {
            return whole;
        }
        let affordable = left.0.saturating_mul(1000) / nanos.max(1);
        let per_step = affordable.saturating_sub(beam.rows_now as u64) / steps;
        let width = per_step.saturating_sub(beam.rows_of_others as u64).saturating_mul(1000);
        let width = width / beam.per_thousand.max(1);
        let width = usize::try_from(width).unwrap_or(usize::MAX).clamp(beam.least, beam.width);
        if width == beam.width {
            return whole;
        }
        (width, Some(Degraded::Deadline { asked: beam.width, needed, left }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_narrowed_before_a_step_was_seen() {
        let beam = Beam {
            width: 64,
            least: 1,
            branch_steps: 2,
            per_thousand: 1000,
            rows_now: 10,
            rows_of_others: 0,
        };
        assert_eq!(Pace::default().fit(beam, Micros(0)), (64, None));
    }

    #[test]
    fn the_beam_is_as_wide_as_the_time_left_affords() {
        let mut pace = Pace::default();
        pace.observe(Micros(100), 100); // one microsecond per row
        let beam = Beam {
            width: 64,
            least: 8,
            branch_steps: 2,
            per_thousand: 1000,
            rows_now: 20,
            rows_of_others: 10,
        };
        assert_eq!(pace.fit(beam, Micros(20 + 2 * 74)), (64, None));
        let (width, why) = pace.fit(beam, Micros(20 + 2 * (10 + 32)));
        assert_eq!(width, 32);
        assert_eq!(why, Some(Degraded::Deadline { asked: 64, needed: Micros(168), left: Micros(104) }));
        assert_eq!(pace.fit(beam, Micros(1)).0, 8, "never under the least width");
        let far = Beam { per_thousand: 2000, ..beam };
        assert_eq!(pace.fit(far, Micros(20 + 2 * (10 + 64))).0, 32, "over a long context, rows take longer");
    }

    #[test]
    fn steps_of_few_rows_say_little_and_nothing_is_refused_by_them() {
        let mut pace = Pace::default();
        for _ in 0..20 {
            pace.observe(Micros(5000), 1);
        }
        assert_eq!(pace.time_of(1000), None);
        pace.observe(Micros(50_000), 4096);
        let time = pace.time_of(1000).unwrap();
        assert!(time < Micros(50_000), "{time:?}");
    }

    proptest! {
        #[test]
        fn more_time_never_narrows(
            took in 1u64..1_000_000, rows in 1usize..10_000, least in 1usize..512, extra in 0usize..512,
            per_thousand in 1000u64..9000, steps in 0usize..8, others in 0usize..4096, own in 1usize..64, left in 0u64..1_000_000,
        ) {
            let mut pace = Pace::default();
            pace.observe(Micros(took), rows);
            let beam = Beam {
                width: least + extra, least, branch_steps: steps, per_thousand,
                rows_now: others + own, rows_of_others: others,
            };
            let (width, why) = pace.fit(beam, Micros(left));
            prop_assert!((least..=least + extra).contains(&width));
            prop_assert_eq!(why.is_some(), width < beam.width);
            prop_assert!(pace.fit(beam, Micros(left + 1000)).0 >= width);
        }
    }
}
