//! A family on the CPU: contexts and beams in one batch, beams in waves, results from final states.
//!
//! Place in the flow: a [`Backend`] over any [`CpuFamily`].
//!
//! Invariant: a result does not depend on what shares the step, nor on the waves that beams go in.
//!
//! What this must not know: what a family computes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Rows, Scores};
use beamline_compute::cpu::pages::PageStore;
use beamline_kv_cache::Transfer;

use super::Executor;
use super::backend::{Backend, BranchPages, Done, PushError, Then, finite};
use super::expansion::{Expansion, Expansions};
use crate::decode::Search;
use crate::error::ModelError;
use crate::families::hstu::retrieval::{Scored, TopItems, UserNotFinite};
use crate::rows::{BeamRows, CandidateRows, ContextPart};
use crate::step::{Plan, Pulse, StepError};
use crate::task::{Context, Head, Retrieve};

/// What a family does on the CPU.
pub trait CpuFamily: fmt::Debug + Send + Sync + 'static {
    /// Rows of a step.
    type Batch: fmt::Debug + Default + Send;
    /// Activations of a step.
    type Workspace: fmt::Debug + Default + Send;

    /// Allocates `pages` pages for keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError>;

    /// What it makes of final states.
    fn head(&self) -> Head;

    /// Columns of a final state.
    fn width(&self) -> usize;

    /// Makes a batch empty for another step.
    fn clear(batch: &mut Self::Batch);

    /// Makes a batch empty for another wave of the same step: what was written before counts.
    fn clear_wave(batch: &mut Self::Batch);

    /// Rows whose final states are wanted so far.
    fn wanted(batch: &Self::Batch) -> usize;

    /// Adds rows of a context.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_context(
        &self,
        cpu: &Cpu,
        batch: &mut Self::Batch,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String>;

    /// Adds beams.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_beams(
        &self,
        batch: &mut Self::Batch,
        context: &Context,
        rows: BeamRows<'_>,
    ) -> Result<(), String>;

    /// Adds candidates.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_candidates(
        &self,
        _cpu: &Cpu,
        _batch: &mut Self::Batch,
        _context: &Context,
        _rows: CandidateRows<'_>,
    ) -> Result<(), String> {
        Err("the model scores no candidates".into())
    }

    /// Checks that no page is written by one request and touched by another.
    ///
    /// # Errors
    ///
    /// The page that is.
    fn check_writes(batch: &mut Self::Batch, pages: usize) -> Result<(), String>;

    /// Runs a batch whose writes were checked. `beat` is called at least once per layer.
    fn forward(
        &self,
        cpu: &Cpu,
        batch: &Self::Batch,
        pages: &mut PageStore,
        workspace: &mut Self::Workspace,
        beat: &mut dyn FnMut(),
    );

    /// Final states of the wanted rows of the batch that was run, `[wanted, width]`.
    fn states(workspace: &Self::Workspace) -> &[f32];

    /// Logits of some final states, of the tokens that `scores` wants. `rows` is scratch.
    fn score(&self, cpu: &Cpu, states: &[f32], rows: &mut Rows, scores: &mut Scores);

    /// The best items for final states `[asked, width]`, which it may overwrite. Empty for a model
    /// without items.
    fn retrieve(
        &self,
        _cpu: &Cpu,
        _users: &mut [f32],
        _asked: &[TopItems<'_>],
    ) -> Vec<Result<Vec<Scored>, UserNotFinite>> {
        Vec::new()
    }

    /// Predictions `[candidates, names]` from the final states of candidates. `None` for a model without
    /// them.
    fn predict(
        &self,
        _cpu: &Cpu,
        _states: &[f32],
        _context: &Context,
        _candidates: Range<usize>,
    ) -> Option<Vec<f32>> {
        None
    }
}

/// A result that is owed, in the order in which it was pushed.
#[derive(Debug)]
enum Owed {
    /// Of the next expansion.
    Search,
    /// Of this row among the wanted ones.
    Items { row: usize, wanted: Arc<Retrieve> },
    /// Of the rows from this one on.
    Predictions { row: usize, context: Context, candidates: Range<usize> },
}

