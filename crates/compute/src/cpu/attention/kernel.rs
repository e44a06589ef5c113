//! Softmax attention of one block of rows with one key-value head.
//!
//! Queries are taken a few at a time, as many as the registers hold: their products with the keys of
//! a page, their weights, and the weighted values, before the next page.

use std::cell::RefCell;

use beamline_kv_cache::PageId;

use super::softmax::Softmax;
use super::{Block, Heads, Sees, Tables};
use crate::cpu::isa::{Isa, per_isa};
use crate::cpu::pages::{HeadPages, PAGE_SIZE};
use crate::cpu::stored::Stored;
use crate::cpu::tile::{COLUMNS, MOST_ROWS, Product, SharedMatrix, Strided, rows_at_once};
use crate::cpu::vector::dot;

/// One key-value head with the query heads it serves.
#[derive(Clone, Copy)]
pub(super) struct Head<'a, T> {
    pub(super) heads: Heads,
    pub(super) index: usize,
    pub(super) pages: &'a HeadPages<T>,
}

impl<T> Head<'_, T> {
    /// Query heads that it serves.
    fn group(&self) -> usize {
        self.heads.query / self.heads.key_value
    }

    /// Column of the first of them among all query heads.
    fn first_column(&self) -> usize {
        self.index * self.group() * self.heads.dim
    }
}

thread_local! {
    /// Reused by all tasks of a thread, so that the steady path does not allocate.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[derive(Default)]
struct Scratch {
    /// `[query][dim]`, scaled by `1 / sqrt(dim)`. The queries of a row follow each other.
    queries: Vec<f32>,
    softmax: Softmax,
}

/// Attends with one block and one head. No two calls at a time may share both.
pub(super) fn attend<T: Stored>(
    isa: Isa,
    head: Head<'_, T>,
    qkv: &[f32],
    block: &Block,
    tables: Tables<'_>,
    out: SharedMatrix<'_>,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        gather(isa, head, qkv, block, &mut scratch.queries);
        let queries = block.rows.len() * head.group();
        scratch.softmax.begin(queries, head.pages.value_width());
        let context_pages = &tables.pages[block.context_pages.clone()];
        match &block.sees {
            Sees::Causal { first_position } => {
                let own = first_position / PAGE_SIZE;
                for &page in &context_pages[..own] {
                    see_page(isa, head, page, Visible::same(PAGE_SIZE), scratch);
                }
                let visible = Visible::ascending(first_position % PAGE_SIZE, head.group());
                see_page(isa, head, context_pages[own], visible, scratch);
            }
            Sees::Branch { context_len, ancestors, lineage, branch_pages } => {
                for (index, &page) in context_pages[..context_len.div_ceil(PAGE_SIZE)].iter().enumerate() {
                    let visible = PAGE_SIZE.min(context_len - index * PAGE_SIZE);
                    see_page(isa, head, page, Visible::same(visible), scratch);
                }
                let lineages = Lineages {
                    pages: &tables.pages[branch_pages.clone()],
                    rows: &tables.lineage[*lineage..][..block.rows.len() * ancestors],
                    ancestors: *ancestors,
                };
                see_ancestors(isa, isa, head, lineages, scratch);
            }
        }
        finish(isa, head, block, &scratch.softmax, out);
    });
}

