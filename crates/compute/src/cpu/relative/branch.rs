//! Self-attention of the decoder: a row sees the start row, its ancestors, and itself, with a relative bias.
//!
//! ```text
//! start row   position 0, in a context page
//! beam        position s: the start row, s - 1 ancestors and itself, in branch pages
//! ```
//!
//! Place in the flow: between the products of a decoder block, after the rows of the step were written
//! to pages. Each row has only a few keys, so they are taken one by one.
//!
//! Invariant: a row is one chain of operations from position 0 to its own, whatever other rows are
//! there. Keys are read from their page, so it makes no difference which step wrote them.

use std::cell::RefCell;
use std::ops::Range;

use beamline_kv_cache::PageId;

use super::bias::Bias;
use crate::cpu::Cpu;
use crate::cpu::attention::{Heads, MAX_ANCESTORS, Tables};
use crate::cpu::isa::per_isa;
use crate::cpu::pages::{HeadPages, LayerHeads, LayerPages, PAGE_SIZE};
use crate::cpu::parallel::write;
use crate::cpu::stored::Stored;
use crate::cpu::vector::{dot, exp_or_zero, larger};

/// Most keys of a row: the start row and its ancestors, itself included.
const MOST_KEYS: usize = MAX_ANCESTORS + 1;

/// Consecutive rows of one request at one position of the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnBlock {
    /// Rows of the decoder.
    pub rows: Range<usize>,
    /// Context page of the start row, and its place there.
    pub start: (PageId, usize),
    /// Ancestors per row, the row itself last; none for the start row. Also the position of the rows.
    pub ancestors: usize,
    /// Start in [`Tables::lineage`]: `ancestors` branch rows for each row of the block.
    pub lineage: usize,
    /// The request's branch pages; a range of [`Tables::pages`].
    pub branch_pages: Range<usize>,
}

/// A block on its way.
struct Task<'a, T> {
    block: &'a OwnBlock,
    heads: Heads,
    bias: &'a Bias,
    pages: &'a [HeadPages<T>],
    tables: Tables<'a>,
    /// `[rows of the block, 3 heads * dim]`.
    qkv: &'a [f32],
}

thread_local! {
    /// A key of a context page, which lies across it. Reused by all tasks of a thread.
    static KEY: RefCell<Vec<f32>> = RefCell::default();
}

/// Attends with all blocks, which cover the rows in order. `qkv` is `[rows, 3 heads * dim]`, `out`
/// `[rows, heads * dim]`.
pub fn attend(
    cpu: &Cpu,
    heads: Heads,
    bias: &Bias,
    qkv: &[f32],
    pages: LayerPages<'_>,
    blocks: &[OwnBlock],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    match pages.0 {
        LayerHeads::F32(pages) => attend_to(cpu, heads, bias, qkv, pages, blocks, tables, out),
        LayerHeads::Bf16(pages) => attend_to(cpu, heads, bias, qkv, pages, blocks, tables, out),
    }
}

fn attend_to<T: Stored>(
    cpu: &Cpu,
    heads: Heads,
    bias: &Bias,
    qkv: &[f32],
    pages: &[HeadPages<T>],
    blocks: &[OwnBlock],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    let mut tasks = Vec::with_capacity(blocks.len());
    let mut rest = out;
    for block in blocks {
        let (out, others) = rest.split_at_mut(block.rows.len() * heads.query * heads.dim);
        rest = others;
        let width = heads.qkv_width();
        let qkv = &qkv[block.rows.start * width..block.rows.end * width];
        tasks.push((Task { block, heads, bias, pages, tables, qkv }, out));
    }
    let isa = cpu.isa();
    cpu.each_part(write(&mut tasks, 1), |_, tasks| {
        KEY.with_borrow_mut(|key| tasks.iter_mut().for_each(|(task, out)| attend_block(isa, task, key, out)));
    });
}

per_isa! {
    /// Attends with the rows of one block.
    fn attend_block<T: Stored>(task: &Task<'_, T>, key: &mut Vec<f32>, out: &mut [f32]) = attend_block_body
}

#[inline(always)]
fn attend_block_body<const R: usize, T: Stored>(task: &Task<'_, T>, key: &mut Vec<f32>, out: &mut [f32]) {
    let Task { block, heads, bias, pages, tables, qkv } = task;
    let (dim, width, out_width) = (heads.dim, heads.qkv_width(), heads.query * heads.dim);
    let (start_page, start_offset) = block.start;
    let branch_pages = &tables.pages[block.branch_pages.clone()];
    let lineage = &tables.lineage[block.lineage..][..block.rows.len() * block.ancestors];
    let biases = |head: usize| -> [f32; MOST_KEYS] {
        std::array::from_fn(|key| bias.before(head, block.ancestors.saturating_sub(key)))
    };
    for (head, pages) in pages.iter().enumerate() {
        key.clear();
        let across = pages.context_keys(start_page)[start_offset..].iter().step_by(PAGE_SIZE);
        key.extend(across.map(|value| value.widen()));
        let start_value = &pages.values(start_page)[start_offset * pages.value_width()..][..dim];
        let biases = biases(head);
        for row in 0..block.rows.len() {
            let query = &qkv[row * width + head * dim..][..dim];
            let ancestors = &lineage[row * block.ancestors..][..block.ancestors];
            let branch = |&row: &u32| {
                pages.branch_row(branch_pages[row as usize / PAGE_SIZE], row as usize % PAGE_SIZE)
            };
            let mut weights = biases;
            weights[0] += dot(query, &key[..]);
            let mut largest = weights[0];
            for (weight, ancestor) in weights[1..].iter_mut().zip(ancestors) {
                *weight += dot(query, branch(ancestor).0);
                largest = larger(*weight, largest);
            }
            let mut total = 0.0;
            for weight in &mut weights[..=block.ancestors] {
                *weight = exp_or_zero(*weight - largest);
                total += *weight;
            }
            let out = &mut out[row * out_width + head * dim..][..dim];
            for (out, value) in out.iter_mut().zip(start_value) {
                *out = weights[0] * value.widen();
            }
            for (weight, ancestor) in weights[1..].iter().zip(ancestors) {
                for (out, value) in out.iter_mut().zip(branch(ancestor).1) {
                    *out = weight.mul_add(value.widen(), *out);
                }
            }
            for out in out {
                *out /= total;
            }
        }
    }
}
