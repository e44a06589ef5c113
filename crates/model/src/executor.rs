//! Carries out plans: the [`StepModel`] of a decoder on the CPU.
//!
//! Place in the flow: the engine thread owns it. A step is one ragged forward pass over all context and branch rows of
//! the plan, the logits of the rows that are expanded, and one step of every search involved.
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not
//! finite fails alone.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::batch::{Batch, BranchRows, ContextRows};
use crate::cpu::Cpu;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{Rows, Scores};
use crate::cpu::pages::{PAGE_SIZE, PageStore};
use crate::decode::{Hypothesis, Normalization, NotFinite, Search, SearchRequest};
use crate::error::ModelError;
use crate::families::qwen::{Qwen, Workspace};
use crate::step::{BranchStep, Plan, Progress, Slot, StepError, StepModel};

/// Values kept of a head product: bounds its memory. At least [`SCORED_ROWS`] rows are scored together all the same.
const SCORED_VALUES: usize = 4 << 20;
/// Fewest rows that are scored together.
const SCORED_ROWS: usize = 64;

/// A request as the executor sees it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Tokens of the context, a forced SID prefix included.
    pub tokens: Arc<[u32]>,
    /// What to decode after it; nothing for a request that only warms the cache.
    pub search: Option<SearchRequest>,
}

/// What a finished request yields.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Finished paths, best first; fewer than the beam is wide when there are no more.
    pub hypotheses: Vec<Hypothesis>,
    /// Steps of the search.
    pub steps: usize,
}

/// A decoder, its pages, and the requests in flight.
#[derive(Debug)]
pub struct Executor {
    model: Arc<Qwen>,
    cpu: Arc<Cpu>,
    pages: PageStore,
    slots: Vec<Option<InFlight>>,
    batch: Batch,
    workspace: Workspace,
    scored_rows: Rows,
    scores: Scores,
    expansions: Vec<Expansion>,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<Search>,
}

/// A search that takes a step, taken out of its slot so that all of them can go on at once.
#[derive(Debug)]
struct Expansion {
    slot: Slot,
    /// First of its rows among the wanted rows of the batch, one row per beam.
    first_row: usize,
    search: Search,
    failed: Option<NotFinite>,
}

impl Expansion {
    fn end_row(&self) -> usize {
        self.first_row + self.search.beams().len()
    }

    /// Its beams whose rows lie in a range.
    fn beams_in(&self, rows: &Range<usize>) -> Range<usize> {
        let start = rows.start.max(self.first_row).min(self.end_row());
        let end = rows.end.min(self.end_row()).max(start);
        start - self.first_row..end - self.first_row
    }

    fn offer(&mut self, isa: Isa, rows: &Range<usize>, scores: &Scores) {
        let full = self.search.normalization() == Normalization::FullVocab;
        for beam in self.beams_in(rows) {
            let row = self.first_row + beam - rows.start;
            let normalizer = if full { scores.normalizer(isa, row) } else { None };
            let offered = self.search.offer_normalized(beam, |token| scores.logit(row, token), normalizer);
            if let Err(error) = offered {
                self.failed = Some(error);
                return;
            }
        }
    }
}

