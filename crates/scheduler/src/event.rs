//! The scheduler's output to its driver: slots opened and closed, requests ended.
//!
//! Events come in one list, in the order in which they must be carried out: a slot is closed before
//! it is opened again.

use std::sync::Arc;

use beamline_model::step::Slot;

use crate::{
    request::{Refusal, RequestId},
    time::Micros,
};

/// One action that the driver must carry out.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<P, A> {
    /// Open the slot at the model. After a failed step, a request that is tried again is opened
    /// again.
    Opened {
        /// The request that gets the slot.
        id: RequestId,
        /// The slot to open.
        slot: Slot,
        /// The payload of the request.
        payload: Arc<P>,
    },
    /// Close the slot at the model.
    Closed(Slot),
    /// Answer the request. Occurs exactly once per accepted request.
    Ended(Ended<A>),
}

/// The end of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended<A> {
    /// Id of the request.
    pub id: RequestId,
    /// How the request ended.
    pub ending: Ending<A>,
    /// Positions, beams and steps that the request used.
    pub usage: Usage,
    /// The moments of the request's stages.
    pub timings: Timings,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending<A> {
    /// The model computed the answer.
    Finished(A),
    /// A warm request whose context is cached now.
    Warmed,
    /// The request could not be computed.
    Failed(Failure),
    /// The deadline came first.
    Expired,
    /// Dropped before any work was done: the deadline had become impossible.
    Dropped(Refusal),
    /// The client no longer wants the answer.
    Cancelled,
}

/// Why a request could not be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The model reported that it could not compute this request.
    #[error("the model refused the request: {0}")]
    Request(String),
    /// A step that held only this request failed.
    #[error("the step failed: {0}")]
    Step(String),
    /// A step that held only this request panicked.
    #[error("the step panicked: {0}")]
    Panicked(String),
    /// The model's outcomes did not match the plan.
    #[error("the model broke the protocol: {0}")]
    Protocol(&'static str),
}

/// The resources that a request used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of context positions.
    pub context_tokens: usize,
    /// Context positions that were found in the cache, on the device or in host memory.
    pub cached_tokens: usize,
    /// Beams of the first expansion, 0 before it.
    pub beam_width: usize,
    /// Passes through the model that the request took part in.
    pub steps: usize,
    /// Why the beam was narrowed; `None` if it was not.
    pub degraded: Option<Degraded>,
}

/// Why a beam was narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degraded {
    /// The whole beam was estimated to miss the deadline.
    Deadline {
        /// Number of beams that were requested.
        asked: usize,
        /// Estimated time for these beams.
        needed: Micros,
        /// Time left until the deadline.
        left: Micros,
    },
}

/// The moments at which a request entered each stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// The request was accepted.
    pub queued_at: Micros,
    /// The request got its slot and pages.
    pub admitted_at: Option<Micros>,
    /// The whole context was in pages.
    pub prefilled_at: Option<Micros>,
    /// The request ended.
    pub finished_at: Micros,
}
