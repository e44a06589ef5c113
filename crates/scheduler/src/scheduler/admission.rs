//! The way of a request from the queue to a seat, and its refusal when it would be late.
//!
//! A request is admitted when the next step is to compute for it, with everything it will ever
//! need: the pages of its context, less the cached prefix, and the pages of all its branch rows.
//! Where host memory continues the prefix, these pages are filled by copies instead of computed. So
//! a running request can always go on, and always ends. A request that does not fit keeps its turn:
//! requests after it are not admitted. It would fit into an idle scheduler, so it is admitted at
//! the latest when all running requests have ended.
//!
//! A request that would be late is not begun. The measured pace says when it would be answered. If
//! that is too late, the request is refused on arrival, or dropped when it turns out later. So the
//! requests that are computed are answered in time under any load, and hardly any request waits in
//! vain.

use std::sync::Arc;

use beamline_kv_cache::ReuseClass;
use beamline_model::step::Slot;

use super::{
    Place, Queued, Scheduler,
    order::{Candidate, Class, WHOLE},
    seat::{Running, Stage},
    tenants::TenantId,
};
use crate::{
    event::{Ended, Ending, Event, Timings, Usage},
    limits::Demand,
    request::{Priority, Refusal, Request},
    time::Micros,
};

/// A request is accepted behind others if a fifth of the time until its deadline is left to spare.
const SPARE: u64 = 5;

/// The result of an attempt to seat a request.
pub(super) enum Seating<P> {
    /// The request has a seat.
    Seated(Slot),
    /// The request ended at once: everything it needed was cached.
    Over,
    /// There is no room for the request now.
    NoRoom(Box<Queued<P>>),
}

/// Work that is done before a request.
#[derive(Default)]
struct Before {
    /// Work of requests on time whose goal comes first.
    on_time: u64,
    /// Work of all requests on time.
    all_on_time: u64,
    /// Work of requests behind.
    behind: u64,
}

impl<P> Scheduler<P> {
    /// Ends requests past their deadline, before any more work is done for them.
    pub(super) fn expire<A>(&mut self, now: Micros, events: &mut Vec<Event<P, A>>) {
        for slot in (0..self.seats.len() as u32).map(Slot) {
            if self.seat(slot).running.as_ref().is_some_and(|running| running.request.is_late(now)) {
                self.end(now, slot, Ending::Expired, events);
            }
        }
        for tenant in self.tenants.ids() {
            let mut index = 0;
            while let Some(queued) = self.tenants.get(tenant).waiting.get(index) {
                if !queued.request.is_late(now) {
                    index += 1;
                } else if let Some(queued) = self.tenants.remove(tenant, index) {
                    self.end_queued(now, queued, Ending::Expired, events);
                }
            }
        }
    }

    /// Ends waiting requests of the order that would be late even if only their tenant were served.
    pub(super) fn drop_hopeless<A>(&mut self, now: Micros, events: &mut Vec<Event<P, A>>) {
        let mut before = vec![0_u64; self.tenants.ids().count()];
        let mut order = std::mem::take(&mut self.order);
        let others_go_first = order.first().is_some_and(|first| !first.is_behind());
        order.retain(|candidate| {
            let before = &mut before[candidate.tenant.index()];
            let work = before.saturating_add(candidate.work);
            let left = candidate.deadline.filter(|_| candidate.slot.is_none());
            // Beside requests on time, a request that is behind gets only its share, so it would
            // begin and not end.
            let percent = if others_go_first { self.percent_of(candidate.class()) } else { 100 };
            let own = self.time_of(candidate.work).0.saturating_mul(100) / percent;
            let takes = self.time_of(*before).0.saturating_add(own);
            let late = left.map_or(0, |by| takes.saturating_sub(by.since(now).0));
            // A request that would be late with no other before it is tried: an estimate may be
            // wrong.
            if late == 0 || *before == 0 {
                *before = work;
                return true;
            }
            let why = Refusal::Backlog { late: Micros(late) };
            let Some(index) = self.tenants.position(candidate.tenant, candidate.id()) else { return true };
            if let Some(queued) = self.tenants.remove(candidate.tenant, index) {
                self.end_queued(now, queued, Ending::Dropped(why), events);
            }
            false
        });
        self.order = order;
    }

    fn time_of(&self, work: u64) -> Micros {
        self.pace.time_of(work).unwrap_or_default()
    }

