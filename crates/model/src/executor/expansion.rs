//! The searches of a step: what of the logits they want, what they make of them.
//!
//! Place in the flow: an executor takes the searches that advance out of their slots, lays out the rows
//! of their beams, runs the model, and lets them look at the logits here. All searches advance at once,
//! on all threads.
//!
//! A large first branch step goes in waves, the best beams first. A continuation never scores above its
//! beam. So once the best beams have filled the next one, the worse need not be computed
//! ([`Search::worthwhile`]). After the first branch step little can be left out: the scores lie closer
//! together.
//!
//! A plan may ask for a part of the beams only. Then the search keeps what it was offered, and continues
//! in the next step with the beams behind. The answer is the same, however the beams are cut.
//!
//! What this must not know: how a model computes states or logits.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::isa::Isa;
use beamline_compute::cpu::linear::{Rows, Scores};
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_compute::cpu::parallel::write;
use beamline_kv_cache::PageId;

use crate::decode::{Normalization, Search};
use crate::step::{BranchStep, Progress, StepError};
use crate::task::Found;

/// Values kept of a head product; this bounds its memory. At least [`SCORED_ROWS`] rows are scored
/// together even so.
const SCORED_VALUES: usize = 4 << 20;
/// Fewest rows that are scored together.
const SCORED_ROWS: usize = 64;
/// Beams of the first branch steps in a step, per thread, from which on they go in waves. Half of fewer
/// beams would take little less time than all of them.
const WAVES_FROM: usize = 256;
/// Fewest beams of a search in a wave, except the last.
const SMALLEST_WAVE: usize = 8;

/// A search that takes a step, taken out of its slot so that all of them can go on at once.
#[derive(Debug)]
pub(super) struct Expansion {
    pub(super) search: Search,
    /// The entry of the plan, for a search that has branch rows.
    pub(super) branch: Option<usize>,
    /// Beams of the wave at hand; those before were offered.
    pub(super) beams: Range<usize>,
    /// Where the beams of this step end.
    end: usize,
    /// First of their rows among the wanted rows of the batch, one row per beam.
    pub(super) first_row: usize,
    /// Why it cannot go on.
    failed: Option<String>,
}

impl Expansion {
    /// The first expansion of a search.
    pub(super) fn first(search: Search) -> Self {
        let end = search.beams().len();
        Self { search, branch: None, beams: 0..end, end, first_row: 0, failed: None }
    }

    /// Beams of the search of a branch step that were not offered yet, as many as the step asks for, in
    /// one wave. `index` is the place of the branch step in the plan.
    ///
    /// # Errors
    ///
    /// When there is no search, or it is over.
    pub(super) fn branch(
        search: Option<Search>,
        index: usize,
        &BranchStep { slot, rows, .. }: &BranchStep,
    ) -> Result<Self, StepError> {
        let search = search.filter(|search| search.steps_done() > 0 && !search.is_over());
        let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", slot.0)))?;
        let start = search.offered();
        let end = search.beams().len().min(start.saturating_add(rows));
        Ok(Self { search, branch: Some(index), beams: start..end, end, first_row: 0, failed: None })
    }

    /// Tokens and lineages of the beams of this wave; returns the ancestors of each, itself included.
    pub(super) fn lay_out(
        &self,
        branch_pages: &[PageId],
        tokens: &mut Vec<u32>,
        lineage: &mut Vec<u32>,
    ) -> Result<usize, StepError> {
        let search = &self.search;
        let step = search.steps_done() - 1;
        let first = search.rows_before(step);
        if branch_pages.len() * PAGE_SIZE < first + search.beams().len() {
            let (pages, beams) = (branch_pages.len(), search.beams().len());
            return Err(StepError(format!("{pages} branch pages for {beams} beams after {first} rows")));
        }
        tokens.clear();
        lineage.clear();
        for index in self.beams.clone() {
            tokens.push(search.beams()[index].token);
            let ancestors = search.lineage(index).iter().enumerate();
            lineage.extend(ancestors.map(|(step, row)| search.rows_before(step) as u32 + row));
            lineage.push((first + index) as u32);
        }
        Ok(step + 1)
    }

    /// Gives the search up: its rows cannot be computed.
    pub(super) fn fail(&mut self, why: String) {
        self.beams.end = self.beams.start;
        self.failed = Some(why);
    }

    /// What the step did for the request; and its search, if that goes on.
    pub(super) fn outcome(self) -> (Progress<Found>, Option<Search>) {
        let Self { search, failed, .. } = self;
        match failed {
            Some(why) => (Progress::Failed(why), None),
            None if search.is_partly_offered() => {
                (Progress::Partly { left: search.beams().len() - search.offered() }, Some(search))
            }
            None if search.is_over() => {
                let found = Found { hypotheses: search.hypotheses(), steps: search.steps_done() };
                (Progress::Finished(found), None)
            }
            None => (Progress::Expanded { rows: search.beams().len() }, Some(search)),
        }
    }

