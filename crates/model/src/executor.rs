//! Carries out plans: the [`StepModel`] of a decoder on the CPU.
//!
//! Place in the flow: the engine thread owns it. A step is one ragged forward pass over all context and branch rows of
//! the plan, the logits of the rows that are expanded, and one step of every search involved.
//!
//! A large first branch step goes in waves, the best beams first: a continuation never scores above its beam, so once
//! the best ones have filled the beam, those that are worse need not be computed ([`Search::worthwhile`]). After the
//! first branch step little can be left out: the scores lie closer together.
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not
//! finite fails alone.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::batch::{Batch, BranchRows, ContextRows};
use crate::cpu::Cpu;
use crate::cpu::isa::Isa;
use crate::cpu::linear::{Rows, Scores};
use crate::cpu::pages::{PAGE_SIZE, PageStore};
use crate::cpu::parallel::write;
use crate::decode::{Hypothesis, Normalization, NotFinite, Search, SearchRequest};
use crate::error::ModelError;
use crate::families::qwen::{Qwen, Workspace};
use crate::step::{BranchStep, Chunk, Plan, Progress, Slot, StepError, StepModel};

/// Values kept of a head product: bounds its memory. At least [`SCORED_ROWS`] rows are scored together all the same.
const SCORED_VALUES: usize = 4 << 20;
/// Fewest rows that are scored together.
const SCORED_ROWS: usize = 64;
/// Beams of the first branch steps in a step, per thread, from which on they go in waves: fewer are computed in little
/// more time than half of them.
const WAVES_FROM: usize = 256;
/// Fewest beams of a search in a wave, but for the last.
const SMALLEST_WAVE: usize = 8;

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
    search: Search,
    /// The entry of the plan, for a search that has branch rows.
    branch: Option<usize>,
    /// Beams of the wave at hand; those before were offered.
    beams: Range<usize>,
    /// First of their rows among the wanted rows of the batch, one row per beam.
    first_row: usize,
    failed: Option<NotFinite>,
}

impl Expansion {
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
                self.failed = Some(error);
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
        self.beams = offered..wave_end(offered, left);
        !self.beams.is_empty()
    }
}

