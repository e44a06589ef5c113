//! Pointwise attention of one strip of rows with some of the heads.
//!
//! Page by page, and for each page head by head: products with the keys on top of the bias, SiLU, and
//! the weighted values.

use std::cell::RefCell;
use std::ops::Range;

use beamline_kv_cache::PageId;

use super::bias::{self, Keys, Viewers};
use super::{Call, Shape};
use crate::cpu::attention::{Block, Sees};
use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::mask::Viewer;
use crate::cpu::pages::{HeadPages, PAGE_SIZE};
use crate::cpu::stored::Stored;
use crate::cpu::tile::{COLUMNS, Product, SharedMatrix, Strided, rows_at_once};
use crate::cpu::vector::{dot, silu, silu_in_place};

thread_local! {
    /// Reused by all tasks of a thread, so that the steady path does not allocate.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// Scaled queries, `[head][row][key_dim]`.
    queries: Vec<f32>,
    /// Weighted sums of values, `[head][row][value_width]`.
    sums: Vec<f32>,
    /// `[row][PAGE_SIZE]`, the bias of the page at hand.
    bias: Vec<[f32; PAGE_SIZE]>,
    /// `[row][PAGE_SIZE]`, the weights of its keys for the head at hand.
    weights: Vec<[f32; PAGE_SIZE]>,
    /// `[row]`, the keys of the page at hand that are seen.
    visible: Vec<u32>,
    /// `[row]`, the time of the prediction: that of the next event, of the query after the last.
    times: Vec<i64>,
}

/// One strip, and the heads that are computed together.
#[derive(Clone, Copy)]
struct Task<'a, T> {
    isa: Isa,
    call: &'a Call<'a>,
    /// Heads of the layer.
    pages: &'a [HeadPages<T>],
    strip: &'a Block,
    first_head: usize,
    heads: usize,
    context_len: usize,
    /// Times of the context's positions, and of the query.
    times: &'a [i64],
    /// Position of the first row.
    position: usize,
    /// Rows stand at consecutive positions (context), or all at the same (branches).
    step: usize,
}

/// Attends with one strip and some heads. No two calls at a time may share both.
pub(super) fn attend<T: Stored>(
    isa: Isa,
    call: &Call<'_>,
    pages: &[HeadPages<T>],
    strip: &Block,
    heads: Range<usize>,
    out: SharedMatrix<'_>,
) {
    let task = Task::new(isa, call, pages, strip, heads);
    SCRATCH.with_borrow_mut(|scratch| {
        task.begin(scratch);
        for (page, &id) in task.pages().iter().enumerate() {
            task.see_page(page, id, scratch);
        }
        see_ancestors(isa, task, scratch);
        finish(isa, task, &scratch.sums, out);
    });
}

impl<'a, T: Stored> Task<'a, T> {
    fn new(
        isa: Isa,
        call: &'a Call<'a>,
        pages: &'a [HeadPages<T>],
        strip: &'a Block,
        heads: Range<usize>,
    ) -> Self {
        let sequence = &call.sequences.all[call.sequences.of_row[strip.rows.start] as usize];
        let (position, step) = match strip.sees {
            Sees::Causal { first_position } => (first_position, 1),
            Sees::Branch { ancestors, context_len, .. } => (context_len + ancestors - 1, 0),
        };
        Self {
            isa,
            call,
            pages,
            strip,
            first_head: heads.start,
            heads: heads.len(),
            context_len: sequence.context_len,
            times: &call.sequences.times[sequence.times.clone()],
            position,
            step,
        }
    }

    fn rows(&self) -> usize {
        self.strip.rows.len()
    }

    fn value_width(&self) -> usize {
        self.pages[0].value_width()
    }

