//! What the scheduler tells whoever drives it: slots opened and closed, requests ended.
//!
//! Events come in one list, in the order in which they must be carried out: a slot is closed before
//! it is opened again.

use std::sync::Arc;

use beamline_model::step::Slot;

use crate::{
    request::{Refusal, RequestId},
    time::Micros,
};

/// One thing to carry out.
#[derive(Clone, Debug, PartialEq)]
pub enum Event<P, A> {
    /// Open the slot at the model. After a failed step, a request that is tried again is opened
    /// again.
    Opened {
        /// Whose slot.
        id: RequestId,
        /// The slot.
        slot: Slot,
        /// The payload of the request.
        payload: Arc<P>,
    },
    /// Close the slot at the model.
    Closed(Slot),
    /// Answer the request. Exactly one per accepted request.
    Ended(Ended<A>),
}

/// A request that is over.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended<A> {
    /// Which one.
    pub id: RequestId,
    /// How.
    pub ending: Ending<A>,
    /// What it used.
    pub usage: Usage,
    /// When what happened.
    pub timings: Timings,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending<A> {
    /// Answered.
    Finished(A),
    /// A warm request whose context is cached now.
    Warmed,
    /// It could not be computed.
    Failed(Failure),
    /// Its deadline came first.
    Expired,
    /// Before anything was done for it, its deadline had become impossible.
    Dropped(Refusal),
    /// Nobody wants it any more.
    Cancelled,
}

/// Why a request could not be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The model could not compute this request, and said so.
    #[error("the model refused the request: {0}")]
    Request(String),
    /// A step with nothing else in it failed.
    #[error("the step failed: {0}")]
    Step(String),
    /// A step with nothing else in it panicked.
    #[error("the step panicked: {0}")]
    Panicked(String),
    /// The model answered what the plan did not ask.
    #[error("the model broke the protocol: {0}")]
    Protocol(&'static str),
}

/// What a request used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Context positions.
    pub context_tokens: usize,
    /// Those of them that were found in the cache, on the device or in host memory.
    pub cached_tokens: usize,
    /// Beams of the first expansion, 0 before it.
    pub beam_width: usize,
    /// Passes through the model that the request took part in.
    pub steps: usize,
    /// Set when the beam was narrowed.
    pub degraded: Option<Degraded>,
}

/// Why a beam was narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degraded {
    /// The whole beam was estimated to miss the deadline.
    Deadline {
        /// Beams asked for.
        asked: usize,
        /// Time that they were estimated to take.
        needed: Micros,
        /// Time that was left.
        left: Micros,
    },
}

/// When what happened to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// Accepted.
    pub queued_at: Micros,
    /// Got its slot and pages.
    pub admitted_at: Option<Micros>,
    /// Its whole context was in pages.
    pub prefilled_at: Option<Micros>,
    /// Over.
    pub finished_at: Micros,
}
