//! Either kind of model behind one type, so that a server can hold and swap both.
//!
//! Invariant: a request of one kind given to a model of the other opens nothing, and the step that names its slot
//! fails; whoever makes requests knows the model.

use super::hstu::{HstuAnswer, HstuExecutor, HstuJob};
use super::{Executor, Found, Job};
use crate::cuda::executor::DeviceExecutor;
use crate::cuda::hstu::executor::HstuDeviceExecutor;
use crate::step::{Plan, Progress, Pulse, Slot, StepError, StepModel};

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
    /// An HSTU model on a graphics processor.
    HstuDevice(Box<HstuDeviceExecutor>, Outcomes<HstuAnswer>),
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

impl From<HstuDeviceExecutor> for AnyExecutor {
    fn from(executor: HstuDeviceExecutor) -> Self {
        Self::HstuDevice(Box::new(executor), Vec::new())
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
fn step<M: StepModel>(
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
            Self::Decoder(executor, _) => executor.set_pulse(pulse),
            Self::Hstu(executor, _) => executor.set_pulse(pulse),
            Self::Device(executor, _) => executor.set_pulse(pulse),
            Self::HstuDevice(executor, _) => executor.set_pulse(pulse),
        }
    }

    fn open(&mut self, slot: Slot, payload: AnyJob) {
        match (self, payload) {
            (Self::Decoder(executor, _), AnyJob::Decoder(job)) => executor.open(slot, job),
            (Self::Hstu(executor, _), AnyJob::Hstu(job)) => executor.open(slot, job),
            (Self::Device(executor, _), AnyJob::Decoder(job)) => executor.open(slot, job),
            (Self::HstuDevice(executor, _), AnyJob::Hstu(job)) => executor.open(slot, job),
            _ => {}
        }
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        match self {
            Self::Decoder(executor, done) => step(&mut **executor, done, plan, outcomes),
            Self::Device(executor, done) => step(&mut **executor, done, plan, outcomes),
            Self::Hstu(executor, done) => step(&mut **executor, done, plan, outcomes),
            Self::HstuDevice(executor, done) => step(&mut **executor, done, plan, outcomes),
        }
    }

    fn close(&mut self, slot: Slot) {
        match self {
            Self::Decoder(executor, _) => executor.close(slot),
            Self::Hstu(executor, _) => executor.close(slot),
            Self::Device(executor, _) => executor.close(slot),
            Self::HstuDevice(executor, _) => executor.close(slot),
        }
    }
}
