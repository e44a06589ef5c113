//! The state machine: submit, plan, commit.
//!
//! ```text
//!            submit      plan: rank, admit         commit: advance
//!  Request ────────► queue ─────────────► seat ─────────────────────► Ended
//!                                          │  prefilling ─► decoding ───▲
//!                                          └─ failed step ─► suspects ──┘
//! ```
//!
//! One step is one [`Scheduler::plan`], then [`Scheduler::commit`] or [`Scheduler::fail_step`].
//! Between steps anything may be submitted or cancelled. Actions for the driver are returned as
//! [`Event`]s.
//!
//! Invariants:
//!
//! - A seat holds every page that its request will ever need, from admission to its end.
//! - A request is in exactly one place: the queue, or a seat and exactly one of the three lists of
//!   seats.
//! - The plan is empty exactly when no request waits or runs: an admitted request is served.
//! - A request that was in a failed step with others never shares a step again.
//!
//! No clock, no randomness, no threads: the same calls give the same plans and events.

mod admission;
mod commit;
mod failure;
mod order;
mod planning;
mod restoring;
mod seat;
mod shared_work;
mod stats;
mod tenants;

use std::collections::{HashMap, VecDeque};

use beamline_kv_cache::{CacheConfig, Fetch, HostMemory, KvCache, Namespace, disk::Waker};
use beamline_model::step::Slot;

use crate::{
    event::{Ended, Ending, Event, Timings, Usage},
    limits::{ConfigError, Demand, Limits, SchedulerConfig},
    pace::Pace,
    request::{Refusal, Request, RequestId},
    time::Micros,
};
use order::{Behind, Candidate};
use seat::{Seat, StepWork};
use tenants::{Queued, Tenants};

pub use stats::SchedulerStats;

/// The place of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the queue of its tenant.
    Queue(Namespace),
    /// In the seat of this slot.
    Seat(Slot),
}

/// Continuous batching as a synchronous state machine.
pub struct Scheduler<P> {
    limits: Limits,
    cache: KvCache,
    pace: Pace,
    stats: SchedulerStats,

    /// The place of every request that has not ended.
    places: HashMap<RequestId, Place>,
    /// The waiting requests, and the work done for their tenants.
    tenants: Tenants<P>,
    /// The request that found no room. No request has ended since.
    no_room: Option<RequestId>,
    /// All requests that had not ended when the last step was planned, in the order of service;
    /// then those that arrived since.
    order: Vec<Candidate>,
    arrived: Vec<Candidate>,
    /// Whether any request missed its goal or may wait, and what these are owed; see `order`.
    somebody_is_behind: bool,
    /// The largest late request that is not put behind; and a scratch list of size and work of all
    /// late requests.
    forgiven_span: u64,
    late: Vec<(u64, u64)>,
    behind: Behind,
    /// When there was last more than one request.
    crowded_at: Option<Micros>,

    /// The seats, one per slot.
    seats: Box<[Seat<P>]>,
    free_slots: Vec<Slot>,
    /// Rows for which all requests in seats were admitted.
    running_cost: u64,
    /// Seats whose context is not computed yet, and seats whose beams take branch steps.
    prefilling: VecDeque<Slot>,
    decoding: VecDeque<Slot>,
    /// Seats that were in a failed step with others. They are served alone, one after the other,
    /// before all other requests.
    suspects: VecDeque<Slot>,

    /// The work of the step that is being carried out, in the order of its plan.
    in_flight: Vec<(Slot, StepWork)>,
    /// Seats for which that step brings pages back.
    importing: Vec<Slot>,
}

impl<P> Scheduler<P> {
    /// Builds an idle scheduler over an empty cache.
    ///
    /// # Errors
    ///
    /// When the configuration cannot work.
    pub fn new(config: SchedulerConfig, cache: CacheConfig) -> Result<Self, ConfigError> {
        let limits = Limits::new(config, &cache)?;
        let slots =
            u32::try_from(config.max_running).map_err(|_| ConfigError::TooManySlots(config.max_running))?;
        Ok(Self {
            limits,
            cache: KvCache::new(cache)?,
            pace: Pace::default(),
            stats: SchedulerStats::default(),
            places: HashMap::with_capacity(config.max_queued + config.max_running),
            tenants: Tenants::default(),
            no_room: None,
            order: Vec::new(),
            arrived: Vec::new(),
            somebody_is_behind: false,
            forgiven_span: u64::MAX,
            late: Vec::new(),
            behind: Behind::default(),
            crowded_at: None,
            seats: (0..slots).map(|_| Seat::default()).collect(),
            free_slots: (0..slots).rev().map(Slot).collect(),
            running_cost: 0,
            prefilling: VecDeque::with_capacity(config.max_running),
            decoding: VecDeque::with_capacity(config.max_running),
            suspects: VecDeque::with_capacity(config.max_running),
            in_flight: Vec::with_capacity(config.max_running),
            importing: Vec::with_capacity(config.max_running),
        })
    }

