//! Requests that wait for pages from disk before they are queued.
//!
//! Place in the flow: a request that arrives is looked up. If pages of its context lie on disk,
//! their reading begins and the request waits here. Then it is submitted to the [`Scheduler`] like
//! any other. The scheduler finds the pages that have arrived in host memory.
//!
//! By the measured pace, a request waits no longer than computing those pages would take, with a
//! minimum of 10 ms, and 1 s while the pace is unknown. It does not wait where reading is known to
//! be slower. So a disk that hangs at most doubles the time that a longer request needs without
//! one. A wait that the operator sets overrides these rules. The deadline bounds every wait.
//!
//! Invariants:
//!
//! - A request that enters leaves exactly once, or is cancelled.
//! - Pages that were read for a request are held by [`Ready::fetch`] until it is admitted.
//!
//! Requests that wait here are overtaken by those that need nothing from disk, also of their own
//! tenant.
//!
//! No clock and no threads: time is passed in.

use std::time::Duration;

use beamline_kv_cache::Fetch;

use crate::{
    request::{Request, RequestId},
    scheduler::Scheduler,
    time::Micros,
};

/// Minimum wait: a read is slow now and then, even if computing would take no time at all.
const LEAST_PATIENCE: Duration = Duration::from_millis(10);
/// How long a request waits while the time to compute is not known yet.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Requests whose pages are being read.
#[derive(Debug)]
pub struct Lobby<P> {
    /// The waiting requests, in the order of their arrival.
    held: Vec<Held<P>>,
}

#[derive(Debug)]
struct Held<P> {
    request: Request<P>,
    submitted_at: Micros,
    fetch: Fetch,
    /// When the request goes on without the pages that are missing.
    until: Micros,
}

/// A request that is to be submitted now.
#[derive(Debug)]
pub struct Ready<P> {
    /// The request to submit.
    pub request: Request<P>,
    /// When the request was submitted to the engine.
    pub submitted_at: Micros,
    /// The pages read for it. Hold them until the request is admitted or has ended.
    pub fetch: Option<Fetch>,
}

impl<P> Default for Lobby<P> {
    fn default() -> Self {
        Self { held: Vec::new() }
    }
}

impl<P> Lobby<P> {
    /// Accepts a request that arrived. Returns it if it has nothing to wait for.
    pub fn enter(
        &mut self,
        now: Micros,
        submitted_at: Micros,
        request: Request<P>,
        scheduler: &mut Scheduler<P>,
    ) -> Option<Ready<P>> {
        let Some(fetch) = scheduler.fetch(&request) else {
            return Some(Ready { request, submitted_at, fetch: None });
        };
        let compute = scheduler.time_to_compute_pages(fetch.coming());
        let until = until(now, request.deadline, &fetch, compute);
        if until <= now {
            // The read goes on all the same: for the next visit, or in time if the queue is long.
            return Some(Ready { request, submitted_at, fetch: Some(fetch) });
        }
        self.held.push(Held { request, submitted_at, fetch, until });
        None
    }

    /// The next request that has waited enough: its pages are there, or its time is over.
    pub fn leave(&mut self, now: Micros) -> Option<Ready<P>> {
        let index = self.held.iter().position(|held| held.until <= now || held.fetch.is_over())?;
        let Held { request, submitted_at, fetch, .. } = self.held.remove(index);
        Some(Ready { request, submitted_at, fetch: Some(fetch) })
    }

    /// Removes a request whose client is gone. Returns whether it was here.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let before = self.held.len();
        self.held.retain(|held| held.request.id != id);
        self.held.len() < before
    }

    /// The moment at which the first request has waited enough, even if no page arrives.
    pub fn next_end(&self) -> Option<Micros> {
        self.held.iter().map(|held| held.until).min()
    }

    /// Whether no request waits here.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// The moment at which a request stops waiting.
fn until(now: Micros, deadline: Option<Micros>, fetch: &Fetch, compute: Option<Micros>) -> Micros {
    let compute = compute.map(|micros| Duration::from_micros(micros.0));
    let most = match (fetch.patience(), compute) {
        (Some(set), _) => set,
        (None, Some(compute)) if fetch.takes() > compute => Duration::ZERO,
        (None, Some(compute)) => compute.max(LEAST_PATIENCE),
        (None, None) => FIRST_PATIENCE,
    };
    // After the wait, the missing pages and the rest of the request still have to be computed.
    let latest = deadline.map(|deadline| {
        let left = Duration::from_micros(deadline.since(now).0);
        (left / 2).min(left.saturating_sub(compute.unwrap_or_default()))
    });
    now.after(latest.map_or(most, |latest| most.min(latest)))
}
