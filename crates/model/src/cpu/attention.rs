//! Softmax attention over pages, for context rows and for branch rows.
//!
//! The keys a row sees are taken page by page in the order of absolute positions, with a running maximum and sum
//! (online softmax, Milakov and Gimelshein 2018). A branch row then merges its few ancestors the same way, which
//! is the log-sum-exp merge of two attention parts. Pages always begin at a multiple of [`PAGE_SIZE`], so a row
//! meets the same tiles in the same order whether its context was cached, cut into chunks, or computed at once:
//! this is why cached and uncached answers are equal bit for bit.
//!
//! Work is cut into tasks, one per [`Block`] of rows and key-value head. All query heads that share the key-value
//! head are rows of the same tile product.

use std::cell::RefCell;
use std::ops::Range;

use beamline_kv_cache::PageId;
use rayon::prelude::*;

use super::Cpu;
use super::isa::{Isa, per_isa};
use super::pages::{HeadPages, PAGE_SIZE, VALUE_BLOCK};
use super::tile::{PANEL, SharedMatrix, accumulate};
use super::vector::{LANES, dot, exp, fold_lanes, larger};

/// Most ancestors a branch row can have, itself included.
pub const MAX_ANCESTORS: usize = PAGE_SIZE;

/// Consecutive rows of one request that attend together, at most a page of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Context pages from position 0 on; a range of [`Tables::pages`].
    pub context_pages: Range<usize>,
    /// What the rows see.
    pub sees: Sees,
}

/// What the rows of a block see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sees {
    /// Context rows at consecutive positions from this one on, all in one page: each sees the positions up to its
    /// own.
    Causal {
        /// Position of the first row.
        first_position: usize,
    },
    /// Branch rows: the whole context, and their own ancestors.
    Branch {
        /// Positions of the context.
        context_len: usize,
        /// Ancestors per row, the row itself last.
        ancestors: usize,
        /// Start in [`Tables::lineage`]: `ancestors` branch rows for each row of the block.
        lineage: usize,
        /// The request's branch pages; a range of [`Tables::pages`].
        branch_pages: Range<usize>,
    },
}

/// The arenas that blocks point into.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Page tables.
    pub pages: &'a [PageId],
    /// Branch rows of ancestors: row `r` lies in branch page `r / PAGE_SIZE` at `r % PAGE_SIZE`.
    pub lineage: &'a [u32],
}

/// How heads lie in a row of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key-value heads; each serves `query / key_value` query heads in order.
    pub key_value: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a row `[query heads | key heads | value heads]`.
    pub fn qkv_width(self) -> usize {
        (self.query + 2 * self.key_value) * self.dim
    }
}

/// Attends with all blocks. `qkv` is `[rows, qkv_width]` with queries rotated; keys and values are read from
/// `pages`, where the rows' own were written before. `out` is `[rows, query heads * dim]`.
pub fn attend(
    cpu: &Cpu,
    heads: Heads,
    qkv: &[f32],
    pages: &[HeadPages],
    blocks: &[Block],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    let out = SharedMatrix::new(out, heads.query * heads.dim);
    let task = |index: usize| {
        let (block, index) = (&blocks[index / heads.key_value], index % heads.key_value);
        let head = Head { heads, index, pages: &pages[index] };
        SCRATCH.with_borrow_mut(|scratch| {
            attend_block(cpu.isa(), cpu.isa(), head, qkv, block, tables, scratch, out);
        });
    };
    cpu.run(|| (0..blocks.len() * heads.key_value).into_par_iter().for_each(task));
}

thread_local! {
    /// Reused by all tasks of a thread, so that the steady path does not allocate.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Running state of the queries of one task.
#[derive(Default)]
struct Scratch {
    /// `[query][dim]`, scaled by `1 / sqrt(dim)`.
    queries: Vec<f32>,
    /// `[query][value_width]`, the weighted sum of values so far.
    sums: Vec<f32>,
    /// `[query]`, the largest logit so far.
    maxima: Vec<f32>,
    /// `[query]`, the sum of exponentials so far.
    totals: Vec<f32>,
    /// `[ancestor][value_width]`.
    ancestor_values: Vec<f32>,
}

/// One key-value head with the query heads it serves.
#[derive(Clone, Copy)]
struct Head<'a> {
    heads: Heads,
    index: usize,
    pages: &'a HeadPages,
}

