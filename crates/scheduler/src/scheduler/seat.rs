//! A seat: the scheduler's state of the request that owns a slot.

use std::sync::Arc;

use beamline_kv_cache::{HostPage, PageId};

use super::tenants::TenantId;
use crate::{
    event::Usage,
    limits::{Demand, Limits},
    request::{PageAddress, Request},
    time::Micros,
};

/// The state of one slot. The page tables keep their memory from request to request.
pub(super) struct Seat<P> {
    /// Pages of the context from position 0 on; those of the cached prefix are shared.
    pub(super) context_pages: Vec<PageId>,
    /// Pages of the branch rows, never shared.
    pub(super) branch_pages: Vec<PageId>,
    /// Host pages that follow the cached prefix and are not all back yet. Number `i` belongs into
    /// the context page `published + i`. Held until a step that moved them has succeeded.
    pub(super) restoring: Vec<Arc<HostPage>>,
    /// The request in the slot; `None` while the slot is free.
    pub(super) running: Option<Running<P>>,
}

/// A request that was admitted and has not ended.
pub(super) struct Running<P> {
    pub(super) request: Request<P>,
    pub(super) address: PageAddress,
    pub(super) demand: Demand,
    pub(super) tenant: TenantId,
    /// Rows for which the request was admitted.
    pub(super) cost: u64,
    /// Work for which the request was admitted.
    pub(super) work: u64,
    /// Work that is not done yet, as far as is known.
    pub(super) work_due: u64,
    /// Leading context positions that lie in pages, or will once the restored pages are back.
    pub(super) computed: usize,
    /// Leading pages that were offered to the prefix index, or came from it.
    pub(super) published: usize,
    /// Leading pages of `Seat::restoring` that were ordered back, and how many are known to be
    /// back.
    pub(super) ordered: usize,
    pub(super) restored: usize,
    pub(super) stage: Stage,
    pub(super) usage: Usage,
    pub(super) queued_at: Micros,
    /// When the request should be answered, see `order`.
    pub(super) goal: Micros,
    pub(super) admitted_at: Micros,
    pub(super) prefilled_at: Option<Micros>,
}

/// The next kind of work of a running request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Context rows are still to be computed.
    Prefill,
    /// The next rows are those of a branch step.
    Decode {
        /// Number of branch steps taken.
        taken: usize,
        /// Beams still to compute before they are expanded.
        rows: usize,
    },
}

/// The work of a step for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepWork {
    /// Context rows up to `end`, the last of which is expanded into `expand` beams.
    Context { rows: usize, end: usize, expand: Option<usize> },
    /// Rows of a branch step, and the number of context positions that they attend to.
    Branch { rows: usize, context: usize },
}

impl<P> Default for Seat<P> {
    fn default() -> Self {
        Self { context_pages: Vec::new(), branch_pages: Vec::new(), restoring: Vec::new(), running: None }
    }
}

impl<P> Seat<P> {
    /// Number of pages that are not ordered back yet. While it is not 0, no row of the request can
    /// be computed.
    pub(super) fn left_to_order(&self) -> usize {
        self.restoring.len() - self.running().ordered
    }

    /// The request of a seat that is known to be taken: seats on the scheduler's lists are.
    pub(super) fn running(&self) -> &Running<P> {
        let Some(running) = &self.running else { unreachable!("a listed seat is taken") };
        running
    }

    /// Mutable access to [`Seat::running()`].
    pub(super) fn running_mut(&mut self) -> &mut Running<P> {
        let Some(running) = &mut self.running else { unreachable!("a listed seat is taken") };
        running
    }
}

impl<P> Running<P> {
    /// The next context row to compute. When all rows lie in pages, the last one is computed again,
    /// because the first expansion needs it.
    pub(super) fn next_row(&self) -> usize {
        assert_eq!(self.stage, Stage::Prefill);
        self.computed.min(self.demand.target - 1)
    }

    /// Number of context rows to compute before the request can go on.
    pub(super) fn rows_left(&self) -> usize {
        self.demand.target - self.next_row()
    }

    /// Number of steps to the end, if no context is cut.
    pub(super) fn steps_left(&self) -> u64 {
        let expansions = self.request.generated_steps;
        match self.stage {
            Stage::Prefill => expansions.max(1) as u64,
            Stage::Decode { taken, .. } => expansions.saturating_sub(1 + taken) as u64,
        }
    }
}

impl StepWork {
    /// The amount of work.
    pub(super) fn amount(self, limits: &Limits) -> u64 {
        match self {
            Self::Context { rows, end, .. } => limits.context_work(end - rows..end),
            Self::Branch { rows, context } => limits.branch_work(rows, context),
        }
    }
}
