//! From the queue to a seat, in the order of arrival.
//!
//! A request is admitted with all it will ever need: the pages of its context, less the cached prefix, and the pages
//! of all its branch rows. Where host memory continues the prefix, the pages are there to be filled, not computed. So what runs can always go on, and what runs always ends. The head of the queue waits
//! until it fits, and nobody overtakes it; since it would fit into an idle scheduler, it is admitted at the latest
//! when everything before it has ended.

use std::sync::Arc;

use beamline_model::step::Slot;

use super::{
    Queued, Scheduler,
    seat::{Running, Stage},
};
use crate::{
    event::{Ended, Ending, Event, Timings, Usage},
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
        let mut index = 0;
        while let Some(queued) = self.queue.get(index) {
            if !queued.request.is_late(now) {
                index += 1;
            } else if let Some(queued) = self.queue.remove(index) {
                self.end_queued(now, queued, Ending::Expired, events);
            }
        }
    }

    /// Admits as many as fit.
    pub(super) fn admit<A>(&mut self, now: Micros, events: &mut Vec<Event<P, A>>) {
        // Matching the same words again at every plan would be wasted: the head fits when somebody has left.
        while !self.head_waits
            && let Some(&slot) = self.free_slots.last()
            && let Some(head) = self.queue.pop_front()
        {
            if let Some(head) = self.take_seat(now, slot, head, events) {
                self.queue.push_front(head);
                self.head_waits = true;
            }
        }
        assert!(
            self.queue.is_empty() || self.running() > 0,
            "an idle scheduler admits the head of the queue"
        );
    }

    /// Gives the free `slot` to the head of the queue, with all that it needs, or gives the head back.
    fn take_seat<A>(
        &mut self,
        now: Micros,
        slot: Slot,
        head: Queued<P>,
        events: &mut Vec<Event<P, A>>,
    ) -> Option<Queued<P>> {
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
            return Some(head);
        }
        seat.branch_pages.extend(seat.context_pages.drain(demand.context_pages..));
        assert_eq!(seat.context_pages.len(), demand.context_pages);
        assert_eq!(seat.branch_pages.len(), demand.branch_pages);

        let Queued { request, queued_at, .. } = head;
        let (id, len) = (request.id, request.context_len);
        self.stats.hit_tokens += cached as u64;
        self.stats.restored_tokens += restored as u64;
        self.stats.missed_tokens += (len - cached - restored) as u64;
        let usage = Usage { context_tokens: len, cached_tokens: cached + restored, ..Usage::default() };

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

        events.push(Event::Opened { id, slot, payload: Arc::clone(&request.payload) });
        seat.running = Some(Running {
            request,
            demand,
            cost,
            computed: cached + restored,
            published: matched,
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
        self.places.insert(id, Some(slot));
        self.prefilling.push_back(slot);
        None
    }
}
