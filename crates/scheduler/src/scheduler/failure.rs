//! A step that failed as a whole: which request has failed, and which are tried again.
//!
//! After such a step, nothing is known about any of its requests. A request that was alone in it
//! has failed. Of several, each is a suspect: it is opened anew and served alone from then on. So a
//! request that makes every step fail only fails its own. The others wait meanwhile. That is the
//! price for never failing a request because of another.

use std::sync::Arc;

use beamline_kv_cache::ReuseClass;
use beamline_model::step::{ContextShape, Slot};

use super::{Scheduler, seat::Stage};
use crate::{
    event::{Ending, Event, Failure},
    time::Micros,
};

impl<P> Scheduler<P> {
    /// Handles a step that failed as a whole.
    pub fn fail_step<A>(&mut self, now: Micros, failure: Failure, events: &mut Vec<Event<P, A>>) {
        assert!(!self.in_flight.is_empty(), "no step is in flight");
        self.stats.failed_steps += 1;
        self.stats.failed_in_a_row += 1;
        self.forget_imports();
        let mut in_flight = std::mem::take(&mut self.in_flight);
        if let &[(slot, _)] = in_flight.as_slice() {
            self.end(now, slot, Ending::Failed(failure), events);
        } else {
            for (slot, _) in &in_flight {
                self.suspect(*slot, events);
            }
        }
        in_flight.clear();
        self.in_flight = in_flight;
        self.refresh_order();
    }

    /// Starts the request over, alone. The context pages that earlier steps wrote stay good. The
    /// model's state of its beams is gone, so a decode starts again at the last context row; or at
    /// the first, where the context is computed whole and never found again.
    fn suspect<A>(&mut self, slot: Slot, events: &mut Vec<Event<P, A>>) {
        assert!(!self.suspects.contains(&slot), "a suspect is never in a step with others");
        for list in [&mut self.prefilling, &mut self.decoding] {
            list.retain(|other| *other != slot);
        }
        self.suspects.push_back(slot);
        self.stats.retried += 1;
        let running = self.seat(slot).running_mut();
        running.stage = Stage::Prefill;
        if running.request.shape == ContextShape::Whole && running.request.reuse != ReuseClass::Exact {
            running.computed = 0;
        }
        let (id, payload) = (running.request.id, Arc::clone(&running.request.payload));
        events.push(Event::Closed(slot));
        events.push(Event::Opened { id, slot, payload });
    }
}
