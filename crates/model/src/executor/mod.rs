//! Carries out plans: one [`StepModel`] for every family, on every processor.
//!
//! Place in the flow: the engine thread owns it. A step is one ragged pass over all context and branch
//! rows of the plan. Their final states become logits for the searches, items, or predictions.
//!
//! ```text
//! mod            Executor: requests in flight, rows of a plan, outcomes
//! backend        what it asks of a family on a processor
//! cpu            a family on the CPU, with the waves of beams
//! cuda           a family on a graphics processor, with pages that move beside the computing
//! expansion      the searches of a step on the CPU
//! micro_batches  candidates that are scored some at a time
//! slots          the requests in flight
//! ```
//!
//! Invariant: the result of one request in a step is independent of the others in it. A request fails
//! alone when its results are not finite, or when the model cannot do its task.

pub mod backend;
pub mod cpu;
pub mod cuda;
mod expansion;
mod micro_batches;
mod slots;

use std::fmt;

use beamline_compute::cpu::pages::PAGE_SIZE;

use self::backend::{Backend, BranchPages, Done, PushError, Then};
use self::micro_batches::MicroBatches;
use self::slots::Slots;
use crate::rows::{CandidateRows, ContextPart};
use crate::step::{BranchStep, Chunk, Plan, Progress, Pulse, Slot, StepError, StepModel};
use crate::task::{Answer, Job, Task};

/// A model with its pages, ready to carry out plans.
pub trait ModelExecutor: StepModel<Payload = Job, Answer = Answer> + fmt::Debug + Send {}

impl<M: StepModel<Payload = Job, Answer = Answer> + fmt::Debug + Send> ModelExecutor for M {}

/// A model, its pages, and the requests in flight.
#[derive(Debug)]
pub struct Executor<B: Backend> {
    backend: B,
    slots: Slots<InFlight<B::Search>>,
    /// What the step does, in the order of the plan.
    parts: Vec<Part>,
    done: Vec<Done<B::Search>>,
    pulse: Pulse,
}

/// A request between two steps.
#[derive(Debug)]
struct InFlight<S> {
    job: Job,
    search: Option<S>,
    batches: MicroBatches,
}

/// What the step does for one entry of the plan.
#[derive(Debug)]
enum Part {
    /// Nothing more than its context rows.
    Context,
    /// The first micro-batch comes next.
    Prefilled,
    /// The backend has a result.
    Pushed,
    /// The backend has predictions of candidates that end here.
    Candidates { end: usize },
    /// It cannot be computed.
    Failed(String),
}

impl<B: Backend> Executor<B> {
    /// An executor of no requests yet.
    pub(crate) fn over(backend: B) -> Self {
        let (slots, pulse) = (Slots::default(), Pulse::default());
        Self { backend, slots, parts: Vec::new(), done: Vec::new(), pulse }
    }

    /// The backend, to be prepared.
    pub(crate) fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// Pushes the context rows of a chunk.
    fn push_chunk(&mut self, plan: &Plan, chunk: &Chunk) -> Result<Part, PushError> {
        let request = self.slots.get_mut(chunk.slot)?;
        let Job { context, task } = &request.job;
        self.backend.head().check(task)?;
        if chunk.positions.end > context.len() {
            let why = format!("positions {:?} of a context of {}", chunk.positions, context.len());
            return Err(StepError(why).into());
        }
        let (then, part) = match (task, chunk.expand) {
            (_, None) => (Then::Nothing, Part::Context),
            (Task::Warm, Some(_)) => {
                return Err("a request that warms the cache expands nothing".to_owned().into());
            }
            (Task::Score, Some(width)) => {
                request.batches.begin(width);
                (Then::Nothing, Part::Prefilled)
            }
            (Task::Retrieve(wanted), Some(_)) => (Then::Retrieve(wanted), Part::Pushed),
            (Task::Search(search), Some(width)) => (Then::Search(search, width), Part::Pushed),
        };
        let rows = ContextPart {
            owner: chunk.slot.0,
            positions: chunk.positions.clone(),
            cached: chunk.cached,
            pages: &plan.pages[chunk.context_pages.clone()],
            wanted: usize::from(!matches!(then, Then::Nothing)),
        };
        self.backend.push_context(context, rows, then)?;
        Ok(part)
    }

