//! What goes through the model in the next step.
//!
//! First the branch steps, under `max_branch_rows`: they end requests and free what those hold. Then context rows,
//! under `max_step_tokens`. The two have budgets of their own, so that neither kind can starve the other.
//!
//! - Branch steps are given in turns: whoever is passed over comes first in the next step, and nobody overtakes.
//! - Context rows go to the oldest first. In a first round each gets at most `max_chunk`, so that a long context does
//!   not keep short ones waiting; what is left goes to the oldest again.
//! - A context that cannot be cut gets all of its rows or none. The oldest request finds the whole budget, which such a
//!   context never exceeds, so it waits only for those that were admitted before it.
//! - Whoever waits for pages out of host memory gets no rows before the last of them is ordered, see `restoring`.

use beamline_model::step::{BranchStep, Chunk, ContextShape, Plan, Slot};

use super::{
    Scheduler,
    seat::{Stage, Work},
};
use crate::{event::Event, pace::Beam, time::Micros};

impl<P> Scheduler<P> {
    /// Ends what is late, admits what fits and writes the next step. The plan is empty exactly when no request waits
    /// or runs; otherwise the step has to be reported by [`Scheduler::commit`] or [`Scheduler::fail_step`] before
    /// anything else but submissions.
    pub fn plan<A>(&mut self, now: Micros, plan: &mut Plan, events: &mut Vec<Event<P, A>>) {
        assert!(self.in_flight.is_empty(), "a step is in flight");
        plan.clear();
        self.expire(now, events);
        self.admit(now, events);
        // What was evicted is copied out before its pages are filled or written.
        self.cache.take_transfers(&mut plan.transfers);
        if let Some(&slot) = self.suspects.front() {
            self.plan_alone(slot, plan);
        } else {
            self.plan_branches(plan);
            self.plan_imports(plan);
            self.plan_chunks(plan);
        }
        self.choose_widths(now, plan);
        self.take_off(plan);
        assert_eq!(
            plan.is_empty(),
            self.is_idle(),
            "whoever waits has somebody to wait for, and all who run end"
        );
        self.copy_ahead(plan);
    }

    /// A step of one request.
    fn plan_alone(&mut self, slot: Slot, plan: &mut Plan) {
        let running = self.seat(slot).running();
        match running.stage {
            Stage::Decode { .. } => self.push_branch(slot, plan),
            Stage::Prefill => {
                let rows = running.rows_left().min(self.limits.config.max_step_tokens);
                self.import(slot, usize::MAX, plan);
                self.push_chunk(slot, rows, plan);
            }
        }
    }

    fn plan_branches(&mut self, plan: &mut Plan) {
        let mut budget = self.limits.config.max_branch_rows;
        let mut served = 0;
        while let Some(&slot) = self.decoding.get(served) {
            let rows = self.seat(slot).running().branch_rows();
            if rows > budget {
                break;
            }
            budget -= rows;
            served += 1;
            self.push_branch(slot, plan);
        }
        assert!(served > 0 || self.decoding.is_empty(), "the widest beam fits into a step");
        if served < self.decoding.len() {
            self.decoding.rotate_left(served);
        }
    }

    fn plan_chunks(&mut self, plan: &mut Plan) {
        let config = self.limits.config;
        let mut budget = config.max_step_tokens;
        let mut takes = std::mem::take(&mut self.takes);
        takes.clear();
        for slot in &self.prefilling {
            let take = self.share(*slot, config.max_chunk, budget);
            budget -= take;
            takes.push(take);
        }
        for (slot, take) in self.prefilling.iter().zip(&mut takes) {
            let share = self.share(*slot, usize::MAX, *take + budget);
            budget -= share - *take;
            *take = share;
        }
        for (index, &take) in takes.iter().enumerate().filter(|(_, take)| **take > 0) {
            self.push_chunk(self.prefilling[index], take, plan);
        }
        self.takes = takes;
    }

    /// Rows that a request gets when at most `budget` are left: no more than `chunk`, where its context may be cut.
    fn share(&self, slot: Slot, chunk: usize, budget: usize) -> usize {
        let rows = self.rows_ready(slot);
        match self.seats[slot.0 as usize].running().request.shape {
            ContextShape::Causal => rows.min(chunk).min(budget),
            ContextShape::Whole if rows <= budget => rows,
            ContextShape::Whole => 0,
        }
    }

    /// Rows of a request that this step could compute: none before all that comes back is ordered.
    fn rows_ready(&self, slot: Slot) -> usize {
        let seat = &self.seats[slot.0 as usize];
        if seat.left_to_order() > 0 { 0 } else { seat.running().rows_left() }
    }

    fn push_chunk(&mut self, slot: Slot, rows: usize, plan: &mut Plan) {
        let page_size = self.limits.page_size;
        let seat = self.seat(slot);
        let running = seat.running();
        let positions = running.next_row()..running.next_row() + rows;
        assert!(rows > 0 && positions.end <= running.demand.target);
        let expands = positions.end == running.demand.target && !running.request.is_warm();
        let table = plan.pages.len();
        plan.pages.extend_from_slice(&seat.context_pages[..positions.end.div_ceil(page_size)]);
        plan.chunks.push(Chunk {
            slot,
            positions,
            cached: running.computed,
            context_pages: table..plan.pages.len(),
            expand: expands.then_some(running.request.beam_width),
        });
    }

    fn push_branch(&mut self, slot: Slot, plan: &mut Plan) {
        let seat = self.seat(slot);
        let context = plan.pages.len();
        plan.pages.extend_from_slice(&seat.context_pages);
        let branch = plan.pages.len();
        plan.pages.extend_from_slice(&seat.branch_pages);
        plan.branches.push(BranchStep {
            slot,
            context_pages: context..branch,
            branch_pages: branch..plan.pages.len(),
        });
    }

    /// Narrows the beams that are expanded first in this step, where they may be narrowed and would be late.
    fn choose_widths(&mut self, now: Micros, plan: &mut Plan) {
        let branch_rows: usize =
            plan.branches.iter().map(|branch| self.seat(branch.slot).running().branch_rows()).sum();
        let rows_now = plan.context_rows() + branch_rows;
        let pace = self.pace;
        for chunk in plan.chunks.iter_mut().filter(|chunk| chunk.expand.is_some()) {
            let running = self.seat(chunk.slot).running_mut();
            let request = &running.request;
            let beam = Beam {
                width: request.beam_width,
                least: request.min_beam_width,
                branch_steps: request.generated_steps - 1,
                rows_now,
                rows_of_others: rows_now - chunk.positions.len(),
            };
            let (width, degraded) = match request.deadline {
                Some(deadline) => pace.fit(beam, deadline.since(now)),
                None => (beam.width, None),
            };
            chunk.expand = Some(width);
            running.usage.beam_width = width;
            running.usage.degraded = degraded;
        }
    }

    /// Writes down what the step does, to know what its outcomes mean.
    fn take_off(&mut self, plan: &Plan) {
        for Chunk { slot, positions, expand, .. } in &plan.chunks {
            let work = Work::Context { rows: positions.len(), end: positions.end, expand: *expand };
            self.in_flight.push((*slot, work));
        }
        for branch in &plan.branches {
            let rows = self.seat(branch.slot).running().branch_rows();
            self.in_flight.push((branch.slot, Work::Branch { rows }));
        }
    }
}
