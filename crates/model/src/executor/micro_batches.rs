//! Candidates that are scored a few at a time: in micro-batches, and those in parts if the plan says so
//! (M-FALCON, Zhai et al. 2024, appendix H). Micro-batches take the place of beams: the first expansion
//! computes nothing, and each branch step takes the next candidates.

use std::ops::Range;

use beamline_compute::cpu::pages::PAGE_SIZE;

use crate::step::{Progress, StepError};
use crate::task::Answer;

/// How far a request that scores candidates has come.
#[derive(Debug, Default)]
pub(super) struct MicroBatches {
    /// Candidates of a micro-batch.
    at_a_time: usize,
    /// Where the micro-batch at hand ends.
    end: usize,
    /// Predictions so far.
    predictions: Vec<f32>,
    /// Candidates that have them.
    scored: usize,
}

impl MicroBatches {
    /// Says how many are scored at a time.
    pub(super) fn begin(&mut self, width: usize) {
        self.at_a_time = width.max(1);
    }

    /// Progress of a request with this number of candidates after its first expansion, which computes
    /// nothing.
    pub(super) fn prefilled(&self, candidates: usize) -> Progress<Answer> {
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
    pub(super) fn next(
        &mut self,
        candidates: usize,
        rows: usize,
        branch_pages: usize,
    ) -> Result<Range<usize>, StepError> {
        if self.scored == self.end {
            self.end = candidates.min(self.scored + self.at_a_time);
        }
        let next = self.scored..self.end.min(self.scored.saturating_add(rows));
        if next.is_empty() || branch_pages * PAGE_SIZE < next.len() {
            return Err(StepError(format!("{branch_pages} branch pages for {next:?}")));
        }
        Ok(next)
    }

    /// Takes the predictions of candidates that end before `end`, of `candidates` in all.
    pub(super) fn take(&mut self, predictions: Vec<f32>, end: usize, candidates: usize) -> Progress<Answer> {
        self.predictions.extend(predictions);
        self.scored = end;
        if end < self.end {
            return Progress::Partly { left: self.end - end };
        }
        match (candidates - end).min(self.at_a_time) {
            0 => Progress::Finished(Answer::Predictions(std::mem::take(&mut self.predictions))),
            rows => Progress::Expanded { rows },
        }
    }
}