    /// Pushes the branch rows of a request: its next candidates, or its beams.
    fn push_branch(&mut self, plan: &Plan, index: usize, branch: &BranchStep) -> Result<Part, PushError> {
        let request = self.slots.get_mut(branch.slot)?;
        let context = &request.job.context;
        if !matches!(request.job.task, Task::Score) {
            self.backend.push_beams(context, request.search.take(), index, plan)?;
            return Ok(Part::Pushed);
        }
        let pages = BranchPages::new(plan, branch);
        let candidates = request.batches.next(context.candidates(), branch.rows, pages.branch.len())?;
        let end = candidates.end;
        let branch_pages = &pages.branch[..candidates.len().div_ceil(PAGE_SIZE)];
        let (owner, context_pages) = (branch.slot.0, pages.context);
        self.backend
            .push_candidates(context, CandidateRows { owner, candidates, context_pages, branch_pages })?;
        Ok(Part::Candidates { end })
    }

    fn push(&mut self, part: Result<Part, PushError>) -> Result<(), StepError> {
        self.parts.push(match part {
            Ok(part) => part,
            Err(PushError::Request(why)) => Part::Failed(why),
            Err(PushError::Step(error)) => return Err(error),
        });
        Ok(())
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Answer>)>,
    ) -> Result<(), StepError> {
        self.parts.clear();
        self.done.clear();
        self.backend.begin(&plan.transfers)?;
        for chunk in &plan.chunks {
            let part = self.push_chunk(plan, chunk);
            self.push(part)?;
        }
        for (index, branch) in plan.branches.iter().enumerate() {
            let part = self.push_branch(plan, index, branch);
            self.push(part)?;
        }
        self.backend.compute(plan, &self.pulse, &mut self.done)?;
        let slots = plan.chunks.iter().map(|chunk| chunk.slot);
        let slots = slots.chain(plan.branches.iter().map(|branch| branch.slot));
        let mut done = self.done.drain(..);
        for (slot, part) in slots.zip(self.parts.drain(..)) {
            let request = self.slots.get_mut(slot)?;
            outcomes.push((slot, request.outcome(part, &mut done)));
        }
        Ok(())
    }
}

impl<S> InFlight<S> {
    /// What the step did for the request. Results of parts that have one come in the order of the parts.
    fn outcome(&mut self, part: Part, done: &mut impl Iterator<Item = Done<S>>) -> Progress<Answer> {
        let end = match part {
            Part::Context => return Progress::Prefilled,
            Part::Prefilled => return self.batches.prefilled(self.job.context.candidates()),
            Part::Failed(why) => return Progress::Failed(why),
            Part::Pushed => 0,
            Part::Candidates { end } => end,
        };
        match done.next() {
            Some(Done::Search(progress, search)) => {
                self.search = search;
                progress.map(Answer::Found)
            }
            Some(Done::Items(Ok(items))) => Progress::Finished(Answer::Items(items)),
            Some(Done::Predictions(Ok(predictions))) => {
                self.batches.take(predictions, end, self.job.context.candidates())
            }
            Some(Done::Items(Err(why)) | Done::Predictions(Err(why))) => Progress::Failed(why),
            None => Progress::Failed("the step has no result for it".into()),
        }
    }
}

impl<B: Backend> StepModel for Executor<B> {
    type Payload = Job;
    type Answer = Answer;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, job: Job) {
        self.slots.open(slot, InFlight { job, search: None, batches: MicroBatches::default() });
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        match self.backend.threads() {
            Some(cpu) => cpu.run_awake(|| self.run_plan(plan, outcomes)),
            None => self.run_plan(plan, outcomes),
        }
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }
}

impl StepModel for Box<dyn ModelExecutor> {
    type Payload = Job;
    type Answer = Answer;

    fn set_pulse(&mut self, pulse: Pulse) {
        (**self).set_pulse(pulse);
    }

    fn open(&mut self, slot: Slot, job: Job) {
        (**self).open(slot, job);
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        (**self).step(plan, outcomes)
    }

    fn close(&mut self, slot: Slot) {
        (**self).close(slot);
    }
}