/// Waves get smaller: half of what is left.
fn wave_end(start: usize, end: usize) -> usize {
    match end - start {
        few if few < 2 * SMALLEST_WAVE => end,
        left => start + left.div_ceil(2),
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

    /// Takes the searches that go a step further out of their slots, in the order of the plan.
    fn take_searches(&mut self, plan: &Plan) -> Result<(), StepError> {
        // What a step that failed or panicked left behind: its slots are closed.
        self.expansions.clear();
        for Chunk { slot, expand, .. } in &plan.chunks {
            let request = in_flight(&mut self.slots, *slot)?;
            if let (Some(width), Some(search)) = (*expand, &request.job.search) {
                let search = Search::new(search.clone(), width);
                let beams = 0..search.beams().len();
                self.expansions.push(Expansion {
                    slot: *slot,
                    search,
                    branch: None,
                    beams,
                    first_row: 0,
                    failed: None,
                });
            }
        }
        let (mut first_steps, first_branch) = (0, self.expansions.len());
        for (index, BranchStep { slot, .. }) in plan.branches.iter().enumerate() {
            let search = in_flight(&mut self.slots, *slot)?.search.take();
            let search = search.filter(|search| search.steps_done() > 0 && !search.is_over());
            let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", slot.0)))?;
            let beams = 0..search.beams().len();
            first_steps += if search.steps_done() == 1 { beams.len() } else { 0 };
            self.expansions.push(Expansion {
                slot: *slot,
                search,
                branch: Some(index),
                beams,
                first_row: 0,
                failed: None,
            });
        }
        if first_steps >= WAVES_FROM * self.cpu.threads() {
            let branches = self.expansions[first_branch..].iter_mut();
            for expansion in branches.filter(|expansion| expansion.search.steps_done() == 1) {
                expansion.beams.end = wave_end(0, expansion.beams.end);
            }
        }
        Ok(())
    }

    /// Lays out the rows of a plan: its chunks, for the first wave only, then the beams of this wave.
    fn fill_batch(&mut self, plan: &Plan, first_wave: bool) -> Result<(), StepError> {
        self.batch.clear();
        let chunks = if first_wave { &plan.chunks[..] } else { &[] };
        let mut expansions = self.expansions.iter_mut().peekable();
        for chunk in chunks {
            let request = in_flight(&mut self.slots, chunk.slot)?;
            let tokens = request.job.tokens.get(chunk.positions.clone()).ok_or_else(|| {
                StepError(format!(
                    "positions {:?} of a context of {}",
                    chunk.positions,
                    request.job.tokens.len()
                ))
            })?;
            if let Some(expansion) = expansions.next_if(|expansion| expansion.slot == chunk.slot) {
                expansion.first_row = self.batch.wanted.len();
            }
            self.batch.push_context(ContextRows {
                owner: chunk.slot.0,
                tokens,
                first_position: chunk.positions.start,
                cached: chunk.cached,
                pages: &plan.pages[chunk.context_pages.clone()],
                wanted: usize::from(chunk.expand.is_some()),
            });
        }
        for Expansion { slot, search, branch, beams, first_row, .. } in expansions {
            let Some(branch) = branch.map(|index| &plan.branches[index]) else { continue };
            *first_row = self.batch.wanted.len();
            if beams.start == beams.end {
                continue;
            }
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
            for index in beams.clone() {
                self.branch_tokens.push(search.beams()[index].token);
                let ancestors = search.lineage(index).iter().enumerate();
                self.branch_lineage.extend(ancestors.map(|(step, row)| (step * width) as u32 + row));
                self.branch_lineage.push((step * width + index) as u32);
            }
            self.batch.push_branches(BranchRows {
                owner: slot.0,
                tokens: &self.branch_tokens,
                context_len: in_flight(&mut self.slots, *slot)?.job.tokens.len(),
                ancestors: step + 1,
                lineage: &self.branch_lineage,
                context_pages: &plan.pages[branch.context_pages.clone()],
                branch_pages,
            });
        }
        self.batch.check_writes(self.pages.pages()).map_err(StepError)
    }

    /// Scores the wanted rows of the batch, a bounded number at a time, and offers them to their searches.
    fn offer(&mut self) {
        let rows = self.batch.wanted.len();
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
            self.cpu.each_part(write(&mut self.expansions, 1), |_, expansions| {
                expansions.iter_mut().for_each(|expansion| expansion.offer(isa, &range, scores));
            });
            start = range.end;
        }
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
        for transfer in &plan.transfers {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))?;
        }
        self.take_searches(plan)?;
        let mut first_wave = true;
        loop {
            self.fill_batch(plan, first_wave)?;
            self.model.forward(&self.cpu, &self.batch, &mut self.pages, &mut self.workspace, &mut |_, _| {});
            self.offer();
            first_wave = false;
            let goes_on = AtomicBool::new(false);
            self.cpu.each_part(write(&mut self.expansions, 1), |_, expansions| {
                let next =
                    expansions.iter_mut().filter_map(|expansion| expansion.next_wave().then_some(true));
                next.for_each(|next| goes_on.store(next, Ordering::Relaxed));
            });
            if !goes_on.into_inner() {
                break;
            }
        }
        // A filter that allows nothing leaves a search that is over before it begins.
        self.cpu.each_part(write(&mut self.expansions, 1), |_, expansions| {
            let going = expansions.iter_mut().filter(|expansion| !expansion.search.is_over());
            going.for_each(|expansion| expansion.search.advance());
        });

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
                    if let Ok(request) = in_flight(&mut self.slots, slot) {
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

fn in_flight(slots: &mut [Option<InFlight>], slot: Slot) -> Result<&mut InFlight, StepError> {
    let place = slots.get_mut(slot.0 as usize).and_then(Option::as_mut);
    place.ok_or_else(|| StepError(format!("slot {} is not open", slot.0)))
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