    /// Context pages that some row sees something of.
    fn pages(&self) -> &'a [PageId] {
        let all = &self.call.tables.pages[self.strip.context_pages.clone()];
        match self.strip.sees {
            Sees::Causal { first_position } => {
                let last = first_position + self.rows() - 1;
                &all[..self.call.mask.pages(self.context_len, last, first_position)]
            }
            Sees::Branch { context_len, .. } => &all[..context_len.div_ceil(PAGE_SIZE)],
        }
    }

    fn begin(&self, scratch: &mut Scratch) {
        let rows = self.rows();
        gather(self.isa, *self, &mut scratch.queries);
        scratch.sums.clear();
        scratch.sums.resize(self.heads * rows * self.value_width(), 0.0);
        scratch.bias.clear();
        scratch.bias.resize(rows, [0.0; PAGE_SIZE]);
        scratch.weights.resize(rows, [0.0; PAGE_SIZE]);
        scratch.visible.resize(rows, 0);
        scratch.times.clear();
        if self.call.bias.is_some() {
            let next = |row: usize| (self.position + row * self.step + 1).min(self.context_len);
            scratch.times.extend((0..rows).map(|row| self.times[next(row)]));
        }
    }

    /// All rows and heads see a page of the context.
    fn see_page(&self, page: usize, id: PageId, scratch: &mut Scratch) {
        for (row, visible) in scratch.visible.iter_mut().enumerate() {
            let viewer = match self.strip.sees {
                Sees::Causal { first_position } => Viewer::Context { position: first_position + row },
                Sees::Branch { .. } => Viewer::Branch,
            };
            *visible = self.call.mask.page(self.context_len, viewer, page);
        }
        // Rows before the page see nothing of it.
        let Some(first) = scratch.visible.iter().position(|&visible| visible != 0) else { return };
        if let Some(bias) = self.call.bias {
            let start = page * PAGE_SIZE;
            let end = self.context_len.min(start + PAGE_SIZE);
            let keys = Keys { first: start, times: &self.times[start..end] };
            let times = &scratch.times[first..];
            let rows = Viewers { first: self.position + first * self.step, step: self.step, times };
            bias::fill(self.isa, bias, rows, keys, &mut scratch.bias[first..]);
        }
        let mut start = first;
        while start < self.rows() {
            let (end, seen) = self.rows_that_see_alike(&scratch.visible, start);
            if seen > 0 {
                for head in 0..self.heads {
                    self.see_keys(id, head, start..end, seen, scratch);
                }
            }
            start = end;
        }
    }

    /// The end of the rows from `start` on whose last seen key is the same, in whole tiles; and how
    /// many keys that is. They are multiplied together.
    fn rows_that_see_alike(&self, visible: &[u32], start: usize) -> (usize, usize) {
        let tile = |start: usize| start..visible.len().min(start + rows_at_once(self.isa));
        let mut end = tile(start).end;
        let seen = last_seen(&visible[start..end]);
        while end < visible.len() && last_seen(&visible[tile(end)]) == seen {
            end = tile(end).end;
        }
        (end, seen)
    }

    /// Some rows see the first `seen` keys of a page, with one head.
    fn see_keys(&self, id: PageId, head: usize, rows: Range<usize>, seen: usize, scratch: &mut Scratch) {
        let (shape, pages) = (self.call.shape, &self.pages[self.first_head + head]);
        let (first, value_width) = (head * self.rows() + rows.start, self.value_width());
        let weights = &mut scratch.weights[rows.clone()];
        weights.copy_from_slice(&scratch.bias[rows.clone()]);
        let products = Product {
            rows: Strided { values: &scratch.queries[first * shape.key_dim..], stride: shape.key_dim },
            panel: Strided { values: pages.context_keys(id), stride: PAGE_SIZE },
            height: rows.len(),
            inner: shape.key_dim,
            // Near the diagonal the second half of the keys is not seen.
            columns: seen.next_multiple_of(COLUMNS),
        };
        products.add_to(self.isa, weights.as_flattened_mut(), PAGE_SIZE);
        silu_in_place(self.isa, weights.as_flattened_mut());
        hide(self.isa, &scratch.visible[rows.clone()], weights);
        let weighted = Product {
            rows: Strided { values: weights.as_flattened(), stride: PAGE_SIZE },
            panel: Strided { values: pages.values(id), stride: value_width },
            height: rows.len(),
            inner: seen,
            columns: value_width,
        };
        weighted.add_to(self.isa, &mut scratch.sums[first * value_width..], value_width);
    }
}

