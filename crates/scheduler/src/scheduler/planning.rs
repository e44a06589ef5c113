//! What goes through the model in the next step.
//!
//! First the branch steps, under `max_branch_rows`: they end requests and free what those hold.
//! Then context rows, under `max_step_tokens`. The two have budgets of their own, so that neither
//! kind can starve the other.
//!
//! - While others wait, a step holds as many rows as take `max_step_time` by the measured pace, but
//!   at least `min_step_rows`. So nobody waits long for a step of others to end.
//! - Tenants have equal shares of a step. One that got more, because a beam cannot be cut or
//!   because nobody else wanted it, gets as much less of the next steps (deficit round robin).
//! - Branch steps are given in turns: first within the shares, then of what is left. Whoever is
//!   passed over comes first in the next step.
//! - Context rows are given out in two rounds, to the oldest first. In the first, each request gets
//!   an equal part of its tenant's share, at most `max_chunk`, so that a long context does not keep
//!   short ones waiting; in the second, what is left goes to the oldest again.
//! - A context that cannot be cut gets all of its rows or none. The oldest request finds the whole
//!   budget, which such a context never exceeds, so it waits only for those that were admitted
//!   before it.
//! - Whoever waits for pages out of host memory gets no rows before the last of them is ordered,
//!   see `restoring`.

use beamline_model::step::{BranchStep, Chunk, ContextShape, Plan, Slot};

use super::{
    Scheduler,
    seat::{Stage, Work},
    tenants::TenantId,
};
use crate::{event::Event, limits::SchedulerConfig, pace::Beam, time::Micros};

/// What a tenant gets of the context rows of a step.
struct Share {
    tenant: TenantId,
    /// Requests that have rows to compute.
    requests: usize,
    /// Rows of each of them.
    slice: usize,
}

impl<P> Scheduler<P> {
    /// Ends what is late, admits what fits and writes the next step. The plan is empty exactly when
    /// no request waits or runs; otherwise the step has to be reported by [`Scheduler::commit`] or
    /// [`Scheduler::fail_step`] before anything else but submissions.
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
            let most = self.step_rows();
            // Context rows get this many however many branch rows there are.
            let least = self.limits.config.min_step_rows;
            self.grant_shares(most.saturating_add(least));
            let rows = self.plan_branches(most, plan);
            self.plan_imports(plan);
            self.plan_chunks(most.saturating_sub(rows).max(least), plan);
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

    /// Most rows of a step: those that take as long as a step should while somebody waits for it to
    /// end.
    fn step_rows(&self) -> usize {
        let SchedulerConfig { max_step_time, min_step_rows, max_step_tokens, max_branch_rows, .. } =
            self.limits.config;
        let alone = self.running() + self.tenants.waiting() <= 1;
        let rows = self.pace.rows_in(max_step_time).filter(|_| !alone);
        let all = max_step_tokens.saturating_add(max_branch_rows);
        rows.map_or(all, |rows| rows.max(min_step_rows).min(all))
    }

    /// Gives each tenant that has something to compute an equal share of a step of `most` rows.
    fn grant_shares(&mut self, most: usize) {
        let mut tenants: Vec<TenantId> = Vec::new();
        let ready = self.prefilling.iter().filter(|slot| self.rows_ready(**slot) > 0);
        for slot in self.decoding.iter().chain(ready) {
            let tenant = self.seats[slot.0 as usize].running().tenant;
            if !tenants.contains(&tenant) {
                tenants.push(tenant);
            }
        }
        let each = (most / tenants.len().max(1)).max(1);
        tenants.into_iter().for_each(|tenant| self.tenants.grant(tenant, each));
    }

