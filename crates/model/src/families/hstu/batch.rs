//! Rows of one step of an HSTU model: already embedded, laid out as any family's, with the times of
//! their contexts.
//!
//! Place in the flow: [`Hstu`](super::Hstu) embeds the rows of each request of a step into it, one
//! request after the other; the [`Stack`](super::stack::Stack) runs it.
//!
//! Invariant: every row belongs to one sequence, and sequences never share times.

use beamline_compute::batch::{Batch, BranchRows, ContextRows};
use beamline_compute::cpu::pointwise::{Sequence, Sequences};

/// Rows of a step. All vectors are reused.
#[derive(Debug, Default)]
pub struct HstuBatch {
    /// Blocks, page tables, destinations, and which rows are wanted. Its tokens are ids, which only
    /// people read.
    pub layout: Batch,
    /// `[rows, model_dim]`, the rows before the first layer.
    pub embedded: Vec<f32>,
    of_row: Vec<u32>,
    sequences: Vec<Sequence>,
    times: Vec<i64>,
}

/// The context of the request that rows belong to.
#[derive(Clone, Copy, Debug)]
pub struct ContextOf<'a> {
    /// Positions of the whole context, computed or not.
    pub len: usize,
    /// Times of all positions and of the query, `len + 1` of them; empty if no layer has a relative bias.
    pub times: &'a [i64],
}

impl HstuBatch {
    /// Makes the batch empty for another step, and keeps its memory.
    pub fn clear(&mut self) {
        self.clear_part();
        self.layout.clear();
    }

    /// Makes the batch empty for another part of the same step.
    pub fn clear_part(&mut self) {
        self.layout.clear_part();
        self.embedded.clear();
        self.of_row.clear();
        self.sequences.clear();
        self.times.clear();
    }

    /// Adds context rows whose embeddings were appended to [`HstuBatch::embedded`].
    pub fn push_context(&mut self, rows: ContextRows<'_>, context: ContextOf<'_>) {
        self.begin(rows.tokens.len(), context);
        self.layout.push_context(rows);
    }

    /// Adds branch rows whose embeddings were appended to [`HstuBatch::embedded`].
    pub fn push_branches(&mut self, rows: BranchRows<'_>, context: ContextOf<'_>) {
        self.begin(rows.tokens.len(), context);
        self.layout.push_branches(rows);
    }

    fn begin(&mut self, rows: usize, context: ContextOf<'_>) {
        assert!(
            context.times.is_empty() || context.times.len() == context.len + 1,
            "a time for every position"
        );
        let start = self.times.len();
        self.times.extend_from_slice(context.times);
        let times = start..self.times.len();
        self.of_row.extend(std::iter::repeat_n(self.sequences.len() as u32, rows));
        self.sequences.push(Sequence { context_len: context.len, times });
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.layout.rows()
    }

    /// Whose rows they are.
    pub(super) fn sequences(&self) -> Sequences<'_> {
        Sequences { of_row: &self.of_row, all: &self.sequences, times: &self.times }
    }
}
