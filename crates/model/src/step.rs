//! What the scheduler asks of a model for one pass, and what comes back.
//!
//! A [`Plan`] is plain data: which rows of which requests go through the model together, and in
//! which pages their keys and values lie. The scheduler writes it, a [`StepModel`] carries it out,
//! and the outcomes go back to the scheduler. This is the whole boundary between the two, so the
//! scheduler can be run against a simulated model, and a model without a scheduler.
//!
//! What must not be here: clocks, queues, channels, tensors.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use beamline_kv_cache::{PageId, Transfer};

/// The place of an admitted request, from [`StepModel::open`] to [`StepModel::close`].
///
/// Slots are dense and small, so both sides index arrays with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Whether the rows of a context may be computed in several steps: a property of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContextShape {
    /// A row depends on the rows before it only, so a context may be cut anywhere.
    #[default]
    Causal,
    /// Some row depends on rows after it, so the whole context goes through the model in one step.
    /// No part of it serves another request; all of it may, see `ReuseClass::Exact`.
    Whole,
}

/// One pass through the model: context rows and branch rows of any mix of requests.
///
/// The vectors are reused from step to step; page tables are ranges of one arena so that a plan can
/// be cleared and refilled without allocating.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pages whose contents are moved, in this order, before any row is computed: out of pages that
    /// are written by this step or a later one, and into pages that are read. A step that fails may
    /// have carried them out or not.
    pub transfers: Vec<Transfer>,
    /// Context rows to compute, at most one chunk per request. A context of [`ContextShape::Whole`]
    /// is in one chunk.
    pub chunks: Vec<Chunk>,
    /// Requests whose beams take one more step, at most one entry per request and never together
    /// with a chunk of the same request.
    pub branches: Vec<BranchStep>,
    /// Arena of the page tables named by the ranges in chunks and branch steps.
    pub pages: Vec<PageId>,
}

/// Consecutive context rows of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Slot of the request.
    pub slot: Slot,
    /// Positions to compute, never empty.
    pub positions: Range<usize>,
    /// Positions below this one already lie in pages, perhaps shared ones: they are read, never
    /// written. It exceeds `positions.start` only when a whole context was cached and its last row
    /// is computed again because the first expansion needs it, or because the request only waits
    /// for pages that come back with this step.
    pub cached: usize,
    /// The request's context pages from position 0 on, enough for `positions.end`; a range of
    /// [`Plan::pages`].
    pub context_pages: Range<usize>,
    /// Set on the last chunk of a request that decodes: the last row is expanded into at most this
    /// many beams; those after it are expanded into no more either.
    pub expand: Option<usize>,
}

/// Beams of one request, each a row: all of them, or the next part of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchStep {
    /// Slot of the request.
    pub slot: Slot,
    /// How many of the rows that are left to compute, at least 1. A model that cannot cut beams
    /// computes all of them.
    pub rows: usize,
    /// All context pages of the request; a range of [`Plan::pages`].
    pub context_pages: Range<usize>,
    /// Pages that hold the branch rows of this request, for as long as the request lives; a range of
    /// [`Plan::pages`]. Rows of a step lie behind the most rows that earlier steps may have had by their
    /// widths. Never shared, never published.
    pub branch_pages: Range<usize>,
}

impl Plan {
    /// Makes the plan empty and keeps its memory.
    pub fn clear(&mut self) {
        self.transfers.clear();
        self.chunks.clear();
        self.branches.clear();
        self.pages.clear();
    }

    /// Whether there is nothing to do. Pages move only with a step that computes.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.branches.is_empty()
    }

    /// Context rows in the plan.
    pub fn context_rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.positions.len()).sum()
    }
}

/// What one step did for one request of the plan.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress<Answer> {
    /// Context rows were computed; the request has not finished unless it asked for nothing more.
    Prefilled,
    /// Only a part of the beams was computed. They are expanded when the others are computed too.
    Partly {
        /// Rows left, fewer than before.
        left: usize,
    },
    /// The beams were expanded by one step; this many rows are alive and want a branch step.
    Expanded {
        /// Number of beams alive.
        rows: usize,
    },
    /// The request is answered.
    Finished(Answer),
    /// This request failed; the others of the step did not.
    Failed(String),
}

impl<A> Progress<A> {
    /// The same with another answer.
    pub fn map<B>(self, answer: impl FnOnce(A) -> B) -> Progress<B> {
        match self {
            Self::Prefilled => Progress::Prefilled,
            Self::Partly { left } => Progress::Partly { left },
            Self::Expanded { rows } => Progress::Expanded { rows },
            Self::Finished(found) => Progress::Finished(answer(found)),
            Self::Failed(why) => Progress::Failed(why),
        }
    }
}

/// The whole step failed, and nothing is known of any request in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model failed: {0}")]
pub struct StepError(pub String);

/// Tells the watcher of the engine that a step makes progress. Beating costs next to nothing.
#[derive(Clone)]
pub struct Pulse(Arc<dyn Fn() + Send + Sync>);

impl Pulse {
    /// A pulse that calls `beat`, from whatever thread works.
    pub fn new(beat: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(beat))
    }

    /// A part of the step is done.
    pub fn beat(&self) {
        (self.0)();
    }
}

impl Default for Pulse {
    /// A pulse that nobody feels.
    fn default() -> Self {
        Self::new(|| {})
    }
}

impl fmt::Debug for Pulse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pulse")
    }
}

/// The one trait through which the scheduler knows a model.
pub trait StepModel {
    /// What a request carries that only the model understands.
    type Payload: Send + Sync + 'static;
    /// What a finished request yields.
    type Answer: Send + 'static;

    /// Takes the pulse to beat within steps, at least once per layer. A model that never beats
    /// counts as alive between its steps only, so a watcher takes a long step for a hang.
    fn set_pulse(&mut self, _pulse: Pulse) {}

    /// A request was admitted and owns `slot` until it is closed.
    fn open(&mut self, slot: Slot, payload: Self::Payload);

    /// Carries out a plan. Appends exactly one outcome per entry of the plan: chunks first, then
    /// branch steps, in the order of the plan.
    ///
    /// # Errors
    ///
    /// When the pass as a whole failed; the caller then closes every slot of the plan.
    fn step(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Self::Answer>)>,
    ) -> Result<(), StepError>;

    /// The request is over, answered or not. Closing may happen at any time between steps.
    fn close(&mut self, slot: Slot);
}
