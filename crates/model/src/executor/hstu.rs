//! Carries out plans for an HSTU model: retrieval, ranking and decoding in the same steps.
//!
//! Place in the flow: as the decoder's executor; the scheduler sees no difference. What it calls beams are, for a
//! request that ranks, the candidates of one micro-batch (M-FALCON, Zhai et al. 2024, appendix H): its first expansion
//! computes nothing, and each branch step takes the next micro-batch.
//!
//! ```text
//! retrieve   context rows | the last state -> best items, all requests of a step in one pass over the items
//! rank       context rows | candidates | candidates ..      -> predictions
//! decode     context rows, the last state expanded | beams | beams ..
//! ```
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose states are not
//! finite fails alone.

use std::sync::Arc;

use beamline_catalog::{Catalog, Filter};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::{PAGE_SIZE, PageStore};

use super::Found;
use super::expansion::{Expansion, Expansions};
use super::parts::{MicroBatches, Part};
use super::slots::Slots;
use crate::decode::{Search, SearchRequest};
use crate::error::ModelError;
use crate::families::hstu::batch::HstuBatch;
use crate::families::hstu::inputs::Prepared;
use crate::families::hstu::retrieval::{Scored, TopItems, UserNotFinite};
use crate::families::hstu::stack::Workspace;
use crate::families::hstu::{Hstu, PushCandidates, PushContext, PushTokens, Task};
use crate::step::{BranchStep, Chunk, Plan, Progress, Pulse, Slot, StepError, StepModel};

/// A request as the executor sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HstuJob {
    /// What it brings.
    pub request: Arc<Prepared>,
    /// What it asks for.
    pub work: Work,
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub enum Work {
    /// Its context computed, and nothing more.
    Warm,
    /// The best items. One step, one beam.
    Retrieve(Retrieve),
    /// Predictions for its candidates, as many at a time as it has beams.
    Rank,
    /// Semantic IDs.
    Decode(Box<SearchRequest>),
}

/// Which items are wanted.
#[derive(Clone, Debug)]
pub struct Retrieve {
    /// How many.
    pub count: usize,
    /// The items: semantic IDs of one level, whose symbol is a row of the item table.
    pub catalog: Arc<Catalog>,
    /// Which of them may be found.
    pub filter: Filter,
}

impl Retrieve {
    /// Whether a row of the item table may be found.
    pub fn allows(&self, row: u32) -> bool {
        let trie = self.catalog.trie();
        trie.walk(&[row]).is_some_and(|node| self.filter.allows_any(trie.leaves(node)))
    }
}

/// What a finished request yields.
#[derive(Clone, Debug, PartialEq)]
pub enum HstuAnswer {
    /// The best items, best first.
    Items(Vec<Scored>),
    /// `[candidates, names]`, names as [`Ranking::names`](crate::families::hstu::ranking::Ranking::names).
    Predictions(Vec<f32>),
    /// Semantic IDs.
    Found(Found),
}

/// A model, its pages, and the requests in flight.
#[derive(Debug)]
pub struct HstuExecutor {
    model: Arc<Hstu>,
    cpu: Arc<Cpu>,
    pages: PageStore,
    slots: Slots<InFlight>,
    batch: HstuBatch,
    workspace: Workspace,
    expansions: Expansions,
    results: Vec<Part>,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
    users: Vec<f32>,
    pulse: Pulse,
}

#[derive(Debug)]
struct InFlight {
    job: HstuJob,
    search: Option<Search>,
    batches: MicroBatches,
}

type Retrieved = Result<Vec<Scored>, UserNotFinite>;