/// A family, its pages, and the rows of a step.
#[derive(Debug)]
pub struct CpuBackend<F: CpuFamily> {
    model: Arc<F>,
    cpu: Arc<Cpu>,
    pages: PageStore,
    batch: F::Batch,
    workspace: F::Workspace,
    expansions: Expansions,
    /// What each expansion reads.
    contexts: Vec<Context>,
    owed: Vec<Owed>,
    branch_tokens: Vec<u32>,
    branch_lineage: Vec<u32>,
    users: Vec<f32>,
}

impl<F: CpuFamily> Executor<CpuBackend<F>> {
    /// Allocates `pages` pages for a model, with keys and values in a format.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn new(model: Arc<F>, cpu: Arc<Cpu>, format: KvFormat, pages: usize) -> Result<Self, ModelError> {
        let pages = model.page_store(format, pages)?;
        Ok(Self::over(CpuBackend {
            model,
            cpu,
            pages,
            batch: F::Batch::default(),
            workspace: F::Workspace::default(),
            expansions: Expansions::default(),
            contexts: Vec::new(),
            owed: Vec::new(),
            branch_tokens: Vec::new(),
            branch_lineage: Vec::new(),
            users: Vec::new(),
        }))
    }
}

impl<F: CpuFamily> CpuBackend<F> {
    /// Lays out the beams of the wave at hand.
    fn push_wave(&mut self, plan: &Plan) -> Result<(), StepError> {
        for (expansion, context) in self.expansions.list.iter_mut().zip(&self.contexts) {
            let Some(branch) = expansion.branch.map(|index| &plan.branches[index]) else { continue };
            expansion.first_row = F::wanted(&self.batch);
            if expansion.beams.is_empty() {
                continue;
            }
            let pages = BranchPages::new(plan, branch);
            let ancestors =
                expansion.lay_out(pages.branch, &mut self.branch_tokens, &mut self.branch_lineage)?;
            let rows = BeamRows {
                owner: branch.slot.0,
                tokens: &self.branch_tokens,
                ancestors,
                lineage: &self.branch_lineage,
                context_pages: pages.context,
                branch_pages: pages.branch,
            };
            if let Err(why) = self.model.push_beams(&mut self.batch, context, rows) {
                expansion.fail(why);
            }
        }
        F::check_writes(&mut self.batch, self.pages.pages()).map_err(StepError)
    }

    /// Finds items for all requests of the step that want some, in one pass over the items.
    fn retrieve(&mut self) -> Vec<Result<Vec<Scored>, UserNotFinite>> {
        let (states, width) = (F::states(&self.workspace), self.model.width());
        self.users.clear();
        let mut asked = Vec::new();
        for owed in &self.owed {
            if let Owed::Items { row, wanted } = owed {
                self.users.extend_from_slice(&states[row * width..][..width]);
                asked.push((wanted.count, |item| wanted.allows(item)));
            }
        }
        let asked: Vec<TopItems<'_>> =
            asked.iter().map(|(count, allowed)| TopItems { count: *count, allowed }).collect();
        match asked.is_empty() {
            true => Vec::new(),
            false => self.model.retrieve(&self.cpu, &mut self.users, &asked),
        }
    }

    /// Runs the beams of the step in waves. All other rows go with the first wave. `first` is called
    /// after that wave.
    fn run_waves(
        &mut self,
        plan: &Plan,
        pulse: &Pulse,
        mut first: impl FnMut(&mut Self),
    ) -> Result<(), StepError> {
        let (cpu, model) = (Arc::clone(&self.cpu), Arc::clone(&self.model));
        self.expansions.cut_into_waves(&cpu);
        let mut is_first = true;
        loop {
            self.push_wave(plan)?;
            let Self { batch, pages, workspace, .. } = self;
            model.forward(&cpu, batch, pages, workspace, &mut || pulse.beat());
            if std::mem::take(&mut is_first) {
                first(self);
            }
            if self.expansions.list.is_empty() {
                return Ok(());
            }
            self.expansions.offer(&cpu, F::states(&self.workspace), model.width(), |states, rows, scores| {
                model.score(&cpu, states, rows, scores);
                pulse.beat();
            });
            if !self.expansions.next_wave(&cpu) {
                break;
            }
            F::clear_wave(&mut self.batch);
        }
        self.expansions.advance(&cpu);
        Ok(())
    }
}