    /// Its beams whose rows lie in a range.
    fn beams_in(&self, rows: &Range<usize>) -> Range<usize> {
        let end_row = self.first_row + self.beams.len();
        let start = rows.start.max(self.first_row).min(end_row);
        let end = rows.end.min(end_row).max(start);
        let beam = |row: usize| row - self.first_row + self.beams.start;
        beam(start)..beam(end)
    }

    fn offer(&mut self, isa: Isa, rows: &Range<usize>, scores: &Scores) {
        let full = self.search.normalization() == Normalization::FullVocab;
        for beam in self.beams_in(rows) {
            let row = self.first_row + (beam - self.beams.start) - rows.start;
            let normalizer = if full { scores.normalizer(isa, row) } else { None };
            let offered = self.search.offer_normalized(beam, |token| scores.logit(row, token), normalizer);
            if let Err(error) = offered {
                self.failed = Some(error.to_string());
                return;
            }
        }
    }

    /// Goes on to the next wave. Says whether there is one.
    fn next_wave(&mut self) -> bool {
        let offered = self.beams.end;
        let left = match self.failed {
            None if offered < self.search.beams().len() => self.search.worthwhile().max(offered),
            _ => offered,
        };
        if left == offered {
            // The beams behind cannot survive.
            self.end = self.search.beams().len();
        }
        self.beams = offered..wave_end(offered, left.min(self.end));
        !self.beams.is_empty()
    }

    /// Ends the step: all beams were offered that are worth it, or a part of them.
    fn advance(&mut self) {
        if self.search.is_over() || self.failed.is_some() {
            // A filter that allows nothing leaves a search that is over before it begins.
            return;
        }
        if self.end < self.search.beams().len() {
            self.search.pause(self.end);
        } else {
            self.search.advance();
        }
    }
}

/// Waves get smaller: half of what is left.
fn wave_end(start: usize, end: usize) -> usize {
    match end - start {
        few if few < 2 * SMALLEST_WAVE => end,
        left => start + left.div_ceil(2),
    }
}

/// All searches of a step, chunks first, in the order of the plan.
#[derive(Debug, Default)]
pub(super) struct Expansions {
    pub(super) list: Vec<Expansion>,
    scores: Scores,
    rows: Rows,
}

impl Expansions {
    /// Cuts the first branch steps into waves, if they are large.
    pub(super) fn cut_into_waves(&mut self, cpu: &Cpu) {
        let first_step = |e: &&mut Expansion| e.branch.is_some() && e.search.steps_done() == 1;
        let rows: usize = self.list.iter_mut().filter(first_step).map(|e| e.beams.len()).sum();
        if rows >= WAVES_FROM * cpu.threads() {
            for expansion in self.list.iter_mut().filter(first_step) {
                let Range { start, end } = expansion.beams;
                expansion.beams.end = wave_end(start, end);
            }
        }
    }

    /// Scores final states `[rows, width]` of this wave, a bounded number at a time, and offers them to
    /// their searches. `score` computes the wanted logits of some rows.
    pub(super) fn offer(
        &mut self,
        cpu: &Cpu,
        states: &[f32],
        width: usize,
        mut score: impl FnMut(&[f32], &mut Rows, &mut Scores),
    ) {
        let (isa, rows) = (cpu.isa(), states.len() / width);
        let mut start = 0;
        while start < rows {
            // The tokens wanted by the first rows say how many rows fit. More rows may want more tokens,
            // which exceeds the bound a little.
            let mut range = start..rows.min(start + SCORED_ROWS);
            self.want(&range);
            range.end = rows.min(start + (SCORED_VALUES / self.scores.width().max(1)).max(SCORED_ROWS));
            self.want(&range);
            score(&states[range.start * width..range.end * width], &mut self.rows, &mut self.scores);
            let scores = &self.scores;
            cpu.each_part(write(&mut self.list, 1), |_, expansions| {
                expansions.iter_mut().for_each(|expansion| expansion.offer(isa, &range, scores));
            });
            start = range.end;
        }
    }

    /// Says which logits of a range of rows are wanted.
    fn want(&mut self, rows: &Range<usize>) {
        let among = |e: &&Expansion| !e.beams_in(rows).is_empty();
        let full = |e: &Expansion| e.search.normalization() == Normalization::FullVocab;
        self.scores.begin(self.list.iter().filter(among).any(full));
        for expansion in self.list.iter().filter(among) {
            expansion.search.wanted(expansion.beams_in(rows), |token| self.scores.want(token));
        }
    }

    /// Goes on to the next wave. Says whether there is one.
    pub(super) fn next_wave(&mut self, cpu: &Cpu) -> bool {
        let goes_on = AtomicBool::new(false);
        cpu.each_part(write(&mut self.list, 1), |_, expansions| {
            let next = expansions.iter_mut().filter_map(|expansion| expansion.next_wave().then_some(true));
            next.for_each(|next| goes_on.store(next, Ordering::Relaxed));
        });
        goes_on.into_inner()
    }

    /// Takes every search one step further, or to where its part ends.
    pub(super) fn advance(&mut self, cpu: &Cpu) {
        cpu.each_part(write(&mut self.list, 1), |_, expansions| {
            expansions.iter_mut().for_each(Expansion::advance);
        });
    }
}
