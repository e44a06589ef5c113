//! The outside of the engine: handles to submit by, tickets to wait with.

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
    /// What it used.
    pub usage: Usage,
    /// When what happened, in the engine's time.
    pub timings: Timings,
}

/// Why an accepted request was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// Refused by the scheduler: by what is at hand, it could only be late.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be computed.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// Its deadline came first.
    #[error("the deadline has passed")]
    Expired(Timings),
    /// The engine drained, and did not get to it in time.
    #[error("dropped at shutdown")]
    Drained,
    /// The engine is gone.
    #[error("the engine has stopped")]
    Stopped,
}

pub(super) type Reply<A> = oneshot::Sender<Result<Completed<A>, Unserved>>;

/// What handles tell the thread.
pub(super) enum Command<P, A> {
    Submit {
        request: Box<Request<P>>,
        submitted_at: Micros,
        reply: Reply<A>,
        /// Held until admission.
        place: OwnedSemaphorePermit,
    },
    /// Look at the shared state.
    Wake,
}

/// Submits requests to an engine. Clone it freely: the engine lives as long as the last of them.
pub struct EngineHandle<P, A> {
    /// Shared, so that the tiers can wake the thread without keeping it.
    commands: Arc<mpsc::Sender<Command<P, A>>>,
    shared: Arc<Shared>,
}

// Not derived: payload and answer need not be clonable for this.
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
    /// When it could never be served, when too many are waiting, or when the engine is going or
    /// gone.
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

    /// Takes no more requests from now on, by whatever handle. See
    /// [`Engine::drain`](super::Engine::drain).
    pub fn start_drain(&self, patience: Duration) {
        self.shared.start_drain(patience);
        // When the thread is gone there is nothing to drain.
        let _ = self.commands.send(Command::Wake);
    }

    /// What may be asked.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The engine's time: microseconds since its start. Deadlines are in this time.
    pub fn now(&self) -> Micros {
        self.shared.now()
    }

    /// When the engine last showed that it goes on: between steps, within them as often as the
    /// model beats its pulse, and at least ten times per second when idle. So when this lags
    /// [`EngineHandle::now`] by more than the longest part of a step, such as a layer, the engine
    /// hangs or is dead.
    pub fn heartbeat(&self) -> Micros {
        self.shared.heartbeat()
    }

    /// The numbers of the last pass of the loop. Cheap.
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

    /// Waits for the answer on this thread. Not for async code: there, await the ticket.
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
