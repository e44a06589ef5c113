//! Carries out plans: the [`StepModel`] of a decoder on the CPU.
//!
//! Place in the flow: the engine thread owns it. A step is one ragged forward pass over all context and branch rows of
//! the plan, the logits of the rows that are expanded, and one step of every search involved.
//!
//! ```text
//! mod         a decoder
//! hstu        an HSTU model: retrieval, ranking, or decoding
//! t5          an encoder-decoder
//! any         any of them, which is what a server holds
//! expansion   the searches of a step
//! parts       what a step of an HSTU model does for a request
//! slots       the requests in flight
//! ```
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not
//! finite fails alone.

pub mod any;
mod expansion;
pub mod hstu;
pub(crate) mod parts;
pub(crate) mod slots;
pub mod t5;

use std::sync::Arc;

use beamline_compute::batch::{Batch, BranchRows, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::PageStore;
use expansion::{Expansion, Expansions};
use slots::Slots;

use crate::decode::{Hypothesis, Search, SearchRequest};
use crate::error::ModelError;
use crate::families::qwen::{Qwen, Workspace, page_shape};
use crate::step::{Chunk, Plan, Progress, Pulse, Slot, StepError, StepModel};

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
    slots: Slots<InFlight>,
    batch: Batch,
    workspace: Workspace,
    expansions: Expansions,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
    pulse: Pulse,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<Search>,
}

impl Executor {
    /// Allocates `pages` pages for a model, with keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<Qwen>, cpu: Arc<Cpu>, format: KvFormat, pages: usize) -> Result<Self, ModelError> {
        let pages = PageStore::new(page_shape(model.config(), format), pages)?;
        Ok(Self {
            model,
            cpu,
            pages,
            slots: Slots::default(),
            batch: Batch::default(),
            workspace: Workspace::default(),
            expansions: Expansions::default(),
            branch_tokens: Vec::new(),
            branch_lineage: Vec::new(),
            pulse: Pulse::default(),
        })
    }

    /// Takes the searches that go a step further out of their slots, in the order of the plan.
    fn take_searches(&mut self, plan: &Plan) -> Result<(), StepError> {
        // What a step that failed or panicked left behind: its slots are closed.
        self.expansions.list.clear();
        for Chunk { slot, expand, .. } in &plan.chunks {
            let request = self.slots.get_mut(*slot)?;
            if let (Some(width), Some(search)) = (*expand, &request.job.search) {
                let search = Search::new(search.clone(), width);
                self.expansions.list.push(Expansion::first(*slot, search));
            }
        }
        for (index, branch) in plan.branches.iter().enumerate() {
            let search = self.slots.get_mut(branch.slot)?.search.take();
            self.expansions.list.push(Expansion::branch(search, index, branch)?);
        }
        self.expansions.cut_into_waves(&self.cpu);
        Ok(())
    }

    /// Lays out the rows of a plan: its chunks, for the first wave only, then the beams of this wave.
    fn fill_batch(&mut self, plan: &Plan, first_wave: bool) -> Result<(), StepError> {
        let chunks = if first_wave {
            self.batch.clear();
            &plan.chunks[..]
        } else {
            self.batch.clear_part();
            &[]
        };
        let mut expansions = self.expansions.list.iter_mut().peekable();
        for chunk in chunks {
            let request = self.slots.get_mut(chunk.slot)?;
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
        for expansion in expansions {
            let Some(branch) = expansion.branch.map(|index| &plan.branches[index]) else { continue };
            expansion.first_row = self.batch.wanted.len();
            if expansion.beams.start == expansion.beams.end {
                continue;
            }
            let branch_pages = &plan.pages[branch.branch_pages.clone()];
            let ancestors =
                expansion.lay_out(branch_pages, &mut self.branch_tokens, &mut self.branch_lineage)?;
            self.batch.push_branches(BranchRows {
                owner: expansion.slot.0,
                tokens: &self.branch_tokens,
                context_len: self.slots.get(expansion.slot)?.job.tokens.len(),
                ancestors,
                lineage: &self.branch_lineage,
                context_pages: &plan.pages[branch.context_pages.clone()],
                branch_pages,
            });
        }
        self.batch.check_writes(self.pages.pages()).map_err(StepError)
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
        let (cpu, model) = (Arc::clone(&self.cpu), Arc::clone(&self.model));
        let width = model.config().hidden_size;
        let mut first_wave = true;
        loop {
            self.fill_batch(plan, first_wave)?;
            let Self { batch, pages, workspace, pulse, .. } = self;
            model.forward(&cpu, batch, pages, workspace, &mut |_, _| pulse.beat());
            self.expansions.offer(&cpu, &self.workspace.hidden, width, |hidden, rows, scores| {
                model.score(&cpu, hidden, rows, scores);
                self.pulse.beat();
            });
            first_wave = false;
            if !self.expansions.next_wave(&cpu) {
                break;
            }
        }
        self.expansions.advance(&cpu);

        let mut expanded = self.expansions.list.drain(..).peekable();
        let slots = plan.chunks.iter().map(|chunk| (chunk.slot, chunk.expand.is_some()));
        for (slot, expands) in slots.chain(plan.branches.iter().map(|branch| (branch.slot, true))) {
            let progress = match expanded.next_if(|expansion| expansion.slot == slot) {
                None if expands => Progress::Failed("nothing to decode".into()),
                None => Progress::Prefilled,
                Some(expansion) => {
                    let (progress, search) = expansion.outcome();
                    if let Ok(request) = self.slots.get_mut(slot) {
                        request.search = search;
                    }
                    progress
                }
            };
            outcomes.push((slot, progress));
        }
        Ok(())
    }
}

impl StepModel for Executor {
    type Payload = Job;
    type Answer = Found;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, payload: Job) {
        self.slots.open(slot, InFlight { job: payload, search: None });
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Found>)>) -> Result<(), StepError> {
        let cpu = Arc::clone(&self.cpu);
        // The whole step runs inside the pool: waking it once is cheaper than once per operation.
        cpu.run_awake(|| self.run_plan(plan, outcomes))
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }
}