    /// Gives the cache a second memory for evicted pages.
    #[must_use]
    pub fn with_host_memory(mut self, memory: HostMemory) -> Self {
        self.cache = self.cache.with_host_memory(memory);
        self
    }

    /// The limits that a request must keep.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The bookkeeping of the pages.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Frees host pages that have outlived their time. Call it when there is nothing to do.
    pub fn idle(&mut self) {
        self.cache.expire_host();
    }

    /// Starts reading the pages that are on disk and that the request would not find otherwise.
    pub fn fetch(&mut self, request: &Request<P>) -> Option<Fetch> {
        let demand = self.limits.demand(request).ok()?;
        let most = demand.shared_pages * self.limits.page_size;
        let address = request.page_address(self.limits.page_words());
        self.cache.fetch(&address.namespace, request.session, &address.words, most)
    }

    /// Processes completed disk reads and writes. Call it between steps.
    pub fn settle(&mut self) {
        self.cache.settle();
    }

    /// Sets the function to call when disk reads or writes have completed.
    pub fn set_waker(&mut self, waker: Waker) {
        self.cache.set_waker(waker);
    }

    /// The time to compute `pages` pages, once it can be estimated.
    pub fn time_to_compute_pages(&self, pages: usize) -> Option<Micros> {
        self.pace.time_of(pages.saturating_mul(self.limits.page_size) as u64)
    }

