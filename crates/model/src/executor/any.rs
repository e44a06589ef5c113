//! Either kind of model behind one type, so that a server can hold and swap both.
//!
//! Invariant: a request of one kind given to a model of the other opens nothing, and the step that names its slot
//! fails; whoever makes requests knows the model.

use super::hstu::{HstuAnswer, HstuExecutor, HstuJob};
use super::{Executor, Found, Job};
use crate::cuda::executor::DeviceExecutor;
use crate::step::{Plan, Progress, Slot, StepError, StepModel};

/// What a step did for the requests of one kind, before it is told; reused from step to step.
type Outcomes<A> = Vec<(Slot, Progress<A>)>;

/// A model with its pages.
#[derive(Debug)]
pub enum AnyExecutor {
    /// A decoder of semantic IDs.
    Decoder(Box<Executor>, Outcomes<Found>),
    /// An HSTU model.
    Hstu(Box<HstuExecutor>, Outcomes<HstuAnswer>),
    /// A decoder of semantic IDs on a graphics processor.
    Device(Box<DeviceExecutor>, Outcomes<Found>),
}

impl From<Executor> for AnyExecutor {
    fn from(executor: Executor) -> Self {
        Self::Decoder(Box::new(executor), Vec::new())
    }
}

impl From<HstuExecutor> for AnyExecutor {
    fn from(executor: HstuExecutor) -> Self {
        Self::Hstu(Box::new(executor), Vec::new())
    }
}

impl From<DeviceExecutor> for AnyExecutor {
    fn from(executor: DeviceExecutor) -> Self {
        Self::Device(Box::new(executor), Vec::new())
    }
}

/// A request for one of them.
#[derive(Clone, Debug)]
pub enum AnyJob {
    /// For a decoder.
    Decoder(Job),
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

impl StepModel for AnyExecutor {
    type Payload = AnyJob;
    type Answer = Answer;

    fn open(&mut self, slot: Slot, payload: AnyJob) {
        match (self, payload) {
            (Self::Decoder(executor, _), AnyJob::Decoder(job)) => executor.open(slot, job),
            (Self::Hstu(executor, _), AnyJob::Hstu(job)) => executor.open(slot, job),
            (Self::Device(executor, _), AnyJob::Decoder(job)) => executor.open(slot, job),
            _ => {}
        }
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        match self {
            Self::Decoder(executor, done) => {
                done.clear();
                executor.step(plan, done)?;
                outcomes.extend(done.drain(..).map(|(slot, done)| (slot, done.map(Answer::Found))));
            }
            Self::Device(executor, done) => {
                done.clear();
                executor.step(plan, done)?;
                outcomes.extend(done.drain(..).map(|(slot, done)| (slot, done.map(Answer::Found))));
            }
            Self::Hstu(executor, done) => {
                done.clear();
                executor.step(plan, done)?;
                let answer = |answer| match answer {
                    HstuAnswer::Found(found) => Answer::Found(found),
                    other => Answer::Hstu(other),
                };
                outcomes.extend(done.drain(..).map(|(slot, done)| (slot, done.map(answer))));
            }
        }
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        match self {
            Self::Decoder(executor, _) => executor.close(slot),
            Self::Hstu(executor, _) => executor.close(slot),
            Self::Device(executor, _) => executor.close(slot),
        }
    }
}
