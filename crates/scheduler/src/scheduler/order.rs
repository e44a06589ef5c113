//! Who goes first.
//!
//! Every request has a *goal*: the moment at which it should be answered. It lies `objective` after
//! the arrival, or `stretch` times what the request takes alone, where that is longer. It is never
//! after the deadline. The order is:
//!
//! 1. requests that can meet their goal, then those that cannot, then batch, then shadow requests;
//! 2. among those, the requests of the tenant that had least, see `tenants`;
//! 3. among those, the request whose goal comes first. Where goals are missed: a request that has
//!    begun, then the one that has waited longest in proportion to its own time.
//!
//! Requests that are alike are served in the order of their arrival, each to its end. A small
//! request goes before a large one that began earlier.
//!
//! A missed goal is forgiven while all late work together takes a few objectives: it stays in its
//! place, and so comes first. Beyond that the model is overloaded. Then late requests go *behind*, so
//! that the others meet their goals.
//!
//! Late, batch and shadow requests are behind. While others go first, late requests are owed
//! `late_share` of the rows, batch requests `batch_share`. So they do not starve. They get all rows
//! that no other request wants.

use beamline_model::step::Slot;

use super::{Queued, Scheduler, seat::Running, tenants::TenantId};
use crate::{
    request::{Priority, Request, RequestId},
    time::Micros,
};

/// Lower goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    OnTime,
    Late,
    Batch,
    Shadow,
}

/// What requests are ordered by. Lower goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    class: Class,
    account: u64,
    /// The goal, or how many times the time until it has passed, the more the lower.
    urgency: u64,
    id: RequestId,
}

/// A request that wants to be served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    rank: Rank,
    pub(super) tenant: TenantId,
    /// `None` while it waits.
    pub(super) slot: Option<Slot>,
    /// When it should be answered.
    goal: Micros,
    /// Time until then, less what it still takes alone.
    pub(super) slack: Micros,
    /// Rows it is expected to need still.
    pub(super) rows: u64,
    pub(super) deadline: Option<Micros>,
}

impl Candidate {
    pub(super) fn id(&self) -> RequestId {
        self.rank.id
    }

    pub(super) fn class(&self) -> Class {
        self.rank.class
    }

    pub(super) fn goal(&self) -> Micros {
        self.goal
    }

    /// Leaves a request that missed its goal in its place.
    fn forgive(&mut self) {
        if self.rank.class == Class::Late {
            (self.rank.class, self.rank.urgency) = (Class::OnTime, self.goal.0);
        }
    }

    /// Whether it missed its goal, or may wait.
    pub(super) fn is_behind(&self) -> bool {
        self.rank.class > Class::OnTime
    }
}

/// A request as its rank depends on it.
struct Wish {
    id: RequestId,
    priority: Priority,
    tenant: TenantId,
    slot: Option<Slot>,
    arrival: Micros,
    goal: Micros,
    deadline: Option<Micros>,
    has_begun: bool,
    steps: u64,
    rows: u64,
}

impl<P> Scheduler<P> {
    /// The first goal of a request that arrives now and needs so many rows.
    pub(super) fn goal(&self, now: Micros, request: &Request<P>, rows: u64) -> Micros {
        let config = &self.limits.config;
        let alone = self.alone(request.generated_steps.max(1) as u64, rows);
        let span = config.objective.0.max(alone.0.saturating_mul(config.stretch));
        let goal = Micros(now.0.saturating_add(span));
        request.deadline.map_or(goal, |deadline| goal.min(deadline))
    }

    /// What so much takes alone.
    pub(super) fn alone(&self, steps: u64, rows: u64) -> Micros {
        self.pace.curve().map_or(Micros(0), |curve| curve.time_of(steps, rows))
    }

    /// Writes down a request that came between two steps.
    pub(super) fn note_arrival(&mut self, now: Micros, tenant: TenantId, id: RequestId) {
        let Some(index) = self.tenants.position(tenant, id) else { return };
        let wish = self.wish_to_begin(tenant, &self.tenants.get(tenant).waiting[index]);
        let mut candidate = self.candidate(now, &wish);
        if self.is_forgiving {
            candidate.forgive();
        }
        self.arrived.push(candidate);
    }

