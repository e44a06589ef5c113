//! Who waits, and who is served next: tenants in turns, by what their requests cost.
//!
//! Every tenant has a queue of its own and an account of the rows that it was admitted for. The
//! tenant with the lowest account is next. A tenant that was away begins at the account of whoever
//! was served last, or at its own if that is higher: it is owed nothing for the time before. Hence
//! two tenants that always wait are admitted for equally many rows, give or take one request, and a
//! tenant that seldom asks is next at once, however long the queue of another is.
//!
//! Within a tenant, requests are admitted in the order of their arrival.

use std::collections::{HashMap, VecDeque};

use beamline_kv_cache::Namespace;

use crate::{
    limits::Demand,
    request::{Request, RequestId},
    time::Micros,
};

/// Most accounts that are kept of tenants that have nothing to do. Tenants are named by clients.
const MOST_OWED: usize = 4096;

/// A request that waits for admission.
pub(super) struct Queued<P> {
    pub(super) request: Request<P>,
    pub(super) demand: Demand,
    pub(super) queued_at: Micros,
}

/// A tenant that has something to do: an index, dense and small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TenantId(usize);

pub(super) struct Tenant<P> {
    name: Option<Namespace>,
    pub(super) waiting: VecDeque<Queued<P>>,
    /// Rows that waiting requests will be admitted for, if nothing of them is cached.
    pub(super) waiting_rows: u64,
    /// Requests in seats.
    pub(super) running: usize,
    /// Rows that they still need.
    pub(super) running_rows: u64,
    /// The account.
    served: u64,
    /// Rows that it may have of the next steps before others; below 0 when it had more than its
    /// share.
    credit: i64,
}

/// All tenants that have something to do.
pub(super) struct Tenants<P> {
    tenants: Vec<Tenant<P>>,
    unused: Vec<TenantId>,
    by_name: HashMap<Namespace, TenantId>,
    waiting: usize,
    /// The account of whoever was served last, before that.
    clock: u64,
    /// Accounts of tenants that went away above the clock: they come back no better off. Forgotten
    /// when nobody has anything to do, and when there are too many.
    owed: HashMap<Namespace, u64>,
}

impl<P> Default for Tenants<P> {
    fn default() -> Self {
        Self {
            tenants: Vec::new(),
            unused: Vec::new(),
            by_name: HashMap::new(),
            waiting: 0,
            clock: 0,
            owed: HashMap::new(),
        }
    }
}

impl<P> Tenants<P> {
    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Every tenant that has something to do, in an order that depends on nothing but the calls
    /// before.
    pub(super) fn ids(&self) -> impl Iterator<Item = TenantId> + use<P> {
        (0..self.tenants.len()).map(TenantId)
    }

    pub(super) fn get(&self, id: TenantId) -> &Tenant<P> {
        &self.tenants[id.0]
    }

    /// The tenant of a name, if it has something to do.
    pub(super) fn find(&self, name: &Namespace) -> Option<TenantId> {
        self.by_name.get(name).copied()
    }

    /// Takes a request in, behind those of its tenant.
    pub(super) fn push(&mut self, queued: Queued<P>) {
        let id = self.enter(queued.request.namespace);
        let tenant = &mut self.tenants[id.0];
        tenant.waiting_rows += queued.demand.cost;
        tenant.waiting.push_back(queued);
        self.waiting += 1;
    }

    /// The tenant to serve next, among those that may be served.
    pub(super) fn next(&self, may: impl Fn(&Tenant<P>) -> bool) -> Option<TenantId> {
        let waits = self.ids().filter(|id| !self.get(*id).waiting.is_empty() && may(self.get(*id)));
        waits.min_by_key(|id| {
            let tenant = self.get(*id);
            (tenant.served, tenant.waiting.front().map(|head| (head.queued_at, head.request.id)))
        })
    }

    /// Takes a waiting request out, by its place in the queue of its tenant.
    pub(super) fn remove(&mut self, id: TenantId, index: usize) -> Option<Queued<P>> {
        let tenant = &mut self.tenants[id.0];
        let queued = tenant.waiting.remove(index)?;
        tenant.waiting_rows -= queued.demand.cost;
        self.waiting -= 1;
        self.leave(id);
        Some(queued)
    }

    /// Gives the head of a queue back, which was taken out and could not be admitted.
    pub(super) fn put_back(&mut self, queued: Queued<P>) {
        let id = self.enter(queued.request.namespace);
        let tenant = &mut self.tenants[id.0];
        tenant.waiting_rows += queued.demand.cost;
        tenant.waiting.push_front(queued);
        self.waiting += 1;
    }

