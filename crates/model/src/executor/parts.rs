//! What a step of an HSTU model does for each entry of its plan, and how far a request that ranks has come: what the executors on the
//! CPU and on a graphics processor have in common.

use std::ops::Range;

use beamline_compute::cpu::pages::PAGE_SIZE;

use super::hstu::HstuAnswer;
use crate::step::{Progress, StepError};

const NOT_FINITE: &str = "the model produced states that are not finite";

/// What the step does for one entry of the plan.
#[derive(Debug)]
pub(crate) enum Part {
    /// Nothing more than its context rows.
    Context,
    /// The first micro-batch comes next.
    Prefilled,
    /// The state of this row, among the wanted ones, finds items.
    Retrieve {
        /// Which.
        row: usize,
    },
    /// The states from this row on predict these candidates.
    Rank {
        /// The first.
        row: usize,
        /// Which.
        candidates: Range<usize>,
    },
    /// The next of the searches.
    Decode,
    /// It cannot be computed.
    Failed(String),
}

/// Candidates that are ranked some at a time: in micro-batches, and those in parts, if the plan says so.
#[derive(Debug, Default)]
pub(crate) struct MicroBatches {
    /// Candidates of a micro-batch.
    at_a_time: usize,
    /// Where the micro-batch at hand ends.
    end: usize,
    /// Predictions so far.
    predictions: Vec<f32>,
    /// Candidates that have them.
    ranked: usize,
}

impl MicroBatches {
    /// Says how many are ranked at a time.
    pub(crate) fn begin(&mut self, width: usize) {
        self.at_a_time = width.max(1);
    }

    /// What the first expansion, which computes nothing, has done for a request of so many candidates.
    pub(crate) fn prefilled(&self, candidates: usize) -> Progress<HstuAnswer> {
        match candidates.min(self.at_a_time) {
            0 => Progress::Failed("no candidates".into()),
            rows => Progress::Expanded { rows },
        }
    }

    /// The candidates that come next, at most `rows` of the micro-batch at hand.
    ///
    /// # Errors
    ///
    /// When there are none, or too few pages for them.
    pub(crate) fn next(
        &mut self,
        candidates: usize,
        rows: usize,
        branch_pages: usize,
    ) -> Result<Range<usize>, StepError> {
        if self.ranked == self.end {
            self.end = candidates.min(self.ranked + self.at_a_time);
        }
        let next = self.ranked..self.end.min(self.ranked.saturating_add(rows));
        if next.is_empty() || branch_pages * PAGE_SIZE < next.len() {
            return Err(StepError(format!("{branch_pages} branch pages for {next:?}")));
        }
        Ok(next)
    }

    /// Takes the predictions of candidates that end before `end`, made from these states. A network may hide that a state is not finite:
    /// so both are looked at.
    pub(crate) fn take(
        &mut self,
        states: &[f32],
        predictions: Option<Vec<f32>>,
        end: usize,
        candidates: usize,
    ) -> Progress<HstuAnswer> {
        match predictions {
            None => Progress::Failed("the model does not rank".into()),
            Some(predictions) if states.iter().chain(&predictions).any(|x| !x.is_finite()) => {
                Progress::Failed(NOT_FINITE.into())
            }
            Some(predictions) => {
                self.predictions.extend(predictions);
                self.ranked = end;
                if end < self.end {
                    return Progress::Partly { left: self.end - end };
                }
                match (candidates - end).min(self.at_a_time) {
                    0 => Progress::Finished(HstuAnswer::Predictions(std::mem::take(&mut self.predictions))),
                    rows => Progress::Expanded { rows },
                }
            }
        }
    }
}
