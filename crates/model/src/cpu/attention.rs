//! Softmax attention over pages, for context rows and for branch rows.
//!
//! The keys a row sees are taken page by page in the order of absolute positions, with a running
//! maximum and sum (online softmax, Milakov and Gimelshein 2018). A branch row then merges its few
//! ancestors the same way, which is the log-sum-exp merge of two attention parts. Pages always
//! begin at a multiple of [`PAGE_SIZE`], so a row meets the same tiles in the same order whether
//! its context was cached, cut into chunks, or computed at once: this is why cached and uncached
//! answers are equal bit for bit.
//!
//! Work is cut into tasks, one per [`Block`] of rows and key-value head. All query heads that share
//! the key-value head are rows of the same tile product.

use std::cell::RefCell;
use std::ops::Range;

use beamline_kv_cache::PageId;

use super::Cpu;
use super::isa::{Isa, per_isa};
use super::pages::{HeadPages, PAGE_SIZE, VALUE_BLOCK};
use super::tile::{COLUMNS, MOST_ROWS, Product, SharedMatrix, Strided, rows_at_once};
use super::vector::{LANES, dot, exp, fold_lanes, larger};

/// Most ancestors a branch row can have, itself included.
pub const MAX_ANCESTORS: usize = PAGE_SIZE;

/// Consecutive rows of one request that attend together, at most a page of them (`pointwise` joins
/// several).
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
    /// Context rows at consecutive positions from this one on, all in one page: each sees the
    /// positions up to its own.
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

/// Attends with all blocks. `qkv` is `[rows, qkv_width]` with queries rotated; keys and values are
/// read from `pages`, where the rows' own were written before. `out` is `[rows, query heads *
/// dim]`.
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
    cpu.each(blocks.len() * heads.key_value, 1, task);
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
            let lineages = Lineages {
                pages: &tables.pages[branch_pages.clone()],
                rows: &tables.lineage[*lineage..][..block.rows.len() * ancestors],
                ancestors: *ancestors,
            };
            see_ancestors(pages, lineages, group, queries, dim, scratch);
        }
    }

    for (index, row) in block.rows.clone().enumerate() {
        // SAFETY: a task writes the columns of its own head in its own rows, and no two tasks share
        // both.
        let out = unsafe { out.row_segment(row, head * group * dim, group * dim) };
        for (member, out) in out.chunks_exact_mut(dim).enumerate() {
            let query = index * group + member;
            let (sums, total) = (&scratch.sums[query * value_width..][..dim], scratch.totals[query]);
            let (full, rest) = out.as_chunks_mut::<VALUE_BLOCK>();
            let (full_sums, rest_sums) = sums.as_chunks::<VALUE_BLOCK>();
            for (out, sums) in full.iter_mut().zip(full_sums) {
                let mut weighted = *sums;
                for sum in &mut weighted {
                    *sum /= total;
                }
                *out = weighted;
            }
            for (out, sum) in rest.iter_mut().zip(rest_sums) {
                *out = sum / total;
            }
        }
    }
}

/// A range of queries sees the first keys of a context page, each as many as `visible` says, which
/// never falls from one query to the next.
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
    let (tallest, value_width) = (rows_at_once(isa), pages.value_width());
    for first in queries.clone().step_by(tallest) {
        let height = tallest.min(queries.end - first);
        let mut logits = [[0.0; PAGE_SIZE]; MOST_ROWS];
        let logits = &mut logits[..height];
        // Only values that some query sees are touched: what lies behind them may belong to nobody.
        // Those that a query does not see add zero. The last query sees the most.
        let seen = visible(first + height - 1);
        let products = Product {
            rows: Strided { values: &scratch.queries[first * dim..], stride: dim },
            panel: Strided { values: keys, stride: PAGE_SIZE },
            height,
            inner: dim,
            columns: seen.next_multiple_of(COLUMNS),
        };
        products.add_to(isa, logits.as_flattened_mut(), PAGE_SIZE);
        if seen <= LANES {
            weigh::<LANES>(logits, |member| visible(first + member), first, value_width, scratch);
        } else {
            weigh::<PAGE_SIZE>(logits, |member| visible(first + member), first, value_width, scratch);
        }
        let weighted = Product {
            rows: Strided { values: logits.as_flattened(), stride: PAGE_SIZE },
            panel: Strided { values, stride: value_width },
            height,
            inner: seen,
            columns: value_width,
        };
        weighted.add_to(isa, &mut scratch.sums[first * value_width..], value_width);
    }
}

/// The ancestors of the rows of a block.
#[derive(Clone, Copy)]
struct Lineages<'a> {
    /// Branch pages.
    pages: &'a [PageId],
    /// `[row][ancestors]`, branch rows.
    rows: &'a [u32],
    /// Ancestors per row.
    ancestors: usize,
}