    /// Writes down everybody who wants to be served, in order.
    pub(super) fn rank(&mut self, now: Micros) {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        self.arrived.clear();
        for &slot in self.prefilling.iter().chain(&self.decoding) {
            let wish = wish_to_go_on(slot, self.seats[slot.0 as usize].running());
            order.push(self.candidate(now, &wish));
        }
        for tenant in self.tenants.ids() {
            for queued in &self.tenants.get(tenant).waiting {
                order.push(self.candidate(now, &self.wish_to_begin(tenant, queued)));
            }
        }
        let late = order.iter().filter(|candidate| candidate.class() == Class::Late);
        let late = self.pace.time_of(late.map(|candidate| candidate.rows).sum()).unwrap_or_default();
        self.is_forgiving = late.0 <= self.limits.config.objective.0.saturating_mul(FORGIVEN);
        if self.is_forgiving {
            order.iter_mut().for_each(Candidate::forgive);
        }
        order.sort_unstable_by_key(|candidate| candidate.rank);
        self.somebody_is_behind = order.last().is_some_and(Candidate::is_behind);
        self.order = order;
    }

    /// A request has a seat now.
    pub(super) fn note_seat(&mut self, index: usize, slot: Slot) {
        let rows = self.seats[slot.0 as usize].running().rows_due;
        let candidate = &mut self.order[index];
        (candidate.slot, candidate.rows) = (Some(slot), rows);
    }

    /// A step has ended: brings the order up to date, but for whose turn it is.
    pub(super) fn refresh_order(&mut self) {
        let seats = &self.seats;
        let places = &self.places;
        self.arrived.retain(|candidate| places.contains_key(&candidate.rank.id));
        self.order.retain_mut(|candidate| match candidate.slot {
            None => places.contains_key(&candidate.rank.id),
            Some(slot) => match &seats[slot.0 as usize].running {
                Some(running) if running.request.id == candidate.rank.id => {
                    candidate.rows = running.rows_due;
                    true
                }
                _ => false,
            },
        });
    }

    /// Time that a request must have to spare when it begins, out of `span` until its goal. Requests
    /// behind are owed a step now and then, and such a step may come between.
    pub(super) fn margin(&self, span: u64) -> u64 {
        let step = self.limits.config.max_step_time.0.min(span / 2);
        if self.somebody_is_behind { step } else { 0 }
    }

    fn wish_to_begin(&self, tenant: TenantId, queued: &Queued<P>) -> Wish {
        let Queued { request, demand, queued_at, goal } = queued;
        Wish {
            id: request.id,
            priority: request.priority,
            tenant,
            slot: None,
            arrival: *queued_at,
            goal: *goal,
            deadline: request.deadline,
            has_begun: false,
            steps: request.generated_steps.max(1) as u64,
            rows: self.pace.expected_rows(demand.cost),
        }
    }

    fn candidate(&self, now: Micros, wish: &Wish) -> Candidate {
        let ends = now.0.saturating_add(self.alone(wish.steps, wish.rows).0);
        let span = wish.goal.since(wish.arrival).0.max(1);
        let margin = if wish.slot.is_none() { self.margin(span) } else { 0 };
        let missed = ends.saturating_add(margin) > wish.goal.0;
        let class = match wish.priority {
            Priority::Interactive if missed => Class::Late,
            Priority::Interactive => Class::OnTime,
            Priority::Batch => Class::Batch,
            Priority::Shadow => Class::Shadow,
        };
        let urgency = match class {
            Class::OnTime => wish.goal.0,
            // What has begun is finished first: it holds pages.
            _ => {
                let waited = now.since(wish.arrival).0.saturating_mul(WHOLE) / span;
                (u64::MAX >> u32::from(wish.has_begun)).saturating_sub(waited)
            }
        };
        let account = self.tenants.account(wish.tenant);
        Candidate {
            rank: Rank { class, account, urgency, id: wish.id },
            tenant: wish.tenant,
            slot: wish.slot,
            // A goal that is missed keeps nobody from sharing a step.
            slack: if missed { Micros(u64::MAX) } else { wish.goal.since(Micros(ends)) },
            goal: wish.goal,
            rows: wish.rows,
            deadline: wish.deadline,
        }
    }