    /// Gives out branch steps under `most` rows. Returns their rows.
    fn plan_branches(&mut self, most: usize, plan: &mut Plan) -> usize {
        let max = self.limits.config.max_branch_rows;
        let (mut budget, mut rows_served, mut served) = (most.min(max), 0, Vec::new());
        // Tenants that have not had their share, then whoever wants what is left.
        for within_share in [true, false] {
            for index in 0..self.decoding.len() {
                let slot = self.decoding[index];
                let running = self.seats[slot.0 as usize].running();
                let (tenant, rows) = (running.tenant, running.branch_rows());
                if served.contains(&slot) || (within_share && self.tenants.credit(tenant) == 0) {
                    continue;
                }
                // The first is served however wide it is, unless that would delay somebody who is
                // owed a step.
                let waited_for = !within_share && rows > budget && self.is_owed_chunk(tenant);
                if waited_for || rows > if served.is_empty() { max } else { budget } {
                    break;
                }
                budget = budget.saturating_sub(rows);
                rows_served += rows;
                self.tenants.charge(tenant, rows, most);
                served.push(slot);
                self.push_branch(slot, plan);
            }
        }
        if served.len() < self.decoding.len() {
            self.decoding.retain(|slot| !served.contains(slot));
            self.decoding.extend(served);
        }
        rows_served
    }

    /// Whether another tenant than `than` has context rows to compute within its share.
    fn is_owed_chunk(&self, than: TenantId) -> bool {
        self.prefilling.iter().filter(|slot| self.rows_ready(**slot) > 0).any(|slot| {
            let tenant = self.seats[slot.0 as usize].running().tenant;
            tenant != than && self.tenants.credit(tenant) > 0
        })
    }

    fn plan_chunks(&mut self, most: usize, plan: &mut Plan) {
        let SchedulerConfig { max_step_tokens, max_chunk, min_step_rows, .. } = self.limits.config;
        let mut budget = most.min(max_step_tokens);
        let mut takes = std::mem::take(&mut self.takes);
        takes.clear();
        let shares = self.tenant_shares(budget);
        let first = self.prefilling.iter().position(|slot| self.rows_ready(*slot) > 0);
        for index in 0..self.prefilling.len() {
            let slot = self.prefilling[index];
            let running = self.seats[slot.0 as usize].running();
            let (tenant, shape, first) = (running.tenant, running.request.shape, first == Some(index));
            let slice = shares.iter().find(|share| share.tenant == tenant).map_or(0, |share| share.slice);
            let left = match (shape, first) {
                // A context that cannot be cut is not kept waiting by a bound that it could never
                // meet.
                (ContextShape::Whole, true) => max_step_tokens,
                (ContextShape::Whole, false) => budget,
                (ContextShape::Causal, first) => {
                    budget.min(self.tenants.credit(tenant).max(usize::from(first)))
                }
            };
            let take = self.share(slot, slice.max(min_step_rows).min(max_chunk), left);
            self.tenants.charge(tenant, take, most);
            budget = budget.saturating_sub(take);
            takes.push(take);
        }
        for (index, take) in takes.iter_mut().enumerate() {
            let slot = self.prefilling[index];
            let share = self.share(slot, usize::MAX, *take + budget).max(*take);
            let tenant = self.seats[slot.0 as usize].running().tenant;
            self.tenants.charge(tenant, share - *take, most);
            budget -= share - *take;
            *take = share;
        }
        for (index, &take) in takes.iter().enumerate().filter(|(_, take)| **take > 0) {
            self.push_chunk(self.prefilling[index], take, plan);
        }
        self.takes = takes;
    }

    /// What each request of a tenant that has rows to compute gets of `budget` in the first round.
    fn tenant_shares(&self, budget: usize) -> Vec<Share> {
        let mut shares: Vec<Share> = Vec::new();
        for slot in self.prefilling.iter().filter(|slot| self.rows_ready(**slot) > 0) {
            let tenant = self.seats[slot.0 as usize].running().tenant;
            match shares.iter_mut().find(|share| share.tenant == tenant) {
                Some(share) => share.requests += 1,
                None => shares.push(Share { tenant, requests: 1, slice: 0 }),
            }
        }
        let each = budget / shares.len().max(1);
        shares.iter_mut().for_each(|share| share.slice = each / share.requests);
        shares
    }

    /// Rows that a request gets when at most `budget` are left: no more than `chunk`, where its
    /// context may be cut.
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

    /// Narrows the beams that are expanded first in this step, where they may be narrowed and would
    /// be late.
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
