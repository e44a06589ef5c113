//! From the queue to a seat: tenants in turns, the requests of each in the order of their arrival.
//!
//! A request is admitted with all it will ever need: the pages of its context, less the cached
//! prefix, and the pages of all its branch rows. Where host memory continues the prefix, the pages
//! are there to be filled, not computed. So what runs can always go on, and what runs always ends.
//! Whoever's turn it is waits until it fits, and nobody overtakes it; since it would fit into an
//! idle scheduler, it is admitted at the latest when everything before it has ended.
//!
//! What would be late is not begun. By the measured pace, and by what was admitted before, it is
//! known when a request will be answered: a request that could only be late is refused on arrival,
//! and dropped if it turns out later. So under any load, what is computed is answered in time, and
//! nobody waits for an answer that does not come.

use std::sync::Arc;

use beamline_model::step::Slot;

use super::{
    Place, Queued, Scheduler,
    seat::{Running, Stage},
    tenants::{Tenant, TenantId},
};
use crate::{
    event::{Ended, Ending, Event, Timings, Usage},
    limits::SchedulerConfig,
    request::{Refusal, Request},
    time::Micros,
};

impl<P> Scheduler<P> {
    /// Ends what is late, before any more work is done for it.
    pub(super) fn expire<A>(&mut self, now: Micros, events: &mut Vec<Event<P, A>>) {
        for slot in (0..self.seats.len() as u32).map(Slot) {
            if self.seat(slot).running.as_ref().is_some_and(|running| running.request.is_late(now)) {
                self.end(now, slot, Ending::Expired, events);
            }
        }
        for tenant in self.tenants.ids() {
            self.expire_queue(now, tenant, events);
        }
    }

    /// Ends those of a tenant who are late, or will be even if nobody but their tenant is served.
    fn expire_queue<A>(&mut self, now: Micros, tenant: TenantId, events: &mut Vec<Event<P, A>>) {
        let mut before = self.tenants.get(tenant).running_rows;
        let mut index = 0;
        while let Some(queued) = self.tenants.get(tenant).waiting.get(index) {
            let rows = before.saturating_add(self.pace.expected_rows(queued.demand.cost));
            let ending = match &queued.request {
                request if request.is_late(now) => Some(Ending::Expired),
                // What would be late alone is tried: an estimate may be wrong.
                request if before > 0 => self.late(now, request.deadline, rows).map(Ending::Dropped),
                _ => None,
            };
            match ending {
                None => {
                    before = rows;
                    index += 1;
                }
                Some(ending) => {
                    if let Some(queued) = self.tenants.remove(tenant, index) {
                        self.end_queued(now, queued, ending, events);
                    }
                }
            }
        }
    }

    /// Why a request that comes now, for so many rows with an empty cache, would be late.
    pub(super) fn late_behind_the_queue(
        &self,
        now: Micros,
        request: &Request<P>,
        tenant: Option<TenantId>,
        cost: u64,
    ) -> Option<Refusal> {
        let pace = &self.pace;
        let rows =
            |tenant: &Tenant<P>| pace.expected_rows(tenant.waiting_rows).saturating_add(tenant.running_rows);
        let own = pace.expected_rows(cost);
        let rows = self.tenants.rows_before(tenant, own, rows);
        if rows > own { self.late(now, request.deadline, rows) } else { None }
    }

    /// Whether so many rows take longer than there is time.
    fn late(&self, now: Micros, deadline: Option<Micros>, rows: u64) -> Option<Refusal> {
        let (left, time) = (deadline?.since(now), self.pace.time_of(rows)?);
        (time > left).then(|| Refusal::Backlog { late: time.since(left) })
    }

    /// Admits as many as fit.
    pub(super) fn admit<A>(&mut self, now: Micros, events: &mut Vec<Event<P, A>>) {
        // Matching the same words again at every plan would be wasted: the head fits when somebody
        // has left.
        while !self.head_waits
            && let Some(&slot) = self.free_slots.last()
            && let Some(tenant) = self.whose_turn()
            && let Some(head) = self.tenants.remove(tenant, 0)
        {
            let name = head.request.namespace;
            self.turn = None;
            if let Some(head) = self.take_seat(now, slot, head, events) {
                self.tenants.put_back(head);
                self.turn = Some(name);
                self.head_waits = true;
            }
        }
        assert!(
            self.tenants.waiting() == 0 || self.running() > 0,
            "an idle scheduler admits whoever's turn it is"
        );
    }