/// Keys up to the last that any of these rows sees.
fn last_seen(visible: &[u32]) -> usize {
    PAGE_SIZE - visible.iter().fold(0, |all, bits| all | bits).leading_zeros() as usize
}

per_isa! {
    /// Copies the queries of all heads and rows together.
    fn gather<T: Stored>(task: Task<'_, T>, queries: &mut Vec<f32>) = gather_body
}

#[inline(always)]
fn gather_body<const R: usize, T: Stored>(task: Task<'_, T>, queries: &mut Vec<f32>) {
    let Shape { key_dim, row_width, query_column, logit_scale, .. } = task.call.shape;
    queries.clear();
    for head in task.first_head..task.first_head + task.heads {
        for row in task.strip.rows.clone() {
            let start = row * row_width + query_column + head * key_dim;
            queries.extend(task.call.rows[start..start + key_dim].iter().map(|q| q * logit_scale));
        }
    }
}

per_isa! {
    /// Keys that a row does not see weigh nothing for it.
    fn hide(visible: &[u32], weights: &mut [[f32; PAGE_SIZE]]) = hide_body
}

#[inline(always)]
fn hide_body<const R: usize>(visible: &[u32], weights: &mut [[f32; PAGE_SIZE]]) {
    for (weights, &visible) in weights.iter_mut().zip(visible) {
        if visible != u32::MAX {
            let mut seen = *weights;
            for (key, weight) in seen.iter_mut().enumerate() {
                *weight = if visible >> key & 1 == 1 { *weight } else { 0.0 };
            }
            *weights = seen;
        }
    }
}

per_isa! {
    /// A branch row sees its ancestors, itself last. All of them are as old as the query.
    fn see_ancestors<T: Stored>(task: Task<'_, T>, scratch: &mut Scratch) = see_ancestors_body
}

#[inline(always)]
fn see_ancestors_body<const R: usize, T: Stored>(task: Task<'_, T>, scratch: &mut Scratch) {
    let Sees::Branch { ancestors, lineage, ref branch_pages, .. } = task.strip.sees else { return };
    let (tables, Shape { key_dim, value_dim, .. }) = (task.call.tables, task.call.shape);
    let branch_pages = &tables.pages[branch_pages.clone()];
    let (rows, value_width) = (task.rows(), task.value_width());
    let bias = |generation: usize| {
        task.call
            .bias
            .map_or(0.0, |bias| bias.of(task.position, task.position + 1 + generation - ancestors, 0))
    };
    for row in 0..rows {
        let lineage = &tables.lineage[lineage + row * ancestors..][..ancestors];
        for head in 0..task.heads {
            let pages = &task.pages[task.first_head + head];
            let query = &scratch.queries[(head * rows + row) * key_dim..][..key_dim];
            let sums = &mut scratch.sums[(head * rows + row) * value_width..][..value_dim];
            for (generation, &ancestor) in lineage.iter().enumerate() {
                let ancestor = ancestor as usize;
                let (key, value) = pages.branch_row(branch_pages[ancestor / PAGE_SIZE], ancestor % PAGE_SIZE);
                let weight = silu(dot(query, key) + bias(generation));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = weight.mul_add(value.widen(), *sum);
                }
            }
        }
    }
}

per_isa! {
    /// Writes what was found. As for [`attend`], no two calls at a time may share strip and heads.
    fn finish<T: Stored>(task: Task<'_, T>, sums: &[f32], out: SharedMatrix<'_>) = finish_body
}

#[inline(always)]
fn finish_body<const R: usize, T: Stored>(task: Task<'_, T>, sums: &[f32], out: SharedMatrix<'_>) {
    let Shape { value_dim, divisor, .. } = task.call.shape;
    let (rows, value_width) = (task.rows(), task.value_width());
    for head in 0..task.heads {
        for row in 0..rows {
            let column = (task.first_head + head) * value_dim;
            // SAFETY: a task writes the columns of its own heads in its own rows, and no two tasks
            // share both.
            let out = unsafe { out.row_segment(task.strip.rows.start + row, column, value_dim) };
            let sums = &sums[(head * rows + row) * value_width..][..value_dim];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum / divisor;
            }
        }
    }
}
