//! What of a request goes into a step, in the words of every family.
//!
//! Place in the flow: an executor names the rows of a plan with these; a family lays them out for its
//! kernels.

use std::ops::Range;

use beamline_compute::batch::BranchRows;
use beamline_kv_cache::PageId;

/// Rows that continue the context of a request.
#[derive(Clone, Debug)]
pub struct ContextPart<'a> {
    /// Slot of the request; only compared with the others of the step.
    pub owner: u32,
    /// Positions to compute.
    pub positions: Range<usize>,
    /// Positions below this one are in pages already.
    pub cached: usize,
    /// Context pages from position 0 on.
    pub pages: &'a [PageId],
    /// How many of the last rows' final states are wanted.
    pub wanted: usize,
}

/// Candidates of a request. Their final states are wanted.
#[derive(Clone, Debug)]
pub struct CandidateRows<'a> {
    /// Slot of the request.
    pub owner: u32,
    /// Numbers of the candidates.
    pub candidates: Range<usize>,
    /// All context pages.
    pub context_pages: &'a [PageId],
    /// Private pages, a row for each candidate of this call; what they held is overwritten.
    pub branch_pages: &'a [PageId],
}

/// Generated tokens of a request, one per beam. The final states of all are wanted.
#[derive(Clone, Copy, Debug)]
pub struct BeamRows<'a> {
    /// Slot of the request.
    pub owner: u32,
    /// Token of each beam.
    pub tokens: &'a [u32],
    /// Ancestors per row, the row itself last: d + 1 at step d.
    pub ancestors: usize,
    /// `ancestors` branch rows for each row.
    pub lineage: &'a [u32],
    /// All context pages.
    pub context_pages: &'a [PageId],
    /// Pages of the branch rows.
    pub branch_pages: &'a [PageId],
}

impl<'a> BeamRows<'a> {
    /// The same rows, behind a context of this number of positions.
    pub fn at(self, context_len: usize) -> BranchRows<'a> {
        let Self { owner, tokens, ancestors, lineage, context_pages, branch_pages } = self;
        BranchRows { owner, tokens, context_len, ancestors, lineage, context_pages, branch_pages }
    }
}