    /// Current gauges, and counters since the start.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats { queued: self.tenants.waiting() as u64, running: self.running() as u64, ..self.stats }
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.places.is_empty()
    }

    /// Accepts a request into the queue.
    ///
    /// # Errors
    ///
    /// When the request could never be served, or the queue is full. Nothing is kept then.
    pub fn submit(&mut self, now: Micros, request: Request<P>) -> Result<(), Refusal> {
        let demand = self.acceptable(now, &request).inspect_err(|_| self.stats.refused += 1)?;
        self.stats.accepted += 1;
        self.places.insert(request.id, Place::Queue(request.namespace));
        let goal = self.goal(now, &request, self.pace.expected_work(demand.work));
        let id = request.id;
        let address = request.page_address(self.limits.page_words());
        let tenant = self.tenants.push(Queued { request, address, demand, queued_at: now, goal });
        self.note_arrival(now, tenant, id);
        Ok(())
    }

    /// Ends a request at once, in any place. Returns whether there was one. Only between steps.
    pub fn cancel<A>(&mut self, now: Micros, id: RequestId, events: &mut Vec<Event<P, A>>) -> bool {
        assert!(self.in_flight.is_empty(), "requests are cancelled between steps, not within one");
        match self.places.get(&id) {
            None => return false,
            Some(&Place::Seat(slot)) => self.end(now, slot, Ending::Cancelled, events),
            Some(Place::Queue(tenant)) => {
                let tenant = self.tenants.find(tenant);
                let place = tenant.and_then(|tenant| Some((tenant, self.tenants.position(tenant, id)?)));
                let Some(queued) = place.and_then(|(tenant, index)| self.tenants.remove(tenant, index))
                else {
                    unreachable!("a request without a seat is in the queue")
                };
                self.end_queued(now, queued, Ending::Cancelled, events);
            }
        }
        self.refresh_order();
        true
    }

    fn acceptable(&self, now: Micros, request: &Request<P>) -> Result<Demand, Refusal> {
        let demand = self.limits.demand(request)?;
        if request.is_late(now) {
            return Err(Refusal::DeadlinePassed);
        }
        if self.places.contains_key(&request.id) {
            return Err(Refusal::DuplicateId);
        }
        let limit = self.limits.config.max_queued;
        if self.tenants.waiting() >= limit {
            return Err(Refusal::QueueFull { limit });
        }
        match self.late_behind_the_queue(now, request, &demand) {
            Some(refusal) => Err(refusal),
            None => Ok(demand),
        }
    }

    fn running(&self) -> usize {
        self.seats.len() - self.free_slots.len()
    }

    fn seat(&mut self, slot: Slot) -> &mut Seat<P> {
        &mut self.seats[slot.0 as usize]
    }

    /// Ends a request that has a seat, and frees everything it held.
    fn end<A>(&mut self, now: Micros, slot: Slot, ending: Ending<A>, events: &mut Vec<Event<P, A>>) {
        let seat = &mut self.seats[slot.0 as usize];
        let Some(running) = seat.running.take() else { unreachable!("only a taken seat is vacated") };
        // Tail first: among the pages that stay cached, the end of a chain must be evicted before
        // its beginning.
        self.cache.release_chain(&seat.branch_pages);
        self.cache.release_chain(&seat.context_pages);
        seat.branch_pages.clear();
        seat.context_pages.clear();
        seat.restoring.clear();
        self.running_cost -= running.cost;
        self.tenants.ended(running.tenant);
        for list in [&mut self.prefilling, &mut self.decoding, &mut self.suspects] {
            list.retain(|other| *other != slot);
        }
        self.free_slots.push(slot);
        events.push(Event::Closed(slot));
        let timings = Timings {
            queued_at: running.queued_at,
            admitted_at: Some(running.admitted_at),
            prefilled_at: running.prefilled_at,
            finished_at: now,
        };
        self.announce(Ended { id: running.request.id, ending, usage: running.usage, timings }, events);
    }

    /// Ends a request that never got a seat.
    fn end_queued<A>(
        &mut self,
        now: Micros,
        queued: Queued<P>,
        ending: Ending<A>,
        events: &mut Vec<Event<P, A>>,
    ) {
        let Queued { request, queued_at, .. } = queued;
        let usage = Usage { context_tokens: request.context_len, ..Usage::default() };
        let timings = Timings { queued_at, admitted_at: None, prefilled_at: None, finished_at: now };
        self.announce(Ended { id: request.id, ending, usage, timings }, events);
    }

    /// The only place where requests end.
    fn announce<A>(&mut self, ended: Ended<A>, events: &mut Vec<Event<P, A>>) {
        let place = self.places.remove(&ended.id);
        assert!(place.is_some(), "a request ends once");
        self.no_room = None;
        self.stats.count(&ended);
        events.push(Event::Ended(ended));
    }

    /// Asserts, at length, the invariants that hold between steps. For tests and simulations.
    ///
    /// # Panics
    ///
    /// When an invariant is broken.
    pub fn check_invariants(&self) {
        self.cache.check_invariants();
        assert_eq!(self.places.len(), self.tenants.waiting() + self.running());
        assert_eq!(self.running(), self.prefilling.len() + self.decoding.len() + self.suspects.len());
        let mut cost = 0;
        for &slot in self.prefilling.iter().chain(&self.decoding).chain(&self.suspects) {
            let seat = &self.seats[slot.0 as usize];
            let running = seat.running();
            assert_eq!(self.places.get(&running.request.id), Some(&Place::Seat(slot)));
            assert!(running.work_due <= running.work);
            assert_eq!(seat.context_pages.len(), running.demand.context_pages);
            assert_eq!(seat.branch_pages.len(), running.demand.branch_pages);
            assert!(running.computed <= running.demand.target);
            let in_flight = self.importing.contains(&slot);
            assert!(running.ordered == running.restored || in_flight, "pages are waited for that never come");
            assert!(seat.restoring.is_empty() || running.restored < seat.restoring.len());
            cost += running.cost;
        }
        assert_eq!(self.running_cost, cost);
        assert!(cost <= self.limits.config.max_running_cost);
        for tenant in self.tenants.ids().map(|id| self.tenants.get(id)) {
            for queued in &tenant.waiting {
                let place = Place::Queue(queued.request.namespace);
                assert_eq!(self.places.get(&queued.request.id), Some(&place));
            }
        }
        if self.running() == 0 {
            assert_eq!(self.cache.available(), self.limits.pages, "pages leaked");
        }
    }
}