impl Executor {
    /// Allocates `pages` pages for a model.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<Qwen>, cpu: Arc<Cpu>, pages: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let pages = PageStore::new(config.layers, config.kv_heads, config.head_dim, config.head_dim, pages)?;
        Ok(Self {
            model,
            cpu,
            pages,
            slots: Vec::new(),
            batch: Batch::default(),
            workspace: Workspace::default(),
            scored_rows: Rows::default(),
            scores: Scores::default(),
            expansions: Vec::new(),
            branch_tokens: Vec::new(),
            branch_lineage: Vec::new(),
        })
    }

    /// Lays the rows of a plan out, chunks first.
    fn fill_batch(&mut self, plan: &Plan) -> Result<(), StepError> {
        self.batch.clear();
        let unknown = |slot: Slot| StepError(format!("slot {} is not open", slot.0));
        for chunk in &plan.chunks {
            let request = in_flight(&mut self.slots, chunk.slot).ok_or_else(|| unknown(chunk.slot))?;
            let tokens = request.job.tokens.get(chunk.positions.clone()).ok_or_else(|| {
                StepError(format!(
                    "positions {:?} of a context of {}",
                    chunk.positions,
                    request.job.tokens.len()
                ))
            })?;
            self.batch.push_context(ContextRows {
                owner: chunk.slot.0,
                tokens,
                first_position: chunk.positions.start,
                cached: chunk.cached,
                pages: &plan.pages[chunk.context_pages.clone()],
                wanted: usize::from(chunk.expand.is_some()),
            });
        }
        for branch in &plan.branches {
            let request = in_flight(&mut self.slots, branch.slot).ok_or_else(|| unknown(branch.slot))?;
            let search =
                request.search.as_ref().filter(|search| search.steps_done() > 0 && !search.is_over());
            let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", branch.slot.0)))?;
            let branch_pages = &plan.pages[branch.branch_pages.clone()];
            let (step, width) = (search.steps_done() - 1, search.width());
            if branch_pages.len() * PAGE_SIZE < step * width + search.beams().len() {
                return Err(StepError(format!(
                    "{} branch pages for step {step} of {width} beams",
                    branch_pages.len()
                )));
            }
            self.branch_tokens.clear();
            self.branch_lineage.clear();
            for (index, beam) in search.beams().iter().enumerate() {
                self.branch_tokens.push(beam.token);
                let ancestors = search.lineage(index).iter().enumerate();
                self.branch_lineage.extend(ancestors.map(|(step, row)| (step * width) as u32 + row));
                self.branch_lineage.push((step * width + index) as u32);
            }
            self.batch.push_branches(BranchRows {
                owner: branch.slot.0,
                tokens: &self.branch_tokens,
                context_len: request.job.tokens.len(),
                ancestors: step + 1,
                lineage: &self.branch_lineage,
                context_pages: &plan.pages[branch.context_pages.clone()],
                branch_pages,
            });
        }
        self.batch.check_writes(self.pages.pages()).map_err(StepError)
    }

    /// Scores the rows of all expansions, a bounded number at a time, and takes every search one step further.
    fn expand(&mut self, rows: usize) {
        let (isa, width) = (self.cpu.isa(), self.model.config().hidden_size);
        let full = |e: &Expansion| e.search.normalization() == Normalization::FullVocab;
        let mut start = 0;
        while start < rows {
            // What is wanted of the first rows says how many fit; more rows may want more, which then is a little over.
            let mut range = start..rows.min(start + SCORED_ROWS);
            self.want(&range, full);
            range.end = rows.min(start + (SCORED_VALUES / self.scores.width().max(1)).max(SCORED_ROWS));
            self.want(&range, full);
            let hidden = &self.workspace.hidden[range.start * width..range.end * width];
            self.model.score(&self.cpu, hidden, &mut self.scored_rows, &mut self.scores);
            let scores = &self.scores;
            self.expansions.par_iter_mut().for_each(|expansion| expansion.offer(isa, &range, scores));
            start = range.end;
        }
        // A filter that allows nothing leaves a search that is over before it begins.
        let going = self.expansions.par_iter_mut().filter(|expansion| !expansion.search.is_over());
        going.for_each(|expansion| expansion.search.advance());
    }

    /// Says which logits of a range of rows are wanted.
    fn want(&mut self, rows: &Range<usize>, full: impl Fn(&Expansion) -> bool) {
        let among = |e: &&Expansion| !e.beams_in(rows).is_empty();
        self.scores.begin(self.expansions.iter().filter(among).any(full));
        for expansion in self.expansions.iter().filter(among) {
            expansion.search.wanted(expansion.beams_in(rows), |token| self.scores.want(token));
        }
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Found>)>,
    ) -> Result<(), StepError> {
        // What a step that panicked left behind: its slots are closed.
        self.expansions.clear();
        for transfer in &plan.transfers {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))?;
        }
        self.fill_batch(plan)?;
        self.model.forward(&self.cpu, &self.batch, &mut self.pages, &mut self.workspace, &mut |_, _| {});
        let mut row = 0;
        let chunks = plan.chunks.iter().filter_map(|chunk| Some((chunk.slot, chunk.expand?)));
        for (slot, width) in chunks {
            if let Some(InFlight { job: Job { search: Some(request), .. }, .. }) =
                in_flight(&mut self.slots, slot)
            {
                let search = Search::new(request.clone(), width);
                self.expansions.push(Expansion { slot, first_row: row, search, failed: None });
            }
            row += 1;
        }
        for &BranchStep { slot, .. } in &plan.branches {
            if let Some(search) = in_flight(&mut self.slots, slot).and_then(|request| request.search.take()) {
                let beams = search.beams().len();
                self.expansions.push(Expansion { slot, first_row: row, search, failed: None });
                row += beams;
            }
        }
        self.expand(row);

        let mut expanded = self.expansions.drain(..).peekable();
        let slots = plan.chunks.iter().map(|chunk| (chunk.slot, chunk.expand.is_some()));
        for (slot, expands) in slots.chain(plan.branches.iter().map(|branch| (branch.slot, true))) {
            let progress = match expanded.next_if(|expansion| expansion.slot == slot) {
                None if expands => Progress::Failed("nothing to decode".into()),
                None => Progress::Prefilled,
                Some(Expansion { failed: Some(error), .. }) => Progress::Failed(error.to_string()),
                Some(Expansion { search, .. }) if search.is_over() => {
                    Progress::Finished(Found { hypotheses: search.hypotheses(), steps: search.steps_done() })
                }
                Some(Expansion { search, .. }) => {
                    let rows = search.beams().len();
                    if let Some(request) = in_flight(&mut self.slots, slot) {
                        request.search = Some(search);
                    }
                    Progress::Expanded { rows }
                }
            };
            outcomes.push((slot, progress));
        }
        Ok(())
    }
}

fn in_flight(slots: &mut [Option<InFlight>], slot: Slot) -> Option<&mut InFlight> {
    slots.get_mut(slot.0 as usize)?.as_mut()
}

impl StepModel for Executor {
    type Payload = Job;
    type Answer = Found;

    fn open(&mut self, slot: Slot, payload: Job) {
        let index = slot.0 as usize;
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        assert!(self.slots[index].is_none(), "slot {index} is opened once");
        self.slots[index] = Some(InFlight { job: payload, search: None });
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Found>)>) -> Result<(), StepError> {
        let cpu = Arc::clone(&self.cpu);
        // The whole step runs inside the pool: waking it once is cheaper than once per operation.
        cpu.run_awake(|| self.run_plan(plan, outcomes))
    }

    fn close(&mut self, slot: Slot) {
        if let Some(place) = self.slots.get_mut(slot.0 as usize) {
            *place = None;
        }
    }
}
