//! Either kind of model behind one type, so that a server can hold and swap both.
//!
//! Invariant: a request of one kind given to a model of the other opens nothing, and the step that names its slot
//! fails; whoever makes requests knows the model.

use super::hstu::{HstuAnswer, HstuExecutor, HstuJob};
use super::{Executor, Found, Job};
use crate::step::{Plan, Progress, Slot, StepError, StepModel};

/// A model with its pages.
#[derive(Debug)]
pub enum AnyExecutor {
    /// A decoder of semantic IDs.
    Decoder(Box<Executor>),
    /// An HSTU model.
    Hstu(Box<HstuExecutor>),
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
            (Self::Decoder(executor), AnyJob::Decoder(job)) => executor.open(slot, job),
            (Self::Hstu(executor), AnyJob::Hstu(job)) => executor.open(slot, job),
            _ => {}
        }
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Answer>)>) -> Result<(), StepError> {
        match self {
            Self::Decoder(executor) => {
                let mut of_decoder = Vec::with_capacity(plan.chunks.len() + plan.branches.len());
                executor.step(plan, &mut of_decoder)?;
                outcomes.extend(of_decoder.into_iter().map(|(slot, done)| (slot, done.map(Answer::Found))));
            }
            Self::Hstu(executor) => {
                let mut of_hstu = Vec::with_capacity(plan.chunks.len() + plan.branches.len());
                executor.step(plan, &mut of_hstu)?;
                let answer = |answer| match answer {
                    HstuAnswer::Found(found) => Answer::Found(found),
                    other => Answer::Hstu(other),
                };
                outcomes.extend(of_hstu.into_iter().map(|(slot, done)| (slot, done.map(answer))));
            }
        }
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        match self {
            Self::Decoder(executor) => executor.close(slot),
            Self::Hstu(executor) => executor.close(slot),
        }
    }
}
