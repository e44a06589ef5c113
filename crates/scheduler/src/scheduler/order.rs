//! The order in which requests are served.
//!
//! Every request has a *goal*: the moment at which it should be answered. The goal lies `objective`
//! after the arrival, or `stretch` times the time that the request takes alone, if that is longer.
//! It is never after the deadline. The order is:
//!
//! 1. requests that can meet their goal, then those that cannot, then batch, then shadow requests;
//! 2. among those, the requests of the tenant that was served least, see `tenants`;
//! 3. among those, the request whose goal comes first. Where goals are missed: a request that has
//!    begun, then the one that has waited longest in proportion to its own time.
//!
//! Requests that are alike are served in the order of their arrival, each to its end. A small
//! request goes before a much larger one, even if the larger one's goal comes first. The larger one
//! must still meet its goal, or miss it by no more than the time that it was given.
//!
//! A missed goal is forgiven while all late work together takes a few objectives: the request stays
//! in its place, and so comes first. With more late work than that, the model is overloaded, until
//! hardly anything is late. Then late requests go *behind*, so that the others meet their goals.
//! Small ones among them are still forgiven: those that take a few objectives together with all
//! late requests that are not much larger. So a small request that arrived a moment too late does
//! not wait behind large ones.
//!
//! Late, batch and shadow requests are behind. While others go first, late requests are owed
//! `late_share` of the work, and batch requests `batch_share`. So they do not starve. They also get
//! all the work that no other request wants.

use beamline_model::step::Slot;

use super::{Queued, Scheduler, seat::Running, tenants::TenantId};
use crate::{
    request::{Priority, Request, RequestId},
    time::Micros,
};

/// Classes of requests. A lower one goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    OnTime,
    Late,
    Batch,
    Shadow,
}

/// The sort key of a request. A lower one goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    class: Class,
    account: u64,
    /// The goal; for a late request, the lower the more times its own time it has waited.
    urgency: u64,
    id: RequestId,
}

/// A request that has not ended, with the facts that decide its turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    rank: Rank,
    pub(super) tenant: TenantId,
    /// Its slot; `None` while it waits.
    pub(super) slot: Option<Slot>,
    /// When the request should be answered, and how long that is after its arrival. The span shows
    /// how large it is.
    goal: Micros,
    span: u64,
    /// Time until the goal, less the time that the request still takes alone.
    pub(super) slack: Micros,
    /// Time that it can spare for much smaller requests: its slack, and the span again if it is
    /// late.
    patience: Micros,
    /// Work for which it was or will be admitted, and the work that it is expected to still need.
    size: u64,
    pub(super) work: u64,
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

    /// Treats a late request as on time if its span is no larger than `span`.
    fn forgive(&mut self, span: u64) {
        if self.rank.class == Class::Late && self.span <= span {
            (self.rank.class, self.rank.urgency) = (Class::OnTime, self.goal.0);
        }
    }

    /// Whether the request missed its goal, or may wait.
    pub(super) fn is_behind(&self) -> bool {
        self.rank.class > Class::OnTime
    }
}

/// The facts about a request on which its rank depends.
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
    size: u64,
    work: u64,
}

impl<P> Scheduler<P> {
    /// The goal of a request that arrives now and is `work` work.
    pub(super) fn goal(&self, now: Micros, request: &Request<P>, work: u64) -> Micros {
        let config = &self.limits.config;
        let alone = self.alone(request.generated_steps.max(1) as u64, work);
        let span = config.objective.0.max(alone.0.saturating_mul(config.stretch));
        let goal = Micros(now.0.saturating_add(span));
        request.deadline.map_or(goal, |deadline| goal.min(deadline))
    }

    /// The time that `steps` steps and `work` work take alone.
    pub(super) fn alone(&self, steps: u64, work: u64) -> Micros {
        self.pace.curve().map_or(Micros(0), |curve| curve.time_of(steps, work))
    }

    /// Adds a request that arrived between two steps.
    pub(super) fn note_arrival(&mut self, now: Micros, tenant: TenantId, id: RequestId) {
        let Some(index) = self.tenants.position(tenant, id) else { return };
        let wish = self.wish_to_begin(tenant, &self.tenants.get(tenant).waiting[index]);
        let mut candidate = self.candidate(now, &wish);
        candidate.forgive(self.forgiven_span);
        self.arrived.push(candidate);
    }