impl<F: CpuFamily> Backend for CpuBackend<F> {
    type Search = Search;

    fn head(&self) -> Head {
        self.model.head()
    }

    fn begin(&mut self, transfers: &[Transfer]) -> Result<(), StepError> {
        F::clear(&mut self.batch);
        self.expansions.list.clear();
        self.contexts.clear();
        self.owed.clear();
        transfers.iter().try_for_each(|transfer| {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))
        })
    }

    fn push_context(
        &mut self,
        context: &Context,
        part: ContextPart<'_>,
        then: Then<'_>,
    ) -> Result<(), PushError> {
        let row = F::wanted(&self.batch);
        self.model.push_context(&self.cpu, &mut self.batch, context, part)?;
        match then {
            Then::Nothing => {}
            Then::Retrieve(wanted) => self.owed.push(Owed::Items { row, wanted: Arc::clone(wanted) }),
            Then::Search(search, width) => {
                let mut expansion = Expansion::first(Search::new(search.clone(), width));
                expansion.first_row = row;
                self.expansions.list.push(expansion);
                self.contexts.push(context.clone());
                self.owed.push(Owed::Search);
            }
        }
        Ok(())
    }

    fn push_beams(
        &mut self,
        context: &Context,
        search: Option<Search>,
        index: usize,
        plan: &Plan,
    ) -> Result<(), PushError> {
        self.expansions.list.push(Expansion::branch(search, index, &plan.branches[index])?);
        self.contexts.push(context.clone());
        self.owed.push(Owed::Search);
        Ok(())
    }

    fn push_candidates(&mut self, context: &Context, rows: CandidateRows<'_>) -> Result<(), PushError> {
        let (row, candidates) = (F::wanted(&self.batch), rows.candidates.clone());
        self.model.push_candidates(&self.cpu, &mut self.batch, context, rows)?;
        self.owed.push(Owed::Predictions { row, context: context.clone(), candidates });
        Ok(())
    }

    fn compute(&mut self, plan: &Plan, pulse: &Pulse, done: &mut Vec<Done<Search>>) -> Result<(), StepError> {
        let (mut retrieved, mut predicted) = (Vec::new(), Vec::new());
        self.run_waves(plan, pulse, |this| {
            retrieved = this.retrieve();
            let (states, width) = (F::states(&this.workspace), this.model.width());
            for owed in &this.owed {
                let Owed::Predictions { row, context, candidates } = owed else { continue };
                let states = &states[row * width..][..candidates.len() * width];
                let predictions = this.model.predict(&this.cpu, states, context, candidates.clone());
                predicted.push(finite(states, predictions));
                pulse.beat();
            }
        })?;
        let (mut retrieved, mut predicted) = (retrieved.into_iter(), predicted.into_iter());
        let mut searches = self.expansions.list.drain(..).map(Expansion::outcome);
        let none = "the model has no result for it";
        done.extend(self.owed.drain(..).filter_map(|owed| match owed {
            Owed::Search => searches.next().map(|(progress, search)| Done::Search(progress, search)),
            Owed::Items { .. } => Some(Done::Items(match retrieved.next() {
                Some(items) => items.map_err(|error| error.to_string()),
                None => Err(none.into()),
            })),
            Owed::Predictions { .. } => {
                Some(Done::Predictions(predicted.next().unwrap_or_else(|| Err(none.into()))))
            }
        }));
        Ok(())
    }

    fn threads(&self) -> Option<Arc<Cpu>> {
        Some(Arc::clone(&self.cpu))
    }
}
