//! Carries out plans for a T5: the [`StepModel`] of an encoder-decoder on the CPU.
//!
//! Place in the flow: as the decoder's executor; the scheduler sees no difference. The tokens of a context are those of the encoder
//! and one more, the row that the decoder starts with; the context comes whole, in one chunk:
//!
//! ```text
//! positions 0..n + 1, nothing cached     the encoder, keys and values of cross-attention, the start row
//! positions n..n + 1, all of it cached   the start row alone, which writes nothing
//! branch steps                           beams, over the pages of both
//! ```
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not finite, or
//! whose context is not whole, fails alone.

use std::sync::Arc;

use beamline_compute::batch::BranchRows;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::PageStore;

use super::expansion::{Expansion, Expansions};
use super::slots::Slots;
use super::{Found, Job};
use crate::decode::Search;
use crate::error::ModelError;
use crate::families::t5::batch::{T5Batch, WholeContext};
use crate::families::t5::config::T5Config;
use crate::families::t5::{T5, Workspace};
use crate::step::{BranchStep, Chunk, Plan, Progress, Pulse, Slot, StepError, StepModel};

/// A model, its pages, and the requests in flight.
#[derive(Debug)]
pub struct T5Executor {
    model: Arc<T5>,
    cpu: Arc<Cpu>,
    pages: PageStore,
    slots: Slots<InFlight>,
    batch: T5Batch,
    workspace: Workspace,
    expansions: Expansions,
    parts: Vec<Part>,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
    pulse: Pulse,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<Search>,
}

/// What the step does for one entry of the plan.
#[derive(Debug)]
enum Part {
    /// Nothing more than its context.
    Context,
    /// The next of the searches.
    Decode,
    /// It cannot be computed.
    Failed(String),
}

impl T5Executor {
    /// Allocates `pages` pages for a model, with keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<T5>, cpu: Arc<Cpu>, format: KvFormat, pages: usize) -> Result<Self, ModelError> {
        let pages = model.page_store(format, pages)?;
        Ok(Self {
            model,
            cpu,
            pages,
            slots: Slots::default(),
            batch: T5Batch::default(),
            workspace: Workspace::default(),
            expansions: Expansions::default(),
            parts: Vec::new(),
            branch_tokens: Vec::new(),
            branch_lineage: Vec::new(),
            pulse: Pulse::default(),
        })
    }

    /// Lays out a context.
    fn push_chunk(&mut self, plan: &Plan, chunk: &Chunk) -> Result<(), StepError> {
        let row = self.batch.rows();
        let request = self.slots.get_mut(chunk.slot)?;
        let tokens = &request.job.tokens;
        let part = match (is_cached(chunk, tokens, self.model.config()), chunk.expand) {
            (Err(why), _) => Part::Failed(why),
            (Ok(_), Some(_)) if request.job.search.is_none() => Part::Failed("nothing to decode".into()),
            (Ok(cached), expand) => {
                let (owner, pages) = (chunk.slot.0, &plan.pages[chunk.context_pages.clone()]);
                let context = WholeContext { owner, tokens, cached, pages };
                self.batch.push_context(context).map_err(StepError)?;
                match (expand, &request.job.search) {
                    (Some(width), Some(search)) => {
                        let search = Search::new(search.clone(), width);
                        let mut expansion = Expansion::first(chunk.slot, search);
                        expansion.first_row = row;
                        self.expansions.list.push(expansion);
                        Part::Decode
                    }
                    _ => Part::Context,
                }
            }
        };
        self.parts.push(part);
        Ok(())
    }

    /// Lays out the beams of a request, or the next part of them.
    fn push_branch(&mut self, plan: &Plan, index: usize, branch: &BranchStep) -> Result<(), StepError> {
        let slot = branch.slot;
        let request = self.slots.get_mut(slot)?;
        let branch_pages = &plan.pages[branch.branch_pages.clone()];
        let mut expansion = Expansion::branch(request.search.take(), index, branch)?;
        expansion.first_row = self.batch.rows();
        let ancestors = expansion.lay_out(branch_pages, &mut self.branch_tokens, &mut self.branch_lineage)?;
        let beams = BranchRows {
            owner: slot.0,
            tokens: &self.branch_tokens,
            context_len: request.job.tokens.len(),
            ancestors,
            lineage: &self.branch_lineage,
            context_pages: &plan.pages[branch.context_pages.clone()],
            branch_pages,
        };
        self.batch.push_beams(beams).map_err(StepError)?;
        self.expansions.list.push(expansion);
        self.parts.push(Part::Decode);
        Ok(())
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Found>)>,
    ) -> Result<(), StepError> {
        // What a step that failed or panicked left behind: its slots are closed.
        self.batch.clear();
        self.expansions.list.clear();
        self.parts.clear();
        for transfer in &plan.transfers {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))?;
        }
        for chunk in &plan.chunks {
            self.push_chunk(plan, chunk)?;
        }
        for (index, branch) in plan.branches.iter().enumerate() {
            self.push_branch(plan, index, branch)?;
        }
        self.batch.check_writes(self.pages.pages()).map_err(StepError)?;
        let (cpu, model) = (Arc::clone(&self.cpu), Arc::clone(&self.model));
        let Self { batch, pages, workspace, pulse, .. } = self;
        model.forward(&cpu, batch, pages, workspace, &mut || pulse.beat());
        let width = model.config().d_model;
        self.expansions.offer(&cpu, self.workspace.hidden(), width, |hidden, rows, scores| {
            model.score(&cpu, hidden, rows, scores);
            self.pulse.beat();
        });
        self.expansions.advance(&cpu);
        self.tell(plan, outcomes)
    }

    /// Tells what was done for each entry of the plan.
    fn tell(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Found>)>) -> Result<(), StepError> {
        let mut expanded = self.expansions.list.drain(..);
        let slots = plan.chunks.iter().map(|chunk| chunk.slot);
        let slots = slots.chain(plan.branches.iter().map(|branch| branch.slot));
        for (slot, part) in slots.zip(self.parts.drain(..)) {
            let progress = match part {
                Part::Context => Progress::Prefilled,
                Part::Failed(why) => Progress::Failed(why),
                Part::Decode => match expanded.next() {
                    None => Progress::Failed("nothing to decode".into()),
                    Some(expansion) => {
                        let (progress, search) = expansion.outcome();
                        self.slots.get_mut(slot)?.search = search;
                        progress
                    }
                },
            };
            outcomes.push((slot, progress));
        }
        Ok(())
    }
}

/// Whether the whole context of a chunk lies in pages already.
///
/// # Errors
///
/// When the chunk is a part of a context only, the context is too long, or a token is not in the vocabulary.
fn is_cached(chunk: &Chunk, tokens: &[u32], config: &T5Config) -> Result<bool, String> {
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
        return Err(format!("token {token} is not in the vocabulary of {}", config.vocab_size));
    }
    let (positions, len, most) = (&chunk.positions, tokens.len(), config.max_positions());
    if len > most {
        return Err(format!("a context of {len} positions, at most {most} are supported"));
    }
    if len < 2 {
        return Err("a context needs a token for the encoder and one that the decoder starts with".into());
    }
    match chunk.cached {
        0 if *positions == (0..len) => Ok(false),
        cached if cached == len && *positions == (len - 1..len) => Ok(true),
        cached => Err(format!(
            "positions {positions:?} with {cached} of {len} cached: an encoder takes its context whole, or all of it was cached"
        )),
    }
}

impl StepModel for T5Executor {
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
