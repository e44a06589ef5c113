//! A seat: what the scheduler keeps of the request that owns a slot.

use std::sync::Arc;

use beamline_kv_cache::{HostPage, PageId};

use super::tenants::TenantId;
use crate::{
    event::Usage,
    limits::{Demand, Limits},
    request::{PageAddress, Request},
    time::Micros,
};

/// One slot. The page tables keep their memory from request to request.
pub(super) struct Seat<P> {
    /// Pages of the context from position 0 on; those of the cached prefix are shared.
    pub(super) context_pages: Vec<PageId>,
    /// Pages of the branch rows, never shared.
    pub(super) branch_pages: Vec<PageId>,
    /// Host pages that follow the cached prefix and are not all back yet: number `i` belongs into
    /// the context page `published + i`. Held until a step that moved them has succeeded.
    pub(super) restoring: Vec<Arc<HostPage>>,
    /// `None` while the slot is free.
    pub(super) running: Option<Running<P>>,
}

/// A request that was admitted and has not ended.
pub(super) struct Running<P> {
    pub(super) request: Request<P>,
    pub(super) address: PageAddress,
    pub(super) demand: Demand,
    pub(super) tenant: TenantId,
    /// Rows that it was admitted for.
    pub(super) cost: u64,
    /// Work that it was admitted for.
    pub(super) work: u64,
    /// Work that is not done yet, as far as is known.
    pub(super) work_due: u64,
    /// Leading context positions that lie in pages, or will when what is being restored is back.
    pub(super) computed: usize,
    /// Leading pages that were offered to the prefix index, or came from it.
    pub(super) published: usize,
    /// Leading pages of `Seat::restoring` that were ordered back, and those that are known to be.
    pub(super) ordered: usize,
    pub(super) restored: usize,
    pub(super) stage: Stage,
    pub(super) usage: Usage,
    pub(super) queued_at: Micros,
    /// When it should be answered, see `order`.
    pub(super) goal: Micros,
    pub(super) admitted_at: Micros,
    pub(super) prefilled_at: Option<Micros>,
}

/// What a running request needs next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Context rows.
    Prefill,
    /// A branch step.
    Decode {
        /// Branch steps taken.
        taken: usize,
        /// Beams left to compute before they are expanded.
        rows: usize,
    },
}

/// What a step does for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepWork {
    /// Context rows up to `end`, the last of them expanded into this many beams.
    Context { rows: usize, end: usize, expand: Option<usize> },
    /// Rows of a branch step, and positions of the context that they attend to.
    Branch { rows: usize, context: usize },
}

impl<P> Default for Seat<P> {
    fn default() -> Self {
        Self { context_pages: Vec::new(), branch_pages: Vec::new(), restoring: Vec::new(), running: None }
    }
}

impl<P> Seat<P> {
    /// Pages that are not ordered back yet: while there are any, no row of the request can be
    /// computed.
    pub(super) fn left_to_order(&self) -> usize {
        self.restoring.len() - self.running().ordered
    }

    /// The request of a seat that is known to be taken: seats on the scheduler's lists are.
    pub(super) fn running(&self) -> &Running<P> {
        let Some(running) = &self.running else { unreachable!("a listed seat is taken") };
        running
    }

    /// The same, to change it.
    pub(super) fn running_mut(&mut self) -> &mut Running<P> {
        let Some(running) = &mut self.running else { unreachable!("a listed seat is taken") };
        running
    }
}

impl<P> Running<P> {
    /// The first context row to compute next. When all lie in pages, the last one has to be
    /// computed again, because the first expansion needs it.
    pub(super) fn next_row(&self) -> usize {
        assert_eq!(self.stage, Stage::Prefill);
        self.computed.min(self.demand.target - 1)
    }

    /// Context rows to compute before the request can go on.
    pub(super) fn rows_left(&self) -> usize {
        self.demand.target - self.next_row()
    }

    /// Steps to the end, if no context is cut.
    pub(super) fn steps_left(&self) -> u64 {
        let expansions = self.request.generated_steps;
        match self.stage {
            Stage::Prefill => expansions.max(1) as u64,
            Stage::Decode { taken, .. } => expansions.saturating_sub(1 + taken) as u64,
        }
    }
}

impl StepWork {
    /// How much it is.
    pub(super) fn amount(self, limits: &Limits) -> u64 {
        match self {
            Self::Context { rows, end, .. } => limits.context_work(end - rows..end),
            Self::Branch { rows, context } => limits.branch_work(rows, context),
        }
    }
}
