//! Composing the next step.
//!
//! A step is for the first request of the order, see `order`. Another request shares the step where
//! that saves more than it costs. It saves the fixed part of a step, for all requests that wait and
//! for those that arrive before the next pause. It costs time: its rows delay the requests that are
//! already in the step. So a CPU computes contexts one after the other and beams together, and a
//! GPU computes everything together. The costs are measured, and so is the load; see `pace`.
//!
//! - A step does as much work as takes `max_step_time`, and at least `min_step_rows` rows, so that
//!   the next request waits no longer. It takes up to 16 times as long when there was only one
//!   request for a second. Contexts and beams are cut, except a context that has to be computed
//!   whole.
//! - No request shares a step where that would make another miss its goal.
//! - Context rows are bounded by `max_step_tokens`, branch rows by `max_branch_rows`.
//! - A request is admitted when the step computes for it. One more may wait in a seat while its
//!   pages are on their way.
//! - A request gets no rows before the last of its pages in host memory is ordered, see
//!   `restoring`, and none while another request computes pages that it needs, see `shared_work`.

use beamline_model::step::{BranchStep, Chunk, ContextShape, Plan, Slot};

use super::{
    Scheduler,
    order::{Candidate, WorkByClass},
    seat::{Stage, StepWork},
};
use crate::{
    event::{Degraded, Event},
    limits::SchedulerConfig,
    pace::{Beam, Curve},
    request::Request,
    time::Micros,
};

/// How long steps stay short after there was last more than one request.
const CROWDED: Micros = Micros(1_000_000);
/// A step may take this many times longer while there is only one request. Another request that
/// arrives waits for the end of this step, so its time has a bound as well.
const ALONE: u64 = 16;
/// Half a burst, in work, before the time of steps is known.
const UNKNOWN_BURST: u64 = 1024;

/// A step that is being composed.
struct Step {
    /// The bound on its work, and its work so far.
    most: u64,
    work: u64,
    curve: Option<Curve>,
    /// Factor by which saved time is worth more than itself.
    worth: u64,
    requests: u64,
    context_rows: usize,
    branch_rows: usize,
    /// Least time that any of its requests can spare.
    slack: Micros,
    work_by_class: WorkByClass,
    /// Requests that are not in the step and gain if it saves time.
    left: u64,
    /// Whether a request behind was passed over.
    passed_over: bool,
    /// Whether no other request is admitted, because one before found no room.
    closed: bool,
}

impl Step {
    /// Whether another request with this much work should share the step.
    fn welcomes(&self, work: u64) -> bool {
        // The costs are not known yet, or all steps were alike. One request shares, so that they
        // are learned.
        let Some(curve) = self.curve.filter(|curve| curve.is_known) else { return self.requests < 2 };
        let nanos = curve.per_row.saturating_mul(work);
        let costs = nanos.saturating_mul(self.requests);
        let saves = curve.per_step.saturating_mul(self.left).saturating_mul(self.worth);
        costs <= saves && Micros(nanos / 1000) <= self.slack
    }
}

