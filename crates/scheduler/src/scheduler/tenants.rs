//! Who waits, and what each tenant had: tenants share the model by the work done for them.
//!
//! Every tenant has a queue of its own and an account of its work. The tenant with the lowest account
//! is served first. So two tenants that always wait get equally much. A tenant that seldom asks
//! is served at the next step, however long the queue of another is.
//!
//! - A tenant that was away begins a *burst* below the lowest account. It is served at once, and may
//!   finish a request of that size. It begins no lower than it left, so going away gains nothing.
//! - The tenant that was served last goes on until its account is a burst above another. So requests
//!   that can be finished are not interleaved.
//!
//! What this must not know: which request of a tenant is served first; see `order`.

use std::collections::{HashMap, VecDeque};

use beamline_kv_cache::Namespace;

use crate::{
    limits::Demand,
    request::{PageAddress, Request, RequestId},
    time::Micros,
};

/// Most accounts that are kept of tenants that have nothing to do. Tenants are named by clients.
const MOST_OWED: usize = 4096;

/// A request that waits for admission.
pub(super) struct Queued<P> {
    pub(super) request: Request<P>,
    pub(super) address: PageAddress,
    pub(super) demand: Demand,
    pub(super) queued_at: Micros,
    /// When it should be answered, see `order`.
    pub(super) goal: Micros,
}

/// A tenant that has something to do: an index, dense and small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TenantId(usize);

impl TenantId {
    /// Below the number of [`Tenants::ids`].
    pub(super) fn index(self) -> usize {
        self.0
    }
}

pub(super) struct Tenant<P> {
    name: Option<Namespace>,
    /// In the order of arrival.
    pub(super) waiting: VecDeque<Queued<P>>,
    /// Requests in seats.
    pub(super) running: usize,
    /// The account.
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
    /// Rows of a burst.
    burst: u64,
    /// The lowest account of those that have something to do, or had last.
    clock: u64,
    /// Accounts of tenants that went away. Those that would begin where a new one begins are
    /// forgotten when there are too many.
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
            // So that the first may begin a burst below.
            clock: 1 << 32,
            owed: HashMap::new(),
        }
    }
}

impl<P> Tenants<P> {
    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Every tenant, those without anything to do among them, in an order that depends on nothing
    /// but the calls before.
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

    /// Says how much work a burst is, and where the lowest account is.
    pub(super) fn settle(&mut self, burst: u64) {
        self.burst = burst;
        let lowest = self.by_name.values().map(|id| self.tenants[id.0].served).min();
        self.clock = lowest.map_or(self.clock, |lowest| self.clock.max(lowest));
    }

    /// The account of a tenant, as it counts for whose turn it is.
    pub(super) fn account(&self, id: TenantId) -> u64 {
        let served = self.get(id).served;
        // A tenant that begins may interrupt: it is a whole burst below.
        if self.turn == Some(id) { served.saturating_sub(self.burst.saturating_sub(1)) } else { served }
    }

    /// Work of a step for a tenant; `first` when the step is for it above all.
    pub(super) fn charge(&mut self, id: TenantId, work: u64, first: bool) {
        self.tenants[id.0].served += work;
        if first {
            self.turn = Some(id);
        }
    }

    /// Takes a request in, behind those of its tenant.
    pub(super) fn push(&mut self, queued: Queued<P>) -> TenantId {
        let id = self.enter(queued.request.namespace);
        self.tenants[id.0].waiting.push_back(queued);
        self.waiting += 1;
        id
    }

    /// Takes a waiting request out, by its place in the queue of its tenant.
    pub(super) fn remove(&mut self, id: TenantId, index: usize) -> Option<Queued<P>> {
        let queued = self.tenants[id.0].waiting.remove(index)?;
        self.waiting -= 1;
        self.leave(id);
        Some(queued)
    }

    /// Gives a request back that was taken out at `index` and could not be admitted.
    pub(super) fn put_back(&mut self, index: usize, queued: Queued<P>) {
        let id = self.enter(queued.request.namespace);
        let waiting = &mut self.tenants[id.0].waiting;
        waiting.insert(index.min(waiting.len()), queued);
        self.waiting += 1;
    }

    /// The place of a request in the queue of its tenant.
    pub(super) fn position(&self, id: TenantId, request: RequestId) -> Option<usize> {
        self.get(id).waiting.iter().position(|queued| queued.request.id == request)
    }

    /// A request of a tenant got a seat.
    pub(super) fn admitted(&mut self, name: Namespace) -> TenantId {
        let id = self.enter(name);
        self.tenants[id.0].running += 1;
        id
    }

    /// A running request has ended.
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