    /// The request that the next step is for: the first, or the first of a class behind that is
    /// owed a whole step. An index into the order.
    pub(super) fn first(&self, most: usize) -> Option<usize> {
        let most = most.min(self.limits.config.max_step_tokens) as u64;
        let owed = |class: Class| {
            let index = self.order.iter().position(|candidate| candidate.class() == class)?;
            (self.behind.owed(class) >= most).then_some(index)
        };
        owed(Class::Late).or_else(|| owed(Class::Batch)).or((!self.order.is_empty()).then_some(0))
    }

    /// Writes down what a step gave to whom.
    pub(super) fn settle_behind(&mut self, rows: &RowsByClass, most: usize) {
        let cap = 2 * most.min(self.limits.config.max_step_tokens) as u64;
        let config = self.limits.config;
        let waits = |class: Class| self.order.iter().any(|candidate| candidate.class() == class);
        let [late, batch] = [waits(Class::Late), waits(Class::Batch)];
        let before_late = rows.of(Class::OnTime);
        let before_batch = before_late + rows.of(Class::Late);
        self.behind.late.settle(late, before_late, rows.of(Class::Late), config.late_share, cap);
        self.behind.batch.settle(batch, before_batch, rows.of(Class::Batch), config.batch_share, cap);
    }

    /// What those behind take of the rows while others go first, in percent.
    pub(super) fn percent_behind(&self) -> u64 {
        let behind = self.order.iter().find(|candidate| candidate.is_behind());
        behind.map_or(0, |candidate| self.percent_of(candidate.class()))
    }

    /// What a class gets of the rows while others go first, in percent; never none.
    pub(super) fn percent_of(&self, class: Class) -> u64 {
        match class {
            Class::OnTime => 100,
            Class::Late => self.limits.config.late_share,
            Class::Batch | Class::Shadow => self.limits.config.batch_share,
        }
    }
}

/// Rows of a step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowsByClass([u64; 4]);

impl RowsByClass {
    pub(super) fn of(&self, class: Class) -> u64 {
        self.0[class as usize]
    }

    pub(super) fn add(&mut self, class: Class, rows: usize) {
        self.0[class as usize] += rows as u64;
    }

    /// Whether somebody goes before this class in the step.
    pub(super) fn before(&self, class: Class) -> bool {
        self.0[..class as usize].iter().any(|rows| *rows > 0)
    }
}

/// What those behind are owed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Behind {
    late: Account,
    batch: Account,
}

impl Behind {
    /// Rows that a class may have beside those before it.
    pub(super) fn owed(&self, class: Class) -> u64 {
        match class {
            Class::OnTime => u64::MAX,
            Class::Late => self.late.owed,
            Class::Batch => self.batch.owed,
            Class::Shadow => 0,
        }
    }

    /// Rows that a class got while it waited, of all, in 1024ths: never less than it is owed.
    pub(super) fn share(&self, class: Class, percent: u64) -> u64 {
        let share = if class == Class::Late { self.late.share } else { self.batch.share };
        share.max(WHOLE * percent / 100).max(1)
    }
}

#[derive(Clone, Copy, Debug)]
struct Account {
    owed: u64,
    /// In 1024ths.
    share: u64,
}

impl Default for Account {
    fn default() -> Self {
        Self { owed: 0, share: WHOLE }
    }
}

impl Account {
    fn settle(&mut self, waits: bool, rows_before: u64, rows: u64, percent: u64, cap: u64) {
        if !waits {
            self.owed = 0;
            return;
        }
        let share = rows * WHOLE / (rows_before + rows).max(1);
        self.share = self.share - self.share / SHARE_INERTIA + share / SHARE_INERTIA;
        // Rows that the classes before it did not want are free.
        if rows_before > 0 || self.owed > 0 {
            let earned = rows_before * percent / (100 - percent);
            self.owed = (self.owed + earned).saturating_sub(rows).min(cap);
        }
    }
}

fn wish_to_go_on<P>(slot: Slot, running: &Running<P>) -> Wish {
    Wish {
        id: running.request.id,
        priority: running.request.priority,
        tenant: running.tenant,
        slot: Some(slot),
        arrival: running.queued_at,
        goal: running.goal,
        deadline: running.request.deadline,
        has_begun: running.usage.steps > 0,
        steps: running.steps_left(),
        rows: running.rows_due,
    }
}

/// Parts that a share is counted in, and how much of a new one counts.
pub(super) const WHOLE: u64 = 1024;
const SHARE_INERTIA: u64 = 32;
/// How many objectives the work may take that is late and not put behind.
const FORGIVEN: u64 = 4;