    /// Writes down all requests that have not ended, in order.
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
        self.forgiven_span = self.forgiven_span(&order);
        order.iter_mut().for_each(|candidate| candidate.forgive(self.forgiven_span));
        order.sort_unstable_by_key(|candidate| candidate.rank);
        self.somebody_is_behind = order.last().is_some_and(Candidate::is_behind);
        self.order = order;
    }

    /// The span of the largest late requests that are forgiven.
    fn forgiven_span(&mut self, order: &[Candidate]) -> u64 {
        let mut late = std::mem::take(&mut self.late);
        late.clear();
        let candidates = order.iter().filter(|candidate| candidate.class() == Class::Late);
        late.extend(candidates.map(|candidate| (candidate.span, candidate.work)));
        late.sort_unstable();
        let all = late.iter().map(|(_, work)| work).sum();
        // After an overload of equal requests, the late ones must not go before those that arrive
        // later. They are forgiven again when they take half an objective.
        let is_overloaded = self.forgiven_span < u64::MAX;
        let forgives_all = match is_overloaded {
            true => self.late_time(all) <= self.limits.config.objective.0 / 2,
            false => self.is_forgivable(all),
        };
        let span = if forgives_all { u64::MAX } else { self.largest_forgiven(&late) };
        self.late = late;
        span
    }

    /// The same where not all late requests are forgiven: only those much smaller than the first
    /// that exceeds the bound. `late` holds span and work, the smallest first.
    fn largest_forgiven(&self, late: &[(u64, u64)]) -> u64 {
        let mut work = 0;
        for &(span, own) in late {
            work += own;
            if !self.is_forgivable(work) {
                return (span / MUCH_LARGER).saturating_sub(1);
            }
        }
        late.last().map_or(u64::MAX, |(span, _)| (span / MUCH_LARGER).saturating_sub(1))
    }

    /// Whether this much late work is forgiven.
    fn is_forgivable(&self, work: u64) -> bool {
        self.late_time(work) <= self.limits.config.objective.0.saturating_mul(FORGIVEN)
    }

    /// Time that this much late work takes, in microseconds.
    fn late_time(&self, work: u64) -> u64 {
        self.pace.time_of(work).unwrap_or_default().0
    }

    /// Whether a late request of this span and work would be forgiven, given the late requests
    /// behind.
    pub(super) fn would_be_forgiven(&self, span: u64, work: u64) -> bool {
        let candidates = self.order.iter().chain(&self.arrived);
        let behind =
            candidates.filter(|other| other.class() == Class::Late && other.span / MUCH_LARGER <= span);
        self.is_forgivable(behind.map(|other| other.work).sum::<u64>().saturating_add(work))
    }

    /// Records that a request got a seat.
    pub(super) fn note_seat(&mut self, index: usize, slot: Slot) {
        let work = self.seats[slot.0 as usize].running().work_due;
        let candidate = &mut self.order[index];
        (candidate.slot, candidate.work) = (Some(slot), work);
    }

    /// Brings the order up to date without sorting it anew: removes ended requests, updates the
    /// work due.
    pub(super) fn refresh_order(&mut self) {
        let seats = &self.seats;
        let places = &self.places;
        self.arrived.retain(|candidate| places.contains_key(&candidate.rank.id));
        self.order.retain_mut(|candidate| match candidate.slot {
            None => places.contains_key(&candidate.rank.id),
            Some(slot) => match &seats[slot.0 as usize].running {
                Some(running) if running.request.id == candidate.rank.id => {
                    candidate.work = running.work_due;
                    true
                }
                _ => false,
            },
        });
    }

    /// Time that a request must have to spare when it begins, out of `span` until its goal.
    /// Requests behind are owed a step now and then, and such a step may come between.
    pub(super) fn margin(&self, span: u64) -> u64 {
        let step = self.limits.config.max_step_time.0.min(span / 2);
        if self.somebody_is_behind { step } else { 0 }
    }

    fn wish_to_begin(&self, tenant: TenantId, queued: &Queued<P>) -> Wish {
        let Queued { request, demand, queued_at, goal, .. } = queued;
        let work = self.pace.expected_work(demand.work);
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
            size: work,
            work,
        }
    }

    fn candidate(&self, now: Micros, wish: &Wish) -> Candidate {
        let ends = now.0.saturating_add(self.alone(wish.steps, wish.work).0);
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
            // A request that has begun is finished first, because it holds pages.
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
            // A missed goal does not keep other requests from sharing a step.
            slack: if missed { Micros(u64::MAX) } else { wish.goal.since(Micros(ends)) },
            patience: Micros(wish.goal.0.saturating_add(if missed { span } else { 0 })).since(Micros(ends)),
            goal: wish.goal,
            span,
            size: wish.size,
            work: wish.work,
            deadline: wish.deadline,
        }
    }

    /// The request that the next step is for: the first, or the first of a class behind that is
    /// owed a whole step. Returns an index into the order.
    pub(super) fn first(&self, most: u64) -> Option<usize> {
        let most = most.min(self.most_work());
        let owed = |class: Class| {
            let index = self.order.iter().position(|candidate| candidate.class() == class)?;
            (self.behind.owed(class) >= most).then_some(index)
        };
        owed(Class::Late).or_else(|| owed(Class::Batch)).or_else(|| self.first_on_time())
    }

    /// The first request, or a much smaller one for which all before it have the time. A request
    /// that waits for room keeps its turn: then only requests with a seat go before it.
    fn first_on_time(&self) -> Option<usize> {
        let first = self.order.first()?;
        let Some(curve) = self.pace.curve() else { return Some(0) };
        let mut slack = Micros(u64::MAX);
        for (index, candidate) in self.order.iter().enumerate() {
            let Rank { class, account, .. } = candidate.rank;
            if class != Class::OnTime || account != first.rank.account {
                break;
            }
            // Twice the time, because an estimate may be wrong.
            let takes = curve.time_of(1, candidate.work).0.saturating_mul(2);
            let may_begin = candidate.slot.is_some() || self.no_room.is_none();
            let is_small = candidate.size.saturating_mul(MUCH_LARGER) <= first.size;
            if is_small && may_begin && takes <= slack.0 {
                return Some(index);
            }
            slack = slack.min(candidate.patience);
        }
        Some(0)
    }

    /// Most work of a step whose time has no bound.
    fn most_work(&self) -> u64 {
        self.limits.config.max_step_tokens as u64
    }

    /// Records the work that a step did for each class.
    pub(super) fn settle_behind(&mut self, work: &WorkByClass, most: u64) {
        let cap = most.min(self.most_work());
        let config = self.limits.config;
        let waits = |class: Class| self.order.iter().any(|candidate| candidate.class() == class);
        let [late, batch] = [waits(Class::Late), waits(Class::Batch)];
        let before_late = work.of(Class::OnTime);
        let before_batch = before_late + work.of(Class::Late);
        self.behind.late.settle(late, before_late, work.of(Class::Late), config.late_share, cap);
        self.behind.batch.settle(batch, before_batch, work.of(Class::Batch), config.batch_share, cap);
    }

    /// Percentage of the work that requests behind take while others go first.
    pub(super) fn percent_behind(&self) -> u64 {
        let behind = self.order.iter().find(|candidate| candidate.is_behind());
        behind.map_or(0, |candidate| self.percent_of(candidate.class()))
    }

    /// Percentage of the work that a class gets while others go first; never 0.
    pub(super) fn percent_of(&self, class: Class) -> u64 {
        match class {
            Class::OnTime => 100,
            Class::Late => self.limits.config.late_share,
            Class::Batch | Class::Shadow => self.limits.config.batch_share,
        }
    }
}