per_isa! {
    fn attend_block(isa: Isa, head: Head<'_>, qkv: &[f32], block: &Block, tables: Tables<'_>, scratch: &mut Scratch,
        out: SharedMatrix<'_>) = attend_block_body
}

#[inline(always)]
fn attend_block_body<const R: usize>(
    isa: Isa,
    head: Head<'_>,
    qkv: &[f32],
    block: &Block,
    tables: Tables<'_>,
    scratch: &mut Scratch,
    out: SharedMatrix<'_>,
) {
    let Head { heads, index: head, pages } = head;
    let (dim, group, value_width) = (heads.dim, heads.query / heads.key_value, pages.value_width());
    let queries = block.rows.len() * group;
    let scale = 1.0 / (dim as f32).sqrt();
    scratch.queries.clear();
    for row in block.rows.clone() {
        let start = row * heads.qkv_width() + head * group * dim;
        scratch.queries.extend(qkv[start..start + group * dim].iter().map(|q| q * scale));
    }
    scratch.sums.clear();
    scratch.sums.resize(queries * value_width, 0.0);
    scratch.maxima.clear();
    scratch.maxima.resize(queries, f32::NEG_INFINITY);
    scratch.totals.clear();
    scratch.totals.resize(queries, 0.0);

    let context_pages = &tables.pages[block.context_pages.clone()];
    match &block.sees {
        Sees::Causal { first_position } => {
            let page = first_position / PAGE_SIZE;
            for &full in &context_pages[..page] {
                see_page(isa, pages, full, |_| PAGE_SIZE, 0..queries, dim, scratch);
            }
            // The page the rows lie in: every row sees up to itself.
            let visible = |query: usize| first_position % PAGE_SIZE + query / group + 1;
            see_page(isa, pages, context_pages[page], visible, 0..queries, dim, scratch);
        }
        Sees::Branch { context_len, ancestors, lineage, branch_pages } => {
            for (page, &id) in context_pages[..context_len.div_ceil(PAGE_SIZE)].iter().enumerate() {
                let visible = PAGE_SIZE.min(context_len - page * PAGE_SIZE);
                see_page(isa, pages, id, |_| visible, 0..queries, dim, scratch);
            }
            let branch_pages = &tables.pages[branch_pages.clone()];
            for row in 0..block.rows.len() {
                let lineage = &tables.lineage[lineage + row * ancestors..][..*ancestors];
                see_ancestors(
                    isa,
                    pages,
                    branch_pages,
                    lineage,
                    row * group..(row + 1) * group,
                    dim,
                    scratch,
                );
            }
        }
    }

    for (index, row) in block.rows.clone().enumerate() {
        // SAFETY: a task writes the columns of its own head in its own rows, and no two tasks share both.
        let out = unsafe { out.row_segment(row, head * group * dim, group * dim) };
        for (member, out) in out.chunks_exact_mut(dim).enumerate() {
            let query = index * group + member;
            let sums = &scratch.sums[query * value_width..][..dim];
            let total = scratch.totals[query];
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum / total;
            }
        }
    }
}

/// A range of queries sees the first keys of a context page, each as many as `visible` says, which never falls from one
/// query to the next.
#[inline(always)]
fn see_page(
    isa: Isa,
    pages: &HeadPages,
    page: PageId,
    visible: impl Fn(usize) -> usize,
    queries: Range<usize>,
    dim: usize,
    scratch: &mut Scratch,
) {
    let (keys, values) = (pages.context_keys(page), pages.values(page));
    for first in queries.clone().step_by(TALLEST) {
        let height = TALLEST.min(queries.end - first);
        let mut logits = [[0.0; PAGE_SIZE]; TALLEST];
        let logits = &mut logits[..height];
        multiply_rows(
            isa,
            &scratch.queries[first * dim..],
            dim,
            dim,
            keys,
            PAGE_SIZE,
            PAGE_SIZE,
            logits.as_flattened_mut(),
            PAGE_SIZE,
        );
        merge::<PAGE_SIZE>(
            isa,
            logits,
            values,
            |member| visible(first + member),
            first,
            pages.value_width(),
            scratch,
        );
    }
}

/// The queries of one branch row see the row's ancestors.
#[inline(always)]
fn see_ancestors(
    isa: Isa,
    pages: &HeadPages,
    branch_pages: &[PageId],
    lineage: &[u32],
    queries: Range<usize>,
    dim: usize,
    scratch: &mut Scratch,
) {
    let row = |&row: &u32| pages.branch_row(branch_pages[row as usize / PAGE_SIZE], row as usize % PAGE_SIZE);
    let mut values = std::mem::take(&mut scratch.ancestor_values);
    values.clear();
    for ancestor in lineage {
        values.extend_from_slice(row(ancestor).1);
    }
    for query in queries {
        let mut logits = [[0.0; PAGE_SIZE]];
        for (logit, ancestor) in logits[0].iter_mut().zip(lineage) {
            *logit = dot(&scratch.queries[query * dim..][..dim], row(ancestor).0);
        }
        // The lanes of keys that do not exist add zeros, so fewer of them give the same bits.
        let visible = |_| lineage.len();
        if lineage.len() <= LANES {
            merge::<LANES>(isa, &mut logits, &values, visible, query, pages.value_width(), scratch);
        } else {
            merge::<PAGE_SIZE>(isa, &mut logits, &values, visible, query, pages.value_width(), scratch);
        }
    }
    scratch.ancestor_values = values;
}