/// Every query sees the ancestors of its row; `group` queries belong to a row.
#[inline(always)]
fn see_ancestors(
    pages: &HeadPages,
    lineages: Lineages<'_>,
    group: usize,
    queries: usize,
    dim: usize,
    scratch: &mut Scratch,
) {
    let (count, value_width) = (lineages.ancestors, pages.value_width());
    let of = |query: usize| &lineages.rows[query / group * count..][..count];
    let place =
        |&row: &u32| pages.branch_row(lineages.pages[row as usize / PAGE_SIZE], row as usize % PAGE_SIZE);
    for first in (0..queries).step_by(MOST_ROWS) {
        let height = MOST_ROWS.min(queries - first);
        let mut logits = [[0.0; PAGE_SIZE]; MOST_ROWS];
        let logits = &mut logits[..height];
        for (member, logits) in logits.iter_mut().enumerate() {
            let query = &scratch.queries[(first + member) * dim..][..dim];
            for (logit, ancestor) in logits.iter_mut().zip(of(first + member)) {
                *logit = dot(query, place(ancestor).0);
            }
        }
        // The lanes of keys that do not exist add zeros, so fewer of them give the same bits.
        if count <= LANES {
            weigh::<LANES>(logits, |_| count, first, value_width, scratch);
        } else {
            weigh::<PAGE_SIZE>(logits, |_| count, first, value_width, scratch);
        }
        for (member, weights) in logits.iter().enumerate() {
            let sums = &mut scratch.sums[(first + member) * value_width..][..value_width];
            for (weight, ancestor) in weights.iter().zip(of(first + member)) {
                let values = place(ancestor).1.as_chunks::<VALUE_BLOCK>().0;
                for (sums, values) in sums.as_chunks_mut::<VALUE_BLOCK>().0.iter_mut().zip(values) {
                    // Copies lie in registers, and nothing else points at them.
                    let (mut added, values) = (*sums, *values);
                    for column in 0..VALUE_BLOCK {
                        added[column] = weight.mul_add(values[column], added[column]);
                    }
                    *sums = added;
                }
            }
        }
    }
}

/// Turns the logits of a few queries into weights, e^(logit - maximum), and brings their running
/// state to the new maximum. Each query sees the first `visible` keys, at most `WIDTH`.
#[inline(always)]
fn weigh<const WIDTH: usize>(
    logits: &mut [[f32; PAGE_SIZE]],
    visible: impl Fn(usize) -> usize,
    first_query: usize,
    value_width: usize,
    scratch: &mut Scratch,
) {
    let queries = first_query..first_query + logits.len();
    let (mut before, mut maxima) = ([0.0; MOST_ROWS], [0.0; MOST_ROWS]);
    before[..logits.len()].copy_from_slice(&scratch.maxima[queries.clone()]);
    for (member, weights) in logits.iter_mut().enumerate() {
        let visible = visible(member) as u32;
        let mut lanes = [before[member]; LANES];
        for (chunk, weights) in weights[..WIDTH].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut seen = *weights;
            for lane in 0..LANES {
                // What is not visible weighs nothing: e^-inf is 0.
                let visible = ((chunk * LANES + lane) as u32) < visible;
                seen[lane] = if visible { seen[lane] } else { f32::NEG_INFINITY };
                lanes[lane] = larger(seen[lane], lanes[lane]);
            }
            *weights = seen;
        }
        maxima[member] = fold_lanes(lanes, larger);
    }
    // All at once: one by one they would wait for each other.
    let mut decays = [0.0; MOST_ROWS];
    for member in 0..MOST_ROWS {
        decays[member] = exp(before[member] - maxima[member]);
    }
    scratch.maxima[queries.clone()].copy_from_slice(&maxima[..logits.len()]);
    for (member, (weights, query)) in logits.iter_mut().zip(queries).enumerate() {
        let (max, decay) = (maxima[member], decays[member]);
        let mut totals = [0.0; LANES];
        for chunk in weights[..WIDTH].as_chunks_mut::<LANES>().0 {
            let mut weights = *chunk;
            for lane in 0..LANES {
                weights[lane] = exp(weights[lane] - max);
                totals[lane] += weights[lane];
            }
            *chunk = weights;
        }
        let total = fold_lanes(totals, |a, b| a + b);
        scratch.totals[query] = scratch.totals[query].mul_add(decay, total);
        let sums = &mut scratch.sums[query * value_width..][..value_width];
        for sums in sums.as_chunks_mut::<VALUE_BLOCK>().0 {
            *sums = decayed(*sums, decay);
        }
    }
}

#[inline(always)]
fn decayed(mut sums: [f32; VALUE_BLOCK], decay: f32) -> [f32; VALUE_BLOCK] {
    for sum in &mut sums {
        *sum *= decay;
    }
    sums
}
