//! Any kind of model behind one type, so that a server can hold and swap both.
//!
//! Invariant: a request of one kind given to a model of the other opens nothing, and the step that names its slot
//! fails; whoever makes requests knows the model.

use super::hstu::{HstuAnswer, HstuExecutor, HstuJob};
use super::{Found, Job};
use crate::cuda::hstu::executor::HstuDeviceExecutor;
use crate::families::tokens::TokenExecutor;
use crate::step::{Plan, Progress, Pulse, Slot, StepError, StepModel};

/// What a step did for the requests of one kind, before it is told; reused from step to step.
type Outcomes<A> = Vec<(Slot, Progress<A>)>;

/// A model with its pages.
#[derive(Debug)]
pub enum AnyExecutor {
    /// A model that reads and writes tokens, of any family, wherever it runs.
    Tokens(Box<dyn TokenExecutor>, Outcomes<Found>),
    /// An HSTU model.
    Hstu(Box<HstuExecutor>, Outcomes<HstuAnswer>),
    /// An HSTU model on a graphics processor.
    HstuDevice(Box<HstuDeviceExecutor>, Outcomes<HstuAnswer>),
}

impl From<Box<dyn TokenExecutor>> for AnyExecutor {
    fn from(executor: Box<dyn TokenExecutor>) -> Self {
        Self::Tokens(executor, Vec::new())
    }
}

impl From<HstuExecutor> for AnyExecutor {
    fn from(executor: HstuExecutor) -> Self {
        Self::Hstu(Box::new(executor), Vec::new())
    }
}

impl From<HstuDeviceExecutor> for AnyExecutor {
    fn from(executor: HstuDeviceExecutor) -> Self {
        Self::HstuDevice(Box::new(executor), Vec::new())
    }
}

/// A request for one of them.
#[derive(Clone, Debug)]
pub enum AnyJob {
    /// For a model that reads tokens.
    Tokens(Job),
    /// For an HSTU model.
    Hstu(HstuJob),
}

/// What one of them yields.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Semantic IDs: of a decoder, or of an HSTU model with a token head.
    Found(Found),
    /// Items or predictions.
    Hstu(HstuAnswer),
}

impl From<Found> for Answer {
    fn from(found: Found) -> Self {
        Self::Found(found)
    }
}

impl From<HstuAnswer> for Answer {
    fn from(answer: HstuAnswer) -> Self {
        match answer {
            HstuAnswer::Found(found) => Self::Found(found),
            other => Self::Hstu(other),
        }
    }
}

/// Carries out a plan, and tells what was done in the words of both kinds.
fn step<M: StepModel + ?Sized>(
    executor: &mut M,
    done: &mut Outcomes<M::Answer>,
    plan: &Plan,
    outcomes: &mut Vec<(Slot, Progress<Answer>)>,
) -> Result<(), StepError>
where
    Answer: From<M::Answer>,
{
    done.clear();
    executor.step(plan, done)?;
    outcomes.extend(done.drain(..).map(|(slot, done)| (slot, done.map(Answer::from))));
    Ok(())
}

impl StepModel for AnyExecutor {
    type Payload = AnyJob;
    type Answer = Answer;

    fn set_pulse(&mut self, pulse: Pulse) {
        match self {
            Self::Tokens(executor, _) => executor.set_pulse(pulse),
            Self::Hstu(executor, _) => executor.set_pulse(pulse),
            Self::HstuDevice(executor, _) => executor.set_pulse(pulse),
        }
    }

    fn open(&mut self, slot: Slot, payload: AnyJob) {
        match (self, payload) {
            (Self::Tokens(executor, _), AnyJob::Tokens(job)) => executor.open(slot, job),
            (Self::Hstu(executor, _), AnyJob::Hstu(job)) => executor.open(slot, job),
            (Self::HstuDevice(executor, _), AnyJob::Hstu(job)) => executor.open(slot, job),
            _ => {}
        }
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        match self {
            Self::Tokens(executor, done) => step(&mut **executor, done, plan, outcomes),
            Self::Hstu(executor, done) => step(&mut **executor, done, plan, outcomes),
            Self::HstuDevice(executor, done) => step(&mut **executor, done, plan, outcomes),
        }
    }

    fn close(&mut self, slot: Slot) {
        match self {
            Self::Tokens(executor, _) => executor.close(slot),
            Self::Hstu(executor, _) => executor.close(slot),
            Self::HstuDevice(executor, _) => executor.close(slot),
        }
    }
}
