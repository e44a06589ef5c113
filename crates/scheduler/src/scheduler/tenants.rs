//! The queues of the tenants, and the work done for each: tenants share the model by work.
//!
//! Every tenant has its own queue and an account of the work done for it. The tenant with the
//! lowest account is served first. So two tenants that always wait get equal work. A tenant that
//! seldom asks is served at the next step, however long the queue of another is.
//!
//! - A tenant that was away begins a *burst* below the lowest account. It is served at once, and
//!   may finish a request of that size. It begins no lower than it left, so going away gains
//!   nothing.
//! - The tenant that was served last goes on until its account is a burst above another. So
//!   requests that can be finished are not interleaved.
//!
//! What this must not know: which request of a tenant is served first; see `order`.

use std::collections::{HashMap, VecDeque};

use beamline_kv_cache::Namespace;

use crate::{
    limits::Demand,
    request::{PageAddress, Request, RequestId},
    time::Micros,
};

/// Most accounts that are kept for idle tenants. Clients choose the names of tenants.
const MOST_OWED: usize = 4096;

/// A request that waits for admission.
pub(super) struct Queued<P> {
    pub(super) request: Request<P>,
    pub(super) address: PageAddress,
    pub(super) demand: Demand,
    pub(super) queued_at: Micros,
    /// When the request should be answered, see `order`.
    pub(super) goal: Micros,
}

/// A tenant that has something to do, as an index. Indices are dense and small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TenantId(usize);

impl TenantId {
    /// The index, which is below the number of [`Tenants::ids`].
    pub(super) fn index(self) -> usize {
        self.0
    }
}

pub(super) struct Tenant<P> {
    name: Option<Namespace>,
    /// Waiting requests, in the order of their arrival.
    pub(super) waiting: VecDeque<Queued<P>>,
    /// Number of requests in seats.
    pub(super) running: usize,
    /// The account: work done for the tenant.
    served: u64,
}

/// All tenants that have something to do.
pub(super) struct Tenants<P> {
    tenants: Vec<Tenant<P>>,
    unused: Vec<TenantId>,
    by_name: HashMap<Namespace, TenantId>,
    waiting: usize,
    /// The tenant that was served last.
    turn: Option<TenantId>,
    /// Work of a burst.
    burst: u64,
    /// The lowest account of the tenants that have something to do, or had last.
    clock: u64,
    /// Accounts of tenants that went away. When there are too many, those that would begin where a
    /// new tenant begins are forgotten.
    owed: HashMap<Namespace, u64>,
}

impl<P> Default for Tenants<P> {
    fn default() -> Self {
        Self {
            tenants: Vec::new(),
            unused: Vec::new(),
            by_name: HashMap::new(),
            waiting: 0,
            turn: None,
            burst: 0,
            // High enough that the first tenant may begin a burst below.
            clock: 1 << 32,
            owed: HashMap::new(),
        }
    }
}

impl<P> Tenants<P> {
    /// Number of requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Every tenant, idle ones included. The order depends only on the calls before.
    pub(super) fn ids(&self) -> impl Iterator<Item = TenantId> + use<P> {
        (0..self.tenants.len()).map(TenantId)
    }

    pub(super) fn get(&self, id: TenantId) -> &Tenant<P> {
        &self.tenants[id.0]
    }

    /// The tenant with this name, if it has something to do.
    pub(super) fn find(&self, name: &Namespace) -> Option<TenantId> {
        self.by_name.get(name).copied()
    }

    /// Sets the work of a burst, and updates the lowest account.
    pub(super) fn settle(&mut self, burst: u64) {
        self.burst = burst;
        let lowest = self.by_name.values().map(|id| self.tenants[id.0].served).min();
        self.clock = lowest.map_or(self.clock, |lowest| self.clock.max(lowest));
    }

    /// The account that decides the turn of a tenant.
    pub(super) fn account(&self, id: TenantId) -> u64 {
        let served = self.get(id).served;
        // A tenant that begins is a whole burst below, so it may interrupt.
        if self.turn == Some(id) { served.saturating_sub(self.burst.saturating_sub(1)) } else { served }
    }

    /// Adds the work of a step to a tenant's account; `first` when the step is mainly for this
    /// tenant.
    pub(super) fn charge(&mut self, id: TenantId, work: u64, first: bool) {
        self.tenants[id.0].served += work;
        if first {
            self.turn = Some(id);
        }
    }

    /// Adds a request, behind those of its tenant.
    pub(super) fn push(&mut self, queued: Queued<P>) -> TenantId {
        let id = self.enter(queued.request.namespace);
        self.tenants[id.0].waiting.push_back(queued);
        self.waiting += 1;
        id
    }

    /// Removes a waiting request, by its position in the queue of its tenant.
    pub(super) fn remove(&mut self, id: TenantId, index: usize) -> Option<Queued<P>> {
        let queued = self.tenants[id.0].waiting.remove(index)?;
        self.waiting -= 1;
        self.leave(id);
        Some(queued)
    }

    /// Puts back a request that was removed at `index` and could not be admitted.
    pub(super) fn put_back(&mut self, index: usize, queued: Queued<P>) {
        let id = self.enter(queued.request.namespace);
        let waiting = &mut self.tenants[id.0].waiting;
        waiting.insert(index.min(waiting.len()), queued);
        self.waiting += 1;
    }

    /// The position of a request in the queue of its tenant.
    pub(super) fn position(&self, id: TenantId, request: RequestId) -> Option<usize> {
        self.get(id).waiting.iter().position(|queued| queued.request.id == request)
    }

    /// Records that a request of a tenant got a seat.
    pub(super) fn admitted(&mut self, name: Namespace) -> TenantId {
        let id = self.enter(name);
        self.tenants[id.0].running += 1;
        id
    }

    /// Records that a running request has ended.
    pub(super) fn ended(&mut self, id: TenantId) {
        self.tenants[id.0].running -= 1;
        self.leave(id);
    }

    fn enter(&mut self, name: Namespace) -> TenantId {
        if let Some(id) = self.find(&name) {
            return id;
        }
        let id = self.unused.pop().unwrap_or_else(|| {
            self.tenants.push(Tenant { name: None, waiting: VecDeque::new(), running: 0, served: 0 });
            TenantId(self.tenants.len() - 1)
        });
        let begins = self.clock.saturating_sub(self.burst);
        let tenant = &mut self.tenants[id.0];
        tenant.name = Some(name);
        tenant.served = begins.max(self.owed.remove(&name).unwrap_or_default());
        self.by_name.insert(name, id);
        id
    }

    /// Forgets a tenant that has nothing to do.
    fn leave(&mut self, id: TenantId) {
        let tenant = &mut self.tenants[id.0];
        if !tenant.waiting.is_empty() || tenant.running > 0 {
            return;
        }
        let served = tenant.served;
        let Some(name) = tenant.name.take() else { return };
        self.by_name.remove(&name);
        self.unused.push(id);
        if self.turn == Some(id) {
            self.turn = None;
        }
        if self.by_name.is_empty() {
            self.clock = self.clock.max(served);
        }
        self.owed.insert(name, served);
        if self.owed.len() > MOST_OWED {
            let begins = self.clock.saturating_sub(self.burst);
            self.owed.retain(|_, served| *served > begins);
            if self.owed.len() > MOST_OWED {
                self.owed.clear();
            }
        }
    }
}