    /// Why a request that arrives now would be late, if it would: among the requests on time, and
    /// also behind them and all that are late.
    pub(super) fn late_behind_the_queue(
        &self,
        now: Micros,
        request: &Request<P>,
        demand: &Demand,
    ) -> Option<Refusal> {
        let left = request.deadline?.since(now);
        // A beam that may be narrowed is narrowed rather than refused.
        let [whole, narrowed] = [request.beam_width, request.min_beam_width]
            .map(|width| request.beams_of(request.generated_steps, width));
        let saved = self.limits.branch_work(whole.saturating_sub(narrowed), demand.target);
        let own = self.pace.expected_work(demand.work.saturating_sub(saved));
        let goal = self.goal(now, request, own);
        let before = self.work_before(request, own, goal);
        if before.all_on_time + before.behind == 0 {
            return None;
        }
        // Requests behind get their share meanwhile.
        let others = self.percent_behind();
        // The time alone is estimated as for the goal.
        let alone = self.alone(request.generated_steps.max(1) as u64, own);
        let soon =
            self.time_of(before.on_time).0.saturating_add(alone.0).saturating_mul(100) / (100 - others);
        let span = goal.since(now);
        let in_time = soon <= left.0 && soon.saturating_add(self.margin(span.0)) <= span.0;
        if request.priority == Priority::Interactive && (in_time || self.would_be_forgiven(span.0, own)) {
            let ends = self.time_of(before.all_on_time).0.saturating_add(alone.0).saturating_mul(100);
            if in_time || ends / (100 - others) <= left.0 {
                return None;
            }
        }
        let behind = self.time_of(before.behind.saturating_add(own)).0.saturating_mul(WHOLE);
        let (class, percent) = match request.priority {
            Priority::Interactive => (Class::Late, self.limits.config.late_share),
            _ => (Class::Batch, self.limits.config.batch_share),
        };
        // While there are requests on time, those behind get no more than they are owed.
        let owed = (WHOLE * percent / 100).max(1);
        let share = if before.all_on_time > 0 { owed } else { self.behind.share(class, percent) };
        let last = self.time_of(before.all_on_time).0.saturating_add(behind / share);
        // An estimate may be wrong, and a request accepted for the last moment may wait in vain.
        let left = left.0 - left.0 / SPARE;
        (last > left).then(|| Refusal::Backlog { late: Micros(last - left) })
    }

    /// Work of the request's tenant that goes first, and at most as much of each other tenant,
    /// because tenants share.
    fn work_before(&self, request: &Request<P>, own: u64, goal: Micros) -> Before {
        let tenant = self.tenants.find(&request.namespace);
        let last = match request.priority {
            Priority::Interactive => Class::Late,
            Priority::Batch => Class::Batch,
            Priority::Shadow => Class::Shadow,
        };
        let mut each: Vec<(TenantId, Before)> = Vec::new();
        for candidate in self.order.iter().chain(&self.arrived) {
            let index = each.iter().position(|(id, _)| *id == candidate.tenant).unwrap_or_else(|| {
                each.push((candidate.tenant, Before::default()));
                each.len() - 1
            });
            let sums = &mut each[index].1;
            match candidate.class() {
                Class::OnTime => {
                    sums.all_on_time += candidate.work;
                    if candidate.goal() <= goal {
                        sums.on_time += candidate.work;
                    }
                }
                class if class <= last => sums.behind += candidate.work,
                _ => {}
            }
        }
        let mut before = Before::default();
        if let Some((_, mine)) = each.iter().find(|(id, _)| Some(*id) == tenant) {
            before.on_time = mine.on_time;
            before.all_on_time = mine.all_on_time;
            before.behind = mine.behind;
        }
        let mine = [before.on_time + own, before.all_on_time + own, before.behind + own];
        for (_, theirs) in each.iter().filter(|(id, _)| Some(*id) != tenant) {
            before.on_time += theirs.all_on_time.min(mine[0]);
            before.all_on_time += theirs.all_on_time.min(mine[1]);
            before.behind += theirs.behind.min(mine[2]);
        }
        before
    }

    /// Admits a waiting request, if there is room.
    pub(super) fn seat_for<A>(
        &mut self,
        now: Micros,
        candidate: &Candidate,
        events: &mut Vec<Event<P, A>>,
    ) -> Option<Slot> {
        let Some(&slot) = self.free_slots.last() else {
            self.no_room = Some(candidate.id());
            return None;
        };
        let index = self.tenants.position(candidate.tenant, candidate.id())?;
        let queued = self.tenants.remove(candidate.tenant, index)?;
        match self.take_seat(now, slot, queued, events) {
            Seating::Seated(slot) => Some(slot),
            Seating::Over => None,
            Seating::NoRoom(queued) => {
                self.tenants.put_back(index, *queued);
                self.no_room = Some(candidate.id());
                None
            }
        }
    }

