//! Those who wait for pages from disk, before they are queued.
//!
//! Place in the flow: a request that comes is looked up; if pages of its context lie on disk, their reading begins and it
//! waits here. Then it is submitted to the [`Scheduler`] like any other, which finds in host memory what has arrived.
//!
//! Nobody waits longer than computing those pages would take, by the measured pace, nor where reading is known to be
//! slower. So a disk that hangs costs a request at most as much time again as it needs without one. What an operator
//! sets counts more than both.
//!
//! Invariants:
//!
//! - Whoever enters leaves exactly once, or is cancelled.
//! - What has been read for a request is held until it is admitted: by [`Ready::fetch`].
//!
//! Requests that wait here are overtaken by those that need nothing from disk, also of their own tenant.
//!
//! No clock and no threads: time is passed in.

use std::time::Duration;

use beamline_kv_cache::Fetch;

use crate::{
    request::{Request, RequestId},
    scheduler::Scheduler,
    time::Micros,
};

/// Reads take longer than they should now and then, even if computing would take no time at all.
const LEAST_PATIENCE: Duration = Duration::from_millis(10);
/// How long to wait before it is known how long computing takes.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);

/// Requests whose pages are being read.
#[derive(Debug)]
pub struct Lobby<P> {
    /// In the order of their arrival.
    held: Vec<Held<P>>,
}

#[derive(Debug)]
struct Held<P> {
    request: Request<P>,
    submitted_at: Micros,
    fetch: Fetch,
    /// When it goes on without what is not there.
    until: Micros,
}

/// A request that is to be submitted now.
#[derive(Debug)]
pub struct Ready<P> {
    /// The request.
    pub request: Request<P>,
    /// When it came.
    pub submitted_at: Micros,
    /// To be held until the request is admitted, or has ended.
    pub fetch: Option<Fetch>,
}

impl<P> Default for Lobby<P> {
    fn default() -> Self {
        Self { held: Vec::new() }
    }
}

impl<P> Lobby<P> {
    /// Takes a request that came. Gives it back if it has nothing to wait for.
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
            // It is read all the same: for the next visit, or in time if the queue is long.
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

    /// Lets a request go that nobody wants any more. Returns whether it was here.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let before = self.held.len();
        self.held.retain(|held| held.request.id != id);
        self.held.len() < before
    }

    /// When the first of them has waited enough, whatever arrives.
    pub fn next_end(&self) -> Option<Micros> {
        self.held.iter().map(|held| held.until).min()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// When a request stops waiting.
fn until(now: Micros, deadline: Option<Micros>, fetch: &Fetch, compute: Option<Micros>) -> Micros {
    let compute = compute.map(|micros| Duration::from_micros(micros.0));
    let most = match (fetch.patience(), compute) {
        (Some(set), _) => set,
        (None, Some(compute)) if fetch.takes() > compute => Duration::ZERO,
        (None, Some(compute)) => compute.max(LEAST_PATIENCE),
        (None, None) => FIRST_PATIENCE,
    };
    // What is not there then is still to be computed, and the rest of the request, too.
    let latest = deadline.map(|deadline| {
        let left = Duration::from_micros(deadline.since(now).0);
        (left / 2).min(left.saturating_sub(compute.unwrap_or_default()))
    });
    now.after(latest.map_or(most, |latest| most.min(latest)))
}