    /// The tenant to serve next. One whose running requests will take long waits for some of them
    /// to end, so that others find seats and pages.
    fn whose_turn(&self) -> Option<TenantId> {
        let waits = |id: &TenantId| !self.tenants.get(*id).waiting.is_empty();
        let turn = self.turn.as_ref().and_then(|name| self.tenants.find(name)).filter(waits);
        let SchedulerConfig { tenant_running, tenant_running_time, .. } = self.limits.config;
        let rows = self.pace.rows_in(tenant_running_time).map_or(u64::MAX, |rows| rows as u64);
        let may = |tenant: &Tenant<P>| tenant.running < tenant_running || tenant.running_rows < rows;
        turn.or_else(|| self.tenants.next(may))
    }

    /// Gives the free `slot` to the head of a queue, with all that it needs, or gives the head
    /// back.
    fn take_seat<A>(
        &mut self,
        now: Micros,
        slot: Slot,
        head: Queued<P>,
        events: &mut Vec<Event<P, A>>,
    ) -> Option<Queued<P>> {
        let Some(held) = self.hold_pages(slot, &head) else { return Some(head) };
        let Held { cached, restored, cost } = held;
        let Queued { request, demand, queued_at } = head;
        let (id, len) = (request.id, request.context_len);
        self.stats.hit_tokens += cached as u64;
        self.stats.restored_tokens += restored as u64;
        self.stats.missed_tokens += (len - cached - restored) as u64;
        let usage = Usage { context_tokens: len, cached_tokens: cached + restored, ..Usage::default() };
        let seat = &mut self.seats[slot.0 as usize];

        if request.is_warm() && cached == demand.target {
            // All of it is on the device: over without a step.
            if let Some(session) = request.session {
                self.cache.remember(session, &request.namespace, &seat.context_pages);
            }
            self.cache.release_chain(&seat.context_pages);
            seat.context_pages.clear();
            seat.branch_pages.clear();
            let timings =
                Timings { queued_at, admitted_at: Some(now), prefilled_at: Some(now), finished_at: now };
            self.announce(Ended { id, ending: Ending::Warmed, usage, timings }, events);
            return None;
        }

        self.pace.observe_admission(cost, demand.cost);
        let tenant = self.tenants.admitted(request.namespace, cost);
        events.push(Event::Opened { id, slot, payload: Arc::clone(&request.payload) });
        seat.running = Some(Running {
            request,
            demand,
            tenant,
            cost,
            rows_due: cost,
            computed: cached + restored,
            published: cached / self.limits.page_size,
            ordered: 0,
            restored: 0,
            stage: Stage::Prefill,
            usage,
            queued_at,
            admitted_at: now,
            prefilled_at: None,
        });
        self.free_slots.pop();
        self.running_cost += cost;
        self.places.insert(id, Place::Seat(slot));
        self.prefilling.push_back(slot);
        None
    }

    /// Takes the cached pages and allocates the others that a request needs, into the free seat.
    /// Holds nothing if there are not enough, or the running requests cost too much for another.
    fn hold_pages(&mut self, slot: Slot, head: &Queued<P>) -> Option<Held> {
        let (request, demand) = (&head.request, head.demand);
        let page_size = self.limits.page_size;
        let seat = &mut self.seats[slot.0 as usize];
        assert!(seat.running.is_none() && seat.context_pages.is_empty() && seat.branch_pages.is_empty());
        assert!(seat.restoring.is_empty());
        let counts = self.cache.lookup_counts();
        let cached = self.cache.match_prefix(
            &request.namespace,
            request.session,
            &request.words,
            demand.shared_pages * page_size,
            &mut seat.context_pages,
        );
        let matched = seat.context_pages.len();
        assert!(cached == matched * page_size && matched <= demand.shared_pages);
        let restored = self.cache.match_host(
            &request.namespace,
            &request.words,
            demand.shared_pages * page_size,
            &seat.context_pages,
            &mut seat.restoring,
        );
        let fresh = demand.context_pages - matched + demand.branch_pages;
        let cost = demand.cost - (cached + restored) as u64;
        let affordable = self.running_cost + cost <= self.limits.config.max_running_cost;
        if !affordable || self.cache.allocate(fresh, &mut seat.context_pages).is_err() {
            self.cache.release_chain(&seat.context_pages);
            seat.context_pages.clear();
            seat.restoring.clear();
            self.cache.put_back_lookups(counts);
            return None;
        }
        seat.branch_pages.extend(seat.context_pages.drain(demand.context_pages..));
        assert_eq!(seat.context_pages.len(), demand.context_pages);
        assert_eq!(seat.branch_pages.len(), demand.branch_pages);
        Some(Held { cached, restored, cost })
    }
}

/// What a request found when its pages were taken.
struct Held {
    /// Context positions in cached pages, and in pages that come back from host memory.
    cached: usize,
    restored: usize,
    /// Rows that it is admitted for.
    cost: u64,
}
