//! The outside of the engine: handles that submit requests, and tickets that wait for answers.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context, Poll},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::shared::{EngineStats, Shared};
use crate::{
    event::{Failure, Timings, Usage},
    limits::Limits,
    request::{Refusal, Request, RequestId},
    time::Micros,
};

/// A request that was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Completed<A> {
    /// The answer; `None` for a request that only warms the cache.
    pub answer: Option<A>,
    /// Positions, beams and steps that the request used.
    pub usage: Usage,
    /// The moments of the request's stages, in the engine's time.
    pub timings: Timings,
}

/// Why an accepted request was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// The scheduler refused the request: by the measured pace, it could only be late.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The request could not be computed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The deadline came first.
    #[error("the deadline has passed")]
    Expired(Timings),
    /// The engine drained and did not get to the request in time.
    #[error("dropped at shutdown")]
    Drained,
    /// The engine has ended.
    #[error("the engine has stopped")]
    Stopped,
}

pub(super) type Reply<A> = oneshot::Sender<Result<Completed<A>, Unserved>>;

/// Messages from the handles to the thread.
pub(super) enum Command<P, A> {
    Submit {
        request: Box<Request<P>>,
        submitted_at: Micros,
        reply: Reply<A>,
        /// A place in the queue, held until admission.
        place: OwnedSemaphorePermit,
    },
    /// Wakes the thread, which then looks at the shared state.
    Wake,
}

/// Submits requests to an engine. Clone it freely: the engine lives as long as the last of them.
pub struct EngineHandle<P, A> {
    /// Shared, so that the tiers can wake the thread without keeping it.
    commands: Arc<mpsc::Sender<Command<P, A>>>,
    shared: Arc<Shared>,
}

// Not derived: a handle is clonable even if payload and answer are not.
impl<P, A> Clone for EngineHandle<P, A> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), shared: self.shared.clone() }
    }
}

impl<P, A> fmt::Debug for EngineHandle<P, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").finish_non_exhaustive()
    }
}

impl<P, A> EngineHandle<P, A> {
    pub(super) fn new(commands: Arc<mpsc::Sender<Command<P, A>>>, shared: Arc<Shared>) -> Self {
        Self { commands, shared }
    }

    /// Submits a request, under an id that the engine gives it. Its deadline is in the engine's
    /// time, see [`EngineHandle::now`]. Dropping the ticket drops the request. Never blocks.
    ///
    /// # Errors
    ///
    /// When the request could never be served, when too many are waiting, or when the engine drains
    /// or has ended.
    pub fn submit(&self, request: Request<P>) -> Result<Ticket<A>, Refusal> {
        self.try_submit(request).inspect_err(|_| self.shared.count_refusal())
    }

    fn try_submit(&self, mut request: Request<P>) -> Result<Ticket<A>, Refusal> {
        let submitted_at = self.now();
        if self.shared.drained_by().is_some() {
            return Err(Refusal::ShuttingDown);
        }
        self.shared.limits.check(&request)?;
        if request.is_late(submitted_at) {
            return Err(Refusal::DeadlinePassed);
        }
        let place = self.shared.take_place()?;
        let id = RequestId(self.shared.next_id());
        request.id = id;
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit { request: Box::new(request), submitted_at, reply, place };
        self.commands.send(command).map_err(|_| Refusal::ShuttingDown)?;
        Ok(Ticket { id, answer })
    }

    /// Refuses new requests from now on, from every handle. See
    /// [`Engine::drain`](super::Engine::drain).
    pub fn start_drain(&self, patience: Duration) {
        self.shared.start_drain(patience);
        // A thread that has ended has nothing to drain.
        let _ = self.commands.send(Command::Wake);
    }

    /// The limits that a request must keep.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The engine's time: microseconds since its start. Deadlines are in this time.
    pub fn now(&self) -> Micros {
        self.shared.now()
    }

    /// The last sign of life of the engine. It gives one between steps, within them as often as the
    /// model beats its pulse, and at least ten times per second when idle. When this lags
    /// [`EngineHandle::now`] by more than the longest part of a step, such as a layer, the engine
    /// hangs or is dead.
    pub fn heartbeat(&self) -> Micros {
        self.shared.heartbeat()
    }

    /// The statistics of the last pass of the loop. Takes constant time.
    pub fn stats(&self) -> EngineStats {
        self.shared.stats()
    }
}

/// An accepted request: a future of its answer. Dropping it drops the request.
#[must_use = "dropping the ticket drops the request"]
#[derive(Debug)]
pub struct Ticket<A> {
    id: RequestId,
    answer: oneshot::Receiver<Result<Completed<A>, Unserved>>,
}

impl<A> Ticket<A> {
    /// The id that the engine gave the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Blocks this thread until the answer comes. In async code, await the ticket instead.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn wait(self) -> Result<Completed<A>, Unserved> {
        self.answer.blocking_recv().unwrap_or(Err(Unserved::Stopped))
    }
}

impl<A> Future for Ticket<A> {
    type Output = Result<Completed<A>, Unserved>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = Pin::new(&mut self.answer).poll(cx);
        answer.map(|answer| answer.unwrap_or(Err(Unserved::Stopped)))
    }
}