per_isa! {
    fn gather<T: Stored>(head: Head<'_, T>, qkv: &[f32], block: &Block, queries: &mut Vec<f32>) = gather_body
}

#[inline(always)]
fn gather_body<const R: usize, T: Stored>(
    head: Head<'_, T>,
    qkv: &[f32],
    block: &Block,
    queries: &mut Vec<f32>,
) {
    let scale = 1.0 / (head.heads.dim as f32).sqrt();
    queries.clear();
    for row in block.rows.clone() {
        let start = row * head.heads.qkv_width() + head.first_column();
        queries.extend(qkv[start..start + head.group() * head.heads.dim].iter().map(|q| q * scale));
    }
}

/// How many keys of a page each query sees.
#[derive(Clone, Copy)]
struct Visible {
    /// Seen by the queries of the first row.
    first: usize,
    /// Queries of a row, each of which sees one key more than the row before; none if all see the same.
    group: Option<usize>,
}

impl Visible {
    /// Every query sees this many.
    fn same(keys: usize) -> Self {
        Self { first: keys, group: None }
    }

    /// The first row lies at `offset` in the page, and every row sees up to itself.
    fn ascending(offset: usize, group: usize) -> Self {
        Self { first: offset + 1, group: Some(group) }
    }

    fn to(self, query: usize) -> usize {
        self.first + self.group.map_or(0, |group| query / group)
    }
}

/// All queries see the first keys of a context page.
fn see_page<T: Stored>(isa: Isa, head: Head<'_, T>, page: PageId, visible: Visible, scratch: &mut Scratch) {
    let (dim, value_width) = (head.heads.dim, head.pages.value_width());
    let (keys, values) = (head.pages.context_keys(page), head.pages.values(page));
    let (queries, tallest) = (scratch.softmax.queries(), rows_at_once(isa));
    for first in (0..queries).step_by(tallest) {
        let height = tallest.min(queries - first);
        let mut logits = [[0.0; PAGE_SIZE]; MOST_ROWS];
        let logits = &mut logits[..height];
        let mut keys_seen = [visible.first; MOST_ROWS];
        if visible.group.is_some() {
            keys_seen = std::array::from_fn(|member| visible.to(first + member));
        }
        // Only values that some query sees are touched: what lies behind them may belong to nobody.
        // Those that a query does not see add zero. The last query sees the most.
        let seen = keys_seen[height - 1];
        let products = Product {
            rows: Strided { values: &scratch.queries[first * dim..], stride: dim },
            panel: Strided { values: keys, stride: PAGE_SIZE },
            height,
            inner: dim,
            columns: seen.next_multiple_of(COLUMNS),
        };
        products.add_to(isa, logits.as_flattened_mut(), PAGE_SIZE);
        scratch.softmax.weigh(isa, first, logits, &keys_seen[..height]);
        let weighted = Product {
            rows: Strided { values: logits.as_flattened(), stride: PAGE_SIZE },
            panel: Strided { values, stride: value_width },
            height,
            inner: seen,
            columns: value_width,
        };
        weighted.add_to(isa, scratch.softmax.sums_from(first), value_width);
    }
}

/// The ancestors of the rows of a block.
#[derive(Clone, Copy)]
struct Lineages<'a> {
    /// Pages of the branch rows.
    pages: &'a [PageId],
    /// `[row][ancestors]`, branch rows.
    rows: &'a [u32],
    /// Ancestors per row.
    ancestors: usize,
}

per_isa! {
    /// Every query sees the ancestors of its row.
    fn see_ancestors<T: Stored>(isa: Isa, head: Head<'_, T>, lineages: Lineages<'_>, scratch: &mut Scratch) = see_ancestors_body
}

#[inline(always)]
fn see_ancestors_body<const R: usize, T: Stored>(
    isa: Isa,
    head: Head<'_, T>,
    lineages: Lineages<'_>,
    scratch: &mut Scratch,
) {
    let (dim, group, count) = (head.heads.dim, head.group(), lineages.ancestors);
    let of = |query: usize| &lineages.rows[query / group * count..][..count];
    let place = |&row: &u32| {
        head.pages.branch_row(lineages.pages[row as usize / PAGE_SIZE], row as usize % PAGE_SIZE)
    };
    let queries = scratch.softmax.queries();
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
        scratch.softmax.weigh(isa, first, logits, &[count; MOST_ROWS][..height]);
        for (member, weights) in logits.iter().enumerate() {
            let sums = scratch.softmax.sums_mut(first + member);
            for (weight, ancestor) in weights.iter().zip(of(first + member)) {
                add_weighted(sums, *weight, place(ancestor).1);
            }
        }
    }
}

#[inline(always)]
fn add_weighted<T: Stored>(sums: &mut [f32], weight: f32, values: &[T]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum = weight.mul_add(value.widen(), *sum);
    }
}

per_isa! {
    /// Writes what the queries found. As for [`attend`], no two calls at a time may share both.
    fn finish<T: Stored>(head: Head<'_, T>, block: &Block, softmax: &Softmax, out: SharedMatrix<'_>) = finish_body
}

#[inline(always)]
fn finish_body<const R: usize, T: Stored>(
    head: Head<'_, T>,
    block: &Block,
    softmax: &Softmax,
    out: SharedMatrix<'_>,
) {
    let (dim, group) = (head.heads.dim, head.group());
    for (index, row) in block.rows.clone().enumerate() {
        // SAFETY: a task writes the columns of its own head in its own rows, and no two tasks share
        // both.
        let out = unsafe { out.row_segment(row, head.first_column(), group * dim) };
        for (member, out) in out.chunks_exact_mut(dim).enumerate() {
            softmax.write(index * group + member, out);
        }
    }
}
