//! What an executor asks of a family on a processor: rows in, results out.
//!
//! Place in the flow: the [`Executor`](super::Executor) walks a plan and pushes its rows here;
//! [`Backend::compute`] runs them in one pass. There are two, each over any family:
//! [`CpuBackend`](super::cpu::CpuBackend) and [`DeviceBackend`](super::cuda::DeviceBackend).
//!
//! Invariant: results come in the order in which what they belong to was pushed.
//!
//! What this must not know: slots, outcomes of a plan, micro-batches.

use std::fmt;
use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_kv_cache::{PageId, Transfer};

use crate::decode::SearchRequest;
use crate::families::hstu::retrieval::Scored;
use crate::rows::{CandidateRows, ContextPart};
use crate::step::{BranchStep, Plan, Progress, Pulse, StepError};
use crate::task::{Context, Found, Head, Retrieve};

/// What the last row of a context is for.
#[derive(Clone, Copy, Debug)]
pub enum Then<'a> {
    /// Keys and values are all that is wanted.
    Nothing,
    /// It is expanded into at most this many beams.
    Search(&'a SearchRequest, usize),
    /// It finds items.
    Retrieve(&'a Arc<Retrieve>),
}

/// The pages of a branch step.
#[derive(Clone, Copy, Debug)]
pub struct BranchPages<'a> {
    /// All pages of the context.
    pub context: &'a [PageId],
    /// Pages of the branch rows.
    pub branch: &'a [PageId],
}

impl<'a> BranchPages<'a> {
    /// The pages that a plan names.
    pub fn new(plan: &'a Plan, step: &BranchStep) -> Self {
        Self {
            context: &plan.pages[step.context_pages.clone()],
            branch: &plan.pages[step.branch_pages.clone()],
        }
    }
}

/// Why rows cannot be pushed.
#[derive(Debug)]
pub enum PushError {
    /// The request fails, and the others of the step do not.
    Request(String),
    /// The step fails.
    Step(StepError),
}

impl From<String> for PushError {
    fn from(why: String) -> Self {
        Self::Request(why)
    }
}

impl From<StepError> for PushError {
    fn from(error: StepError) -> Self {
        Self::Step(error)
    }
}

/// What became of something that was pushed.
#[derive(Debug)]
pub enum Done<S> {
    /// How far a search got; and itself, if it goes on.
    Search(Progress<Found>, Option<S>),
    /// The items that were found.
    Items(Result<Vec<Scored>, String>),
    /// Predictions of candidates.
    Predictions(Result<Vec<f32>, String>),
}

/// A family on a processor, with its pages.
pub trait Backend: fmt::Debug + Send {
    /// A search between two steps.
    type Search: fmt::Debug + Send;

    /// What the model makes of final states.
    fn head(&self) -> Head;

    /// Begins a step: moves pages, and forgets what a step that failed left behind.
    ///
    /// # Errors
    ///
    /// When a page cannot be moved.
    fn begin(&mut self, transfers: &[Transfer]) -> Result<(), StepError>;

    /// Adds rows of a context.
    ///
    /// # Errors
    ///
    /// When they cannot be computed.
    fn push_context(
        &mut self,
        context: &Context,
        part: ContextPart<'_>,
        then: Then<'_>,
    ) -> Result<(), PushError>;

    /// Adds the beams of a search, or the next part of them: branch step number `index` of the plan.
    ///
    /// # Errors
    ///
    /// When there is no search, it is over, or its pages are too few.
    fn push_beams(
        &mut self,
        context: &Context,
        search: Option<Self::Search>,
        index: usize,
        plan: &Plan,
    ) -> Result<(), PushError>;

    /// Adds candidates.
    ///
    /// # Errors
    ///
    /// When the model scores none.
    fn push_candidates(&mut self, context: &Context, rows: CandidateRows<'_>) -> Result<(), PushError>;

    /// Computes all that was pushed, and appends a result for each search, retrieval and run of candidates.
    ///
    /// # Errors
    ///
    /// When the pass as a whole failed.
    fn compute(
        &mut self,
        plan: &Plan,
        pulse: &Pulse,
        done: &mut Vec<Done<Self::Search>>,
    ) -> Result<(), StepError>;

    /// The threads that a whole step runs on: to wake them once is cheaper than once per operation.
    fn threads(&self) -> Option<Arc<Cpu>> {
        None
    }
}

/// Predictions made of these states. A network may hide that a state is not finite, so both are looked at.
///
/// # Errors
///
/// When there are none, or they are not finite.
pub(super) fn finite(states: &[f32], predictions: Option<Vec<f32>>) -> Result<Vec<f32>, String> {
    match predictions {
        None => Err("the model scores no candidates".into()),
        Some(predictions) if states.iter().chain(&predictions).any(|x| !x.is_finite()) => {
            Err("the model produced states that are not finite".into())
        }
        Some(predictions) => Ok(predictions),
    }
}