    /// Gives the free `slot` and all that the request needs to it, or returns the request.
    fn take_seat<A>(
        &mut self,
        now: Micros,
        slot: Slot,
        head: Queued<P>,
        events: &mut Vec<Event<P, A>>,
    ) -> Seating<P> {
        let Some(held) = self.hold_pages(slot, &head) else { return Seating::NoRoom(Box::new(head)) };
        let Held { cached_pages, cached, restored, cost } = held;
        let Queued { request, address, demand, queued_at, goal } = head;
        let work = demand.work.saturating_sub(self.limits.context_work(0..cached + restored));
        let (id, len) = (request.id, request.context_len);
        self.stats.hit_tokens += cached as u64;
        self.stats.restored_tokens += restored as u64;
        self.stats.missed_tokens += (len - cached - restored) as u64;
        let usage = Usage { context_tokens: len, cached_tokens: cached + restored, ..Usage::default() };
        let seat = &mut self.seats[slot.0 as usize];

        if request.is_warm() && cached == demand.target {
            // Everything is on the device: the request ends without a step.
            if let Some(session) = request.session {
                self.cache.remember(session, &address.namespace, &seat.context_pages);
            }
            self.cache.release_chain(&seat.context_pages);
            seat.context_pages.clear();
            seat.branch_pages.clear();
            let timings =
                Timings { queued_at, admitted_at: Some(now), prefilled_at: Some(now), finished_at: now };
            self.announce(Ended { id, ending: Ending::Warmed, usage, timings }, events);
            return Seating::Over;
        }

        self.pace.observe_admission(work, demand.work);
        let tenant = self.tenants.admitted(request.namespace);
        events.push(Event::Opened { id, slot, payload: Arc::clone(&request.payload) });
        seat.running = Some(Running {
            request,
            address,
            demand,
            tenant,
            cost,
            work,
            work_due: work,
            computed: cached + restored,
            published: cached_pages,
            ordered: 0,
            restored: 0,
            stage: Stage::Prefill,
            usage,
            queued_at,
            goal,
            admitted_at: now,
            prefilled_at: None,
        });
        self.free_slots.pop();
        self.running_cost += cost;
        self.places.insert(id, Place::Seat(slot));
        self.prefilling.push_back(slot);
        Seating::Seated(slot)
    }

    /// Takes the cached pages and allocates the others that a request needs, into the free seat.
    /// Holds nothing if there are not enough pages, or if the running requests cost too much for
    /// another.
    fn hold_pages(&mut self, slot: Slot, head: &Queued<P>) -> Option<Held> {
        let (request, address, demand) = (&head.request, &head.address, head.demand);
        let page_size = self.limits.page_size;
        let seat = &mut self.seats[slot.0 as usize];
        assert!(seat.running.is_none() && seat.context_pages.is_empty() && seat.branch_pages.is_empty());
        assert!(seat.restoring.is_empty());
        let counts = self.cache.lookup_counts();
        let covered = self.cache.match_prefix(
            &address.namespace,
            request.session,
            &address.words,
            demand.shared_pages * page_size,
            &mut seat.context_pages,
        );
        let mut matched = seat.context_pages.len();
        assert!(covered == matched * page_size && matched <= demand.shared_pages);
        self.cache.match_host(
            &address.namespace,
            &address.words,
            demand.shared_pages * page_size,
            &seat.context_pages,
            &mut seat.restoring,
        );
        if request.reuse == ReuseClass::Exact && matched + seat.restoring.len() < demand.shared_pages {
            // A part of such a context is useless.
            self.cache.release_chain(&seat.context_pages);
            seat.context_pages.clear();
            seat.restoring.clear();
            self.cache.put_back_lookups(counts);
            matched = 0;
        }
        // The last page may hold fewer positions than it has room for.
        let positions = |pages: usize| demand.target.min(pages * page_size);
        let cached = positions(matched);
        let restored = positions(matched + seat.restoring.len()) - cached;
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
        Some(Held { cached_pages: matched, cached, restored, cost })
    }
}

/// The cached part of a request, found when its pages were taken.
struct Held {
    /// Number of pages that are cached on the device.
    cached_pages: usize,
    /// Context positions in cached pages, and in pages that come back from host memory.
    cached: usize,
    restored: usize,
    /// Rows for which the request is admitted.
    cost: u64,
}