/// Merges keys, given by their logits and values `[key][value_width]`, into the running state of a few queries, of which
/// each sees the first `visible`; the last of them sees the most. At most `WIDTH` keys are visible.
#[inline(always)]
fn merge<const WIDTH: usize>(
    isa: Isa,
    logits: &mut [[f32; PAGE_SIZE]],
    values: &[f32],
    visible: impl Fn(usize) -> usize,
    first_query: usize,
    value_width: usize,
    scratch: &mut Scratch,
) {
    for (member, weights) in logits.iter_mut().enumerate() {
        let query = first_query + member;
        // What is not visible weighs nothing: e^-inf is 0.
        for weight in &mut weights[visible(member)..] {
            *weight = f32::NEG_INFINITY;
        }
        let mut lanes = [scratch.maxima[query]; LANES];
        let chunks = weights[..WIDTH].as_chunks_mut::<LANES>().0;
        for chunk in chunks.iter() {
            for lane in 0..LANES {
                lanes[lane] = larger(chunk[lane], lanes[lane]);
            }
        }
        let max = fold_lanes(lanes, larger);
        let mut totals = [0.0; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                chunk[lane] = exp(chunk[lane] - max);
                totals[lane] += chunk[lane];
            }
        }
        let decay = exp(scratch.maxima[query] - max);
        let total = fold_lanes(totals, |a, b| a + b);
        scratch.totals[query] = scratch.totals[query].mul_add(decay, total);
        scratch.maxima[query] = max;
        for sum in &mut scratch.sums[query * value_width..][..value_width] {
            *sum *= decay;
        }
    }
    // Only values that some query sees are touched: what lies behind them may belong to nobody. Those that a query does not see
    // add zero.
    let visible = visible(logits.len() - 1);
    for column in (0..value_width).step_by(PANEL) {
        multiply_rows(
            isa,
            logits.as_flattened(),
            PAGE_SIZE,
            visible,
            &values[column..],
            value_width,
            PANEL.min(value_width - column),
            &mut scratch.sums[first_query * value_width + column..]
                [..(logits.len() - 1) * value_width + PANEL.min(value_width - column)],
            value_width,
        );
    }
}

/// Most rows of [`multiply_rows`].
const TALLEST: usize = 8;

per_isa! {
    /// Adds to `sums`, rows `sums_stride` apart, the products of as many rows of `inner` values, `stride` apart, and `inner`
    /// rows of `columns` values (a panel or half of one), `panel_stride` apart.
    ///
    /// A function of its own, never inlined, so that the sums stay in registers.
    fn multiply_rows(rows: &[f32], stride: usize, inner: usize, panel: &[f32], panel_stride: usize, columns: usize,
        sums: &mut [f32], sums_stride: usize) = multiply_rows_body
}

#[inline(always)]
fn multiply_rows_body<const R: usize>(
    rows: &[f32],
    stride: usize,
    inner: usize,
    panel: &[f32],
    panel_stride: usize,
    columns: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let mut row = 0;
    let mut left = sums.len().div_ceil(sums_stride);
    macro_rules! take {
        ($height:literal) => {
            while left >= $height && ($height <= 2 || R > 2) {
                let (rows, sums) = (&rows[row * stride..], &mut sums[row * sums_stride..]);
                if columns == PANEL {
                    run::<$height, PANEL>(rows, stride, inner, panel, panel_stride, sums, sums_stride);
                } else {
                    run::<$height, VALUE_BLOCK>(rows, stride, inner, panel, panel_stride, sums, sums_stride);
                }
                row += $height;
                left -= $height;
            }
        };
    }
    take!(8);
    take!(4);
    take!(2);
    take!(1);
}

#[inline(always)]
fn run<const H: usize, const W: usize>(
    rows: &[f32],
    stride: usize,
    inner: usize,
    panel: &[f32],
    panel_stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let mut tile = [[0.0f32; W]; H];
    for (row, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&sums[row * sums_stride..][..W]);
    }
    accumulate(rows, stride, inner, panel, panel_stride, &mut tile);
    for (row, tile) in tile.iter().enumerate() {
        sums[row * sums_stride..][..W].copy_from_slice(tile);
    }
}