/// Work of a step, by class.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WorkByClass([u64; 4]);

impl WorkByClass {
    pub(super) fn of(&self, class: Class) -> u64 {
        self.0[class as usize]
    }

    pub(super) fn add(&mut self, class: Class, work: u64) {
        self.0[class as usize] += work;
    }

    /// Whether a class before this one has work in the step.
    pub(super) fn before(&self, class: Class) -> bool {
        self.0[..class as usize].iter().any(|work| *work > 0)
    }
}

/// The work that the classes behind are owed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Behind {
    late: Account,
    batch: Account,
}

impl Behind {
    /// Work that a class may get beside the classes before it.
    pub(super) fn owed(&self, class: Class) -> u64 {
        match class {
            Class::OnTime => u64::MAX,
            Class::Late => self.late.owed,
            Class::Batch => self.batch.owed,
            Class::Shadow => 0,
        }
    }

    /// Share of all work that a class got while it waited, in 1024ths; never less than it is owed.
    pub(super) fn share(&self, class: Class, percent: u64) -> u64 {
        let share = if class == Class::Late { self.late.share } else { self.batch.share };
        share.max(WHOLE * percent / 100).max(1)
    }
}

#[derive(Clone, Copy, Debug)]
struct Account {
    owed: u64,
    /// Share of the work that the class got, in 1024ths.
    share: u64,
}

impl Default for Account {
    fn default() -> Self {
        Self { owed: 0, share: WHOLE }
    }
}

impl Account {
    fn settle(&mut self, waits: bool, before: u64, work: u64, percent: u64, cap: u64) {
        if !waits {
            self.owed = 0;
            return;
        }
        let share = work * WHOLE / (before + work).max(1);
        self.share = self.share - self.share / SHARE_INERTIA + share / SHARE_INERTIA;
        // Work that the classes before it did not want is free.
        if before > 0 || self.owed > 0 {
            let earned = before * percent / (100 - percent);
            self.owed = (self.owed + earned).saturating_sub(work).min(cap);
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
        size: running.work,
        work: running.work_due,
    }
}

/// Shares are counted in 1024ths. A new share counts for a 32nd.
pub(super) const WHOLE: u64 = 1024;
const SHARE_INERTIA: u64 = 32;
/// Late work up to this many objectives is not put behind.
const FORGIVEN: u64 = 4;
/// A request that takes this many times the time of another is much larger than it.
const MUCH_LARGER: u64 = 4;