impl HstuExecutor {
    /// Allocates `pages` pages for a model, with keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<Hstu>, cpu: Arc<Cpu>, format: KvFormat, pages: usize) -> Result<Self, ModelError> {
        let pages = model.page_store(format, pages)?;
        Ok(Self {
            model,
            cpu,
            pages,
            slots: Slots::default(),
            batch: HstuBatch::default(),
            workspace: Workspace::default(),
            expansions: Expansions::default(),
            results: Vec::new(),
            branch_tokens: Vec::new(),
            branch_lineage: Vec::new(),
            users: Vec::new(),
            pulse: Pulse::default(),
        })
    }

    /// Lays out the context rows of a chunk.
    fn push_chunk(&mut self, plan: &Plan, chunk: &Chunk) -> Result<(), StepError> {
        let model = Arc::clone(&self.model);
        let request = self.slots.get_mut(chunk.slot)?;
        let row = self.batch.layout.wanted.len();
        let expands = chunk.expand.filter(|_| !matches!(request.job.work, Work::Rank));
        if chunk.positions.end > request.job.request.context_len() {
            return Err(StepError(format!(
                "positions {:?} of a context of {}",
                chunk.positions,
                request.job.request.context_len()
            )));
        }
        let rows = PushContext {
            owner: chunk.slot.0,
            positions: chunk.positions.clone(),
            cached: chunk.cached,
            pages: &plan.pages[chunk.context_pages.clone()],
            wanted: usize::from(expands.is_some()),
        };
        if let Err(error) = model.push_context(&self.cpu, &mut self.batch, &request.job.request, rows) {
            self.results.push(Part::Failed(error.to_string()));
            return Ok(());
        }
        let part = match (&request.job.work, chunk.expand) {
            (_, None) => Part::Context,
            (Work::Rank, Some(width)) => {
                request.batches.begin(width);
                Part::Prefilled
            }
            (Work::Retrieve(_), Some(_)) => Part::Retrieve { row },
            (Work::Decode(search), Some(width)) => {
                let mut expansion =
                    Expansion::first(chunk.slot, Search::new(SearchRequest::clone(search), width));
                expansion.first_row = row;
                self.expansions.list.push(expansion);
                Part::Decode
            }
            (Work::Warm, Some(_)) => Part::Failed("a request that warms the cache expands nothing".into()),
        };
        self.results.push(part);
        Ok(())
    }

    /// Lays out the branch rows of a request: its next candidates, or its beams.
    fn push_branch(&mut self, plan: &Plan, index: usize, branch: &BranchStep) -> Result<(), StepError> {
        let slot = branch.slot;
        let request = self.slots.get_mut(slot)?;
        let row = self.batch.layout.wanted.len();
        let (context_pages, branch_pages) =
            (&plan.pages[branch.context_pages.clone()], &plan.pages[branch.branch_pages.clone()]);
        if matches!(request.job.work, Work::Rank) {
            let candidates =
                request.batches.next(request.job.request.candidates(), branch.rows, branch_pages.len())?;
            let rows = PushCandidates {
                owner: slot.0,
                candidates: candidates.clone(),
                context_pages,
                branch_pages: &branch_pages[..candidates.len().div_ceil(PAGE_SIZE)],
            };
            self.model.push_candidates(&self.cpu, &mut self.batch, &request.job.request, rows);
            self.results.push(Part::Rank { row, candidates });
            return Ok(());
        }
        let mut expansion = Expansion::branch(request.search.take(), index, branch)?;
        expansion.first_row = row;
        let ancestors = expansion.lay_out(branch_pages, &mut self.branch_tokens, &mut self.branch_lineage)?;
        let rows = PushTokens {
            owner: slot.0,
            tokens: &self.branch_tokens,
            ancestors,
            lineage: &self.branch_lineage,
            context_pages,
            branch_pages,
        };
        match self.model.push_tokens(&mut self.batch, &request.job.request, rows) {
            Err(error) => self.results.push(Part::Failed(error.to_string())),
            Ok(()) => {
                self.expansions.list.push(expansion);
                self.results.push(Part::Decode);
            }
        }
        Ok(())
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<HstuAnswer>)>,
    ) -> Result<(), StepError> {
        // What a step that failed or panicked left behind: its slots are closed.
        self.batch.clear();
        self.expansions.list.clear();
        self.results.clear();
        for transfer in &plan.transfers {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))?;
        }
        for chunk in &plan.chunks {
            self.push_chunk(plan, chunk)?;
        }
        for (index, branch) in plan.branches.iter().enumerate() {
            self.push_branch(plan, index, branch)?;
        }
        self.batch.layout.check_writes(self.pages.pages()).map_err(StepError)?;
        let (cpu, model) = (Arc::clone(&self.cpu), Arc::clone(&self.model));
        let Self { batch, pages, workspace, pulse, .. } = self;
        model.forward(&cpu, batch, pages, workspace, &mut |_, _| pulse.beat());

        let width = model.config().stack.model_dim;
        if let Task::Tokens(head) = model.task() {
            self.expansions.offer(&cpu, &self.workspace.hidden, width, |states, rows, scores| {
                head.score(&cpu, states, rows, scores);
                self.pulse.beat();
            });
            self.expansions.advance(&cpu);
        }
        let mut retrieved = self.retrieve(plan, width)?.into_iter();
        let mut expanded = self.expansions.list.drain(..);
        let slots = plan.chunks.iter().map(|chunk| chunk.slot);
        let slots = slots.chain(plan.branches.iter().map(|branch| branch.slot));
        let mut results = std::mem::take(&mut self.results);
        for (slot, part) in slots.zip(results.drain(..)) {
            let request = self.slots.get_mut(slot)?;
            let progress = match part {
                Part::Context => Progress::Prefilled,
                Part::Failed(why) => Progress::Failed(why),
                Part::Prefilled => request.batches.prefilled(request.job.request.candidates()),
                Part::Retrieve { .. } => match retrieved.next() {
                    Some(Ok(items)) => Progress::Finished(HstuAnswer::Items(items)),
                    Some(Err(error)) => Progress::Failed(error.to_string()),
                    None => Progress::Failed("the model retrieves nothing".into()),
                },
                Part::Rank { row, candidates } => {
                    let states = &self.workspace.hidden[row * width..][..candidates.len() * width];
                    let (end, job) = (candidates.end, &request.job.request);
                    let predictions = model.predict(&cpu, states, job, candidates);
                    self.pulse.beat();
                    request.batches.take(states, predictions, end, job.candidates())
                }
                Part::Decode => match expanded.next() {
                    None => Progress::Failed("nothing to decode".into()),
                    Some(expansion) => {
                        let (progress, search) = expansion.outcome();
                        request.search = search;
                        progress.map(HstuAnswer::Found)
                    }
                },
            };
            outcomes.push((slot, progress));
        }
        self.results = results;
        Ok(())
    }

    /// Finds items for all requests of the step that want some, in one pass over the items.
    fn retrieve(&mut self, plan: &Plan, width: usize) -> Result<Vec<Retrieved>, StepError> {
        let (model, cpu) = (&self.model, &self.cpu);
        let Task::Retrieval(retrieval) = model.task() else { return Ok(Vec::new()) };
        self.users.clear();
        let mut asked = Vec::new();
        for (chunk, part) in plan.chunks.iter().zip(&self.results) {
            let Part::Retrieve { row } = part else { continue };
            let request = self.slots.get(chunk.slot)?;
            let Work::Retrieve(wanted) = &request.job.work else {
                return Err(StepError(format!("slot {} retrieves nothing", chunk.slot.0)));
            };
            self.users.extend_from_slice(&self.workspace.hidden[row * width..][..width]);
            asked.push((wanted.count, |item| wanted.allows(item)));
        }
        let asked: Vec<TopItems<'_>> =
            asked.iter().map(|(count, allowed)| TopItems { count: *count, allowed }).collect();
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        retrieval.users(cpu, &mut self.users);
        Ok(retrieval.items().top(cpu, &self.users, &asked))
    }
}

impl StepModel for HstuExecutor {
    type Payload = HstuJob;
    type Answer = HstuAnswer;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, payload: HstuJob) {
        self.slots.open(slot, InFlight { job: payload, search: None, batches: MicroBatches::default() });
    }

    fn step(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<HstuAnswer>)>,
    ) -> Result<(), StepError> {
        let cpu = Arc::clone(&self.cpu);
        cpu.run_awake(|| self.run_plan(plan, outcomes))
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }
}
