//! Carries out plans: the [`StepModel`] of a decoder on the CPU.
//!
//! Place in the flow: the engine thread owns it. A step is one ragged forward pass over all context and branch rows of
//! the plan, the logits of the rows that are expanded, and one step of every search involved.
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not
//! finite fails alone.

use std::sync::Arc;

use rayon::prelude::*;

use crate::batch::{Batch, BranchRows, ContextRows};
use crate::cpu::Cpu;
use crate::cpu::pages::{PAGE_SIZE, PageStore};
use crate::cpu::vector::log_sum_exp;
use crate::decode::{Hypothesis, Normalization, NotFinite, Search, SearchRequest};
use crate::error::ModelError;
use crate::families::qwen::{Qwen, Workspace};
use crate::step::{Plan, Progress, Slot, StepError, StepModel};

/// Rows whose logits are computed together: bounds the memory of `[rows, vocab_size]`.
const LOGIT_ROWS: usize = 32;

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
    logits: Vec<f32>,
    normalizers: Vec<f64>,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<Search>,
}

impl Executor {
    /// Allocates `pages` pages for a model.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<Qwen>, cpu: Arc<Cpu>, pages: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let pages = PageStore::new(config.layers, config.kv_heads, config.head_dim, pages)?;
        Ok(Self {
            model,
            cpu,
            pages,
            slots: Vec::new(),
            batch: Batch::default(),
            workspace: Workspace::default(),
            logits: Vec::new(),
            normalizers: Vec::new(),
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

    /// Expands the beams of a request from its rows of `workspace.states`.
    fn expand(&mut self, slot: Slot, first_row: usize) -> Progress<Found> {
        let Some(search) = in_flight(&mut self.slots, slot).and_then(|request| request.search.as_mut())
        else {
            return Progress::Failed("nothing to decode".into());
        };
        let width = self.model.config().hidden_size;
        let beams = search.beams().len();
        let states = &self.workspace.states[first_row * width..][..beams * width];
        for (block, states) in states.chunks(LOGIT_ROWS * width).enumerate() {
            if let Err(error) = offer_rows(
                &self.model,
                &self.cpu,
                states,
                search,
                block * LOGIT_ROWS,
                &mut self.logits,
                &mut self.normalizers,
            ) {
                return Progress::Failed(error.to_string());
            }
        }
        search.advance();
        if search.is_over() {
            Progress::Finished(Found { hypotheses: search.hypotheses(), steps: search.steps_done() })
        } else {
            Progress::Expanded { rows: search.beams().len() }
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
        self.fill_batch(plan)?;
        self.model.forward(&self.cpu, &self.batch, &mut self.pages, &mut self.workspace, &mut |_, _| {});
        let mut row = 0;
        for chunk in &plan.chunks {
            let Some(width) = chunk.expand else {
                outcomes.push((chunk.slot, Progress::Prefilled));
                continue;
            };
            let progress = match in_flight(&mut self.slots, chunk.slot) {
                Some(InFlight { job: Job { search: Some(request), .. }, search }) => {
                    let begun = search.insert(Search::new(request.clone(), width));
                    if begun.is_over() {
                        Progress::Finished(Found { hypotheses: begun.hypotheses(), steps: 0 })
                    } else {
                        self.expand(chunk.slot, row)
                    }
                }
                _ => Progress::Failed("nothing to decode".into()),
            };
            outcomes.push((chunk.slot, progress));
            row += 1;
        }
        for branch in &plan.branches {
            let beams = in_flight(&mut self.slots, branch.slot)
                .and_then(|r| r.search.as_ref())
                .map_or(0, |s| s.beams().len());
            let progress = self.expand(branch.slot, row);
            outcomes.push((branch.slot, progress));
            row += beams;
        }
        Ok(())
    }
}

/// Computes the logits of some rows and offers them to the beams from `first_beam` on.
fn offer_rows(
    model: &Qwen,
    cpu: &Cpu,
    states: &[f32],
    search: &mut Search,
    first_beam: usize,
    logits: &mut Vec<f32>,
    normalizers: &mut Vec<f64>,
) -> Result<(), NotFinite> {
    model.logits(cpu, states, logits);
    let vocab = model.config().vocab_size;
    let full = search.normalization() == Normalization::FullVocab;
    normalizers.clear();
    normalizers.resize(logits.len() / vocab, 0.0);
    if full {
        let rows = logits.par_chunks(vocab).zip(normalizers.par_iter_mut());
        rows.for_each(|(row, normalizer)| log_sum_exp(cpu.isa(), row, normalizer));
    }
    for (index, (row, normalizer)) in logits.chunks(vocab).zip(normalizers.iter()).enumerate() {
        search.offer_normalized(first_beam + index, row, full.then_some(*normalizer))?;
    }
    Ok(())
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
        cpu.run(|| self.run_plan(plan, outcomes))
    }

    fn close(&mut self, slot: Slot) {
        if let Some(place) = self.slots.get_mut(slot.0 as usize) {
            *place = None;
        }
    }
}