impl<P> Scheduler<P> {
    /// Ends late requests, admits requests, and writes the next step. The plan is empty exactly
    /// when no request waits or runs. Otherwise report the step by [`Scheduler::commit`] or
    /// [`Scheduler::fail_step`] before any call other than a submission.
    pub fn plan<A>(&mut self, now: Micros, plan: &mut Plan, events: &mut Vec<Event<P, A>>) {
        assert!(self.in_flight.is_empty(), "a step is in flight");
        plan.clear();
        let told = events.len();
        self.expire(now, events);
        if let Some(&slot) = self.suspects.front() {
            self.cache.take_transfers(&mut plan.transfers);
            self.plan_alone(slot, plan);
        } else {
            self.compose(now, plan, events);
        }
        if events.len() > told {
            self.refresh_order();
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

    /// Plans a step of one request.
    fn plan_alone(&mut self, slot: Slot, plan: &mut Plan) {
        let running = self.seat(slot).running();
        match running.stage {
            Stage::Decode { rows, .. } => self.push_branch(slot, rows, plan),
            Stage::Prefill => {
                let rows = running.rows_left().min(self.limits.config.max_step_tokens);
                self.import(slot, usize::MAX, plan);
                self.push_chunk(slot, rows, plan);
            }
        }
    }

    /// Plans a step for the first request, and for those that share it.
    fn compose<A>(&mut self, now: Micros, plan: &mut Plan, events: &mut Vec<Event<P, A>>) {
        let most = self.step_work(now);
        self.tenants.settle(self.burst());
        self.rank(now);
        self.drop_hopeless(now, events);
        let Some(first) = self.first(most) else { return };
        let mut step = Step {
            most,
            work: 0,
            curve: self.pace.curve(),
            worth: self.pace.worth(),
            requests: 0,
            context_rows: 0,
            branch_rows: 0,
            slack: Micros(u64::MAX),
            work_by_class: WorkByClass::default(),
            left: self.who_gains(first),
            passed_over: false,
            closed: false,
        };
        self.consider(now, first, &mut step, plan, events);
        for index in (0..self.order.len()).filter(|index| *index != first) {
            if step.requests > 0 && (step.work >= most || !step.welcomes(1)) {
                break;
            }
            self.consider(now, index, &mut step, plan, events);
        }
        if step.requests == 0 {
            self.serve_one_that_waits_for_pages(&mut step, plan);
        }
        self.settle_behind(&step.work_by_class, most);
    }

    /// All requests wait for pages: brings back all pages of one of them at once, and serves it.
    fn serve_one_that_waits_for_pages(&mut self, step: &mut Step, plan: &mut Plan) {
        let seated = |candidate: &Candidate| Some((*candidate, candidate.slot?));
        let Some((candidate, slot)) = self.order.iter().find_map(seated) else { return };
        self.import(slot, usize::MAX, plan);
        self.include(&candidate, slot, step, plan);
    }

    /// Number of requests that gain if the step is short: those in the classes up to that of its
    /// first.
    fn who_gains(&self, first: usize) -> u64 {
        let class = self.order[first].class();
        self.order.partition_point(|candidate| candidate.class() <= class) as u64
    }

    /// Most work that the next step may do.
    fn step_work(&mut self, now: Micros) -> u64 {
        let SchedulerConfig { max_step_time, min_step_rows, .. } = self.limits.config;
        if self.running() + self.tenants.waiting() > 1 {
            self.crowded_at = Some(now);
        }
        let crowded = self.crowded_at.is_some_and(|at| now.since(at) < CROWDED);
        let times = if crowded { 1 } else { ALONE };
        let time = Micros(max_step_time.0.saturating_mul(times));
        let most = self.pace.curve().map(|curve| curve.rows_in(time) as u64);
        most.map_or(u64::MAX, |most| most.max(min_step_rows as u64))
    }

    /// Work of two steps: the lead that a tenant may have over another that waits as well.
    fn burst(&self) -> u64 {
        let SchedulerConfig { max_step_time, min_step_rows, .. } = self.limits.config;
        let most = self.pace.curve().map(|curve| curve.rows_in(max_step_time) as u64);
        most.unwrap_or(UNKNOWN_BURST).max(min_step_rows as u64).saturating_mul(2)
    }

    /// Adds a request to the step if it can and should be served.
    fn consider<A>(
        &mut self,
        now: Micros,
        index: usize,
        step: &mut Step,
        plan: &mut Plan,
        events: &mut Vec<Event<P, A>>,
    ) {
        let candidate = self.order[index];
        // A request that found no room keeps its turn: the requests after it are not admitted.
        step.closed |= self.no_room == Some(candidate.id());
        if candidate.slot.is_none() {
            if step.requests > 0 && (step.closed || self.somebody_is_ready(plan)) {
                step.passed_over |= candidate.is_behind();
                return;
            }
            if let Some(other) = self.computes_the_same(&candidate) {
                // Another request computes the pages that this one waits for, so that one is served
                // instead.
                return self.serve(&candidate, other, step, plan);
            }
            if step.closed {
                return;
            }
        }
        let slot = candidate.slot.or_else(|| self.seat_for(now, &candidate, events));
        // Evicted pages are copied out before the new owner fills or writes them.
        self.cache.take_transfers(&mut plan.transfers);
        step.closed |= self.no_room == Some(candidate.id());
        let Some(slot) = slot else { return };
        self.note_seat(index, slot);
        self.serve(&candidate, slot, step, plan);
    }

    /// Whether any request has a seat but no rows, neither before nor in this step.
    fn somebody_is_ready(&self, plan: &Plan) -> bool {
        self.prefilling.iter().any(|slot| {
            let idle = self.seats[slot.0 as usize].running().usage.steps == 0;
            idle && !plan.chunks.iter().any(|chunk| chunk.slot == *slot)
        })
    }

    /// Adds a seated request to the step, once its pages are ordered, if it may share it.
    fn serve(&mut self, candidate: &Candidate, slot: Slot, step: &mut Step, plan: &mut Plan) {
        let in_step = |plan: &Plan| {
            plan.chunks.iter().any(|chunk| chunk.slot == slot)
                || plan.branches.iter().any(|branch| branch.slot == slot)
        };
        if in_step(plan) {
            return;
        }
        if self.seats[slot.0 as usize].left_to_order() > 0 {
            // A step brings back at least one page, so that no request waits for ever.
            let least = usize::from(self.importing.is_empty());
            let budget = self.transfers_left(plan).max(least);
            self.import(slot, budget, plan);
            if self.seats[slot.0 as usize].left_to_order() > 0 {
                return;
            }
        }
        self.include(candidate, slot, step, plan);
    }

    fn include(&mut self, candidate: &Candidate, slot: Slot, step: &mut Step, plan: &mut Plan) {
        let running = self.seats[slot.0 as usize].running();
        let (stage, tenant) = (running.stage, running.tenant);
        let wanted = match stage {
            Stage::Prefill => running.rows_left(),
            Stage::Decode { rows, .. } => rows,
        };
        let all = self.work_of(slot, wanted);
        // Beside requests that go first, a class behind gets what it is owed, in its order.
        let class = candidate.class();
        let owed = self.behind.owed(class).saturating_sub(step.work_by_class.of(class));
        if step.work_by_class.before(class) && (step.passed_over || all > owed) {
            step.passed_over = true;
            return;
        }
        let Some(rows) = self.rows_in_step(slot, wanted, step) else { return };
        let work = self.work_of(slot, rows);
        match stage {
            Stage::Prefill => {
                step.context_rows += rows;
                self.push_chunk(slot, rows, plan);
            }
            Stage::Decode { .. } => {
                step.branch_rows += rows;
                self.push_branch(slot, rows, plan);
            }
        }
        self.tenants.charge(tenant, work, step.requests == 0);
        step.work = step.work.saturating_add(work);
        step.requests += 1;
        step.left = step.left.saturating_sub(1);
        if !candidate.is_behind() {
            step.slack = step.slack.min(candidate.slack);
        }
        step.work_by_class.add(class, work);
    }

    /// Work of the next `rows` rows of a request.
    fn work_of(&self, slot: Slot, rows: usize) -> u64 {
        let running = self.seats[slot.0 as usize].running();
        match running.stage {
            Stage::Prefill => {
                let start = running.next_row();
                self.limits.context_work(start..start + rows)
            }
            Stage::Decode { .. } => self.limits.branch_work(rows, running.demand.target),
        }
    }

    /// Number of the wanted rows that a request gets in this step, if any.
    fn rows_in_step(&self, slot: Slot, wanted: usize, step: &Step) -> Option<usize> {
        let SchedulerConfig { max_step_tokens, max_branch_rows, max_chunk, min_step_rows, .. } =
            self.limits.config;
        let running = self.seats[slot.0 as usize].running();
        let of_kind = match running.stage {
            Stage::Prefill => max_step_tokens - step.context_rows,
            Stage::Decode { .. } => max_branch_rows - step.branch_rows,
        };
        if step.requests > 0 {
            let work = self.work_of(slot, wanted);
            let fits = wanted <= of_kind && work <= step.most.saturating_sub(step.work);
            return (fits && step.welcomes(work)).then_some(wanted);
        }
        match running.stage {
            Stage::Prefill if running.request.shape == ContextShape::Whole => Some(wanted),
            Stage::Prefill => {
                let alone = self.order.len() <= 1;
                let chunk = if alone { max_step_tokens } else { max_chunk };
                let most = self.limits.context_rows_in(step.most, running.next_row());
                Some(wanted.min(of_kind).min(chunk).min(most.max(min_step_rows)))
            }
            // Equal parts: a few beams left at the end would need a step of their own.
            Stage::Decode { .. } => {
                let most = self.limits.branch_rows_in(step.most, running.demand.target);
                Some(wanted.div_ceil(wanted.div_ceil(most.max(min_step_rows))))
            }
        }
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

    fn push_branch(&mut self, slot: Slot, rows: usize, plan: &mut Plan) {
        let seat = self.seat(slot);
        let context = plan.pages.len();
        plan.pages.extend_from_slice(&seat.context_pages);
        let branch = plan.pages.len();
        plan.pages.extend_from_slice(&seat.branch_pages);
        plan.branches.push(BranchStep {
            slot,
            rows,
            context_pages: context..branch,
            branch_pages: branch..plan.pages.len(),
        });
    }

    /// Narrows the beams that are expanded first in this step, where they may be narrowed and would
    /// be late.
    fn choose_widths(&mut self, now: Micros, plan: &mut Plan) {
        let of_chunks = plan.chunks.iter().map(|chunk| self.limits.context_work(chunk.positions.clone()));
        let of_branches = plan.branches.iter().map(|branch| self.work_of(branch.slot, branch.rows));
        let work_now = of_chunks.chain(of_branches).sum::<u64>();
        let (pace, limits) = (self.pace, self.limits);
        for chunk in plan.chunks.iter_mut().filter(|chunk| chunk.expand.is_some()) {
            let own = limits.context_work(chunk.positions.clone());
            let running = self.seat(chunk.slot).running_mut();
            let request = &running.request;
            let beam = Beam {
                width: request.beam_width,
                least: request.min_beam_width,
                branch_steps: request.generated_steps - 1,
                per_thousand: limits.branch_work(1000, chunk.positions.end),
                rows_now: work_now as usize,
                rows_of_others: (work_now - own) as usize,
            };
            let (width, degraded) = match request.deadline {
                Some(deadline) if request.beam_widths.is_none() => pace.fit(beam, deadline.since(now)),
                Some(deadline) => fit_widths(request, beam, |beam| pace.fit(beam, deadline.since(now))),
                None => (beam.width, None),
            };
            chunk.expand = Some(width);
            running.usage.beam_width = width;
            running.usage.degraded = degraded;
        }
    }

    /// Records the work of the step, so that its outcomes can be interpreted.
    fn take_off(&mut self, plan: &Plan) {
        for Chunk { slot, positions, expand, .. } in &plan.chunks {
            let work = StepWork::Context { rows: positions.len(), end: positions.end, expand: *expand };
            self.in_flight.push((*slot, work));
        }
        for branch in &plan.branches {
            let context = self.seat(branch.slot).running().demand.target;
            self.in_flight.push((branch.slot, StepWork::Branch { rows: branch.rows, context }));
        }
    }
}

/// Like [`Pace::fit`](crate::pace::Pace::fit), for beams that differ from expansion to expansion.
/// The estimate uses equal beams with the mean width of the branch steps.
fn fit_widths<P>(
    request: &Request<P>,
    beam: Beam,
    fit: impl FnOnce(Beam) -> (usize, Option<Degraded>),
) -> (usize, Option<Degraded>) {
    let Beam { width, least, branch_steps, .. } = beam;
    let [most, fewest] = [width, least].map(|width| request.beams_of(branch_steps, width));
    if most == fewest {
        return (width, None);
    }
    let (mean, least) = (most.div_ceil(branch_steps), (fewest / branch_steps).max(1));
    let (affordable, degraded) = fit(Beam { width: mean, least, ..beam });
    let Some(Degraded::Deadline { needed, left, .. }) = degraded else { return (width, None) };
    match request.widest_within(branch_steps, affordable * branch_steps) {
        narrowed if narrowed < width => (narrowed, Some(Degraded::Deadline { asked: width, needed, left })),
        _ => (width, None),
    }
}