    /// Where a request waits.
    pub(super) fn position(&self, name: &Namespace, request: RequestId) -> Option<(TenantId, usize)> {
        let id = self.find(name)?;
        let index = self.get(id).waiting.iter().position(|queued| queued.request.id == request)?;
        Some((id, index))
    }

    /// A request of a tenant got a seat, for so many rows.
    pub(super) fn admitted(&mut self, name: Namespace, rows: u64) -> TenantId {
        let id = self.enter(name);
        let tenant = &mut self.tenants[id.0];
        self.clock = self.clock.max(tenant.served);
        tenant.served += rows.max(1);
        tenant.running += 1;
        tenant.running_rows += rows;
        id
    }

    /// A running request needs fewer rows.
    pub(super) fn advanced(&mut self, id: TenantId, rows: u64) {
        self.tenants[id.0].running_rows -= rows;
    }

    /// A running request has ended, with so many rows left.
    pub(super) fn ended(&mut self, id: TenantId, rows_left: u64) {
        let tenant = &mut self.tenants[id.0];
        tenant.running -= 1;
        tenant.running_rows -= rows_left;
        self.leave(id);
    }

    /// Rows that are computed before a request of `own` rows is done: all of its tenant, and of
    /// each other tenant as many, because they take turns. `weigh` says how many rows of a tenant
    /// count.
    pub(super) fn rows_before(
        &self,
        of: Option<TenantId>,
        own: u64,
        weigh: impl Fn(&Tenant<P>) -> u64,
    ) -> u64 {
        let mine = of.map_or(0, |id| weigh(self.get(id))).saturating_add(own);
        let others = self.ids().filter(|id| Some(*id) != of).map(|id| weigh(self.get(id)).min(mine));
        others.fold(mine, u64::saturating_add)
    }

    /// Gives a tenant its share of a step. What it did not use of earlier ones is lost.
    pub(super) fn grant(&mut self, id: TenantId, rows: usize) {
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let tenant = &mut self.tenants[id.0];
        tenant.credit = tenant.credit.saturating_add(rows).min(rows);
    }

    /// A tenant gets rows of a step, of `most`. It owes at most these, or as many as a step has:
    /// what nobody else wanted is not held against it for long.
    pub(super) fn charge(&mut self, id: TenantId, rows: usize, most: usize) {
        let [rows, most] = [rows, rows.max(most)].map(|rows| i64::try_from(rows).unwrap_or(i64::MAX));
        let tenant = &mut self.tenants[id.0];
        tenant.credit = tenant.credit.saturating_sub(rows).max(tenant.credit.min(-most));
    }

    /// Rows that a tenant may have before others.
    pub(super) fn credit(&self, id: TenantId) -> usize {
        usize::try_from(self.get(id).credit).unwrap_or(0)
    }

    fn enter(&mut self, name: Namespace) -> TenantId {
        if let Some(id) = self.find(&name) {
            return id;
        }
        let id = self.unused.pop().unwrap_or_else(|| {
            self.tenants.push(Tenant {
                name: None,
                waiting: VecDeque::new(),
                waiting_rows: 0,
                running: 0,
                running_rows: 0,
                served: 0,
                credit: 0,
            });
            TenantId(self.tenants.len() - 1)
        });
        let tenant = &mut self.tenants[id.0];
        tenant.name = Some(name);
        tenant.credit = 0;
        tenant.served = self.clock.max(self.owed.remove(&name).unwrap_or_default());
        self.by_name.insert(name, id);
        id
    }

    /// Forgets a tenant that has nothing to do.
    fn leave(&mut self, id: TenantId) {
        let tenant = &mut self.tenants[id.0];
        if tenant.waiting.is_empty() && tenant.running == 0 {
            assert_eq!((tenant.waiting_rows, tenant.running_rows), (0, 0), "rows of nobody");
            let served = tenant.served;
            let Some(name) = tenant.name.take() else { return };
            self.by_name.remove(&name);
            self.unused.push(id);
            if served > self.clock {
                self.owed.insert(name, served);
            }
            if self.owed.len() > MOST_OWED {
                let clock = self.clock;
                self.owed.retain(|_, served| *served > clock);
            }
            if self.by_name.is_empty() || self.owed.len() > MOST_OWED {
                self.owed.clear();
            }
        }
    }
}
