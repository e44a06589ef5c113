//! Recording the results of a step.
//!
//! A page is published as soon as all its rows are computed. So the next request shares it, even
//! while the request that computed it still runs.

use beamline_kv_cache::Publish;
use beamline_model::step::{Progress, Slot};

use super::{
    Scheduler,
    seat::{Stage, StepWork},
};
use crate::{
    event::{Ending, Event, Failure},
    request::PageAddress,
    time::Micros,
};

impl<P> Scheduler<P> {
    /// Ends a step that took `took`. Drains `outcomes`, which has one entry per entry of the plan,
    /// in its order. A list of any other form is a failed step.
    pub fn commit<A>(
        &mut self,
        now: Micros,
        took: Micros,
        outcomes: &mut Vec<(Slot, Progress<A>)>,
        events: &mut Vec<Event<P, A>>,
    ) {
        assert!(!self.in_flight.is_empty(), "no step is in flight");
        let asked = self.in_flight.iter().map(|(slot, _)| *slot);
        if !outcomes.iter().map(|(slot, _)| *slot).eq(asked) {
            outcomes.clear();
            self.fail_step(now, Failure::Protocol("not one outcome per entry of the plan"), events);
            return;
        }
        self.pace.observe_end(now, took);
        self.count_step(took);
        self.confirm_imports();
        let mut in_flight = std::mem::take(&mut self.in_flight);
        for ((slot, work), (_, progress)) in in_flight.drain(..).zip(outcomes.drain(..)) {
            let amount = work.amount(&self.limits);
            let running = self.seat(slot).running_mut();
            running.usage.steps += 1;
            running.work_due = running.work_due.saturating_sub(amount);
            let ending = match work {
                StepWork::Context { end, expand, .. } => {
                    self.advance_context(now, slot, end, expand, progress)
                }
                StepWork::Branch { rows, .. } => self.advance_branches(slot, rows, progress),
            };
            if let Some(ending) = ending {
                self.end(now, slot, ending, events);
            }
        }
        self.in_flight = in_flight;
        self.refresh_order();
    }

    fn count_step(&mut self, took: Micros) {
        let (mut context_rows, mut branch_rows, mut amount) = (0, 0, 0_u64);
        for (_, work) in &self.in_flight {
            match work {
                StepWork::Context { rows, .. } => context_rows += rows,
                StepWork::Branch { rows, .. } => branch_rows += rows,
            }
            amount += work.amount(&self.limits);
        }
        self.pace.observe(took, usize::try_from(amount).unwrap_or(usize::MAX));
        self.stats.steps += 1;
        self.stats.failed_in_a_row = 0;
        self.stats.context_rows += context_rows as u64;
        self.stats.branch_rows += branch_rows as u64;
        self.stats.step_micros += took.0;
    }

    /// Records that context positions up to `end` lie in pages. Returns how the request ended, if
    /// it did.
    fn advance_context<A>(
        &mut self,
        now: Micros,
        slot: Slot,
        end: usize,
        expand: Option<usize>,
        progress: Progress<A>,
    ) -> Option<Ending<A>> {
        if let Progress::Failed(why) = progress {
            return Some(Ending::Failed(Failure::Request(why)));
        }
        let running = self.seat(slot).running_mut();
        assert_eq!(running.stage, Stage::Prefill);
        assert!(running.computed <= end && end <= running.demand.target);
        running.computed = end;
        let complete = end == running.demand.target;
        let (warm, more_steps) = (running.request.is_warm(), running.request.generated_steps > 1);
        let first = if warm { 0 } else { running.request.width_at(0) };
        self.publish(slot);
        if complete {
            self.complete_context(now, slot);
        }
        match (progress, expand) {
            (Progress::Finished(answer), _) => Some(Ending::Finished(answer)),
            (Progress::Prefilled, None) if complete && warm => Some(Ending::Warmed),
            (Progress::Prefilled, None) if !complete => None,
            (Progress::Expanded { rows }, Some(width))
                if more_steps && (1..=width.min(first)).contains(&rows) =>
            {
                self.start_decode(slot, rows);
                None
            }
            _ => Some(Ending::Failed(Failure::Protocol("the outcome does not fit the chunk"))),
        }
    }

    /// Records that `rows` beams were computed. The last rows of a step complete the expansion of
    /// all beams.
    fn advance_branches<A>(&mut self, slot: Slot, rows: usize, progress: Progress<A>) -> Option<Ending<A>> {
        let limits = self.limits;
        let running = self.seat(slot).running_mut();
        let Stage::Decode { taken, rows: before } = running.stage else {
            unreachable!("a branch step decodes")
        };
        if let Progress::Partly { left } = progress {
            if rows == before || !(1..before).contains(&left) {
                return Some(Ending::Failed(Failure::Protocol("the outcome does not fit the beams")));
            }
            running.stage = Stage::Decode { taken, rows: left };
            return None;
        }
        // Beams that could not survive were left out.
        let left_out = limits.branch_work(before - rows, running.demand.target);
        running.work_due = running.work_due.saturating_sub(left_out);
        let taken = taken + 1;
        let steps = running.request.generated_steps - 1;
        let width = running.request.width_at(taken).min(running.usage.beam_width);
        match progress {
            Progress::Finished(answer) => Some(Ending::Finished(answer)),
            Progress::Failed(why) => Some(Ending::Failed(Failure::Request(why))),
            Progress::Expanded { rows } if taken < steps && (1..=width).contains(&rows) => {
                running.stage = Stage::Decode { taken, rows };
                None
            }
            Progress::Expanded { .. } | Progress::Prefilled | Progress::Partly { .. } => {
                Some(Ending::Failed(Failure::Protocol("the outcome does not fit the branch step")))
            }
        }
    }

    fn start_decode(&mut self, slot: Slot, rows: usize) {
        self.seat(slot).running_mut().stage = Stage::Decode { taken: 0, rows };
        // A suspect is on neither list: it is served alone to its end.
        let before = self.prefilling.len();
        self.prefilling.retain(|other| *other != slot);
        if self.prefilling.len() < before {
            self.decoding.push_back(slot);
        }
    }

    /// Publishes the pages that have become full.
    fn publish(&mut self, slot: Slot) {
        let seat = &mut self.seats[slot.0 as usize];
        let Some(running) = &mut seat.running else { unreachable!("a listed seat is taken") };
        let demand = running.demand;
        let full = match running.computed == demand.target {
            true => demand.shared_pages,
            false => (running.computed / self.limits.page_size).min(demand.shared_pages),
        };
        let PageAddress { namespace, words } = &running.address;
        for index in running.published..full {
            match self.cache.publish(namespace, &seat.context_pages, index, words) {
                Publish::Published | Publish::Withdrawn => {}
                // Another request was faster: use its page from now on. Ours went back to the
                // cache.
                Publish::Duplicate(existing) => seat.context_pages[index] = existing,
            }
        }
        running.published = running.published.max(full);
    }

    /// Records that the whole context lies in pages.
    fn complete_context(&mut self, now: Micros, slot: Slot) {
        let seat = &mut self.seats[slot.0 as usize];
        let Some(running) = &mut seat.running else { unreachable!("a listed seat is taken") };
        running.prefilled_at.get_or_insert(now);
        if let Some(session) = running.request.session {
            self.cache.remember(session, &running.address.namespace, &seat.context_pages);
        }
    }
}
