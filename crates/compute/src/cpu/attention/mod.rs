//! Softmax attention over pages, for context rows and for branch rows.
//!
//! The keys a row sees are taken page by page in the order of absolute positions, with a running
//! maximum and sum (online softmax, Milakov and Gimelshein 2018). A branch row then merges its few
//! ancestors the same way, which is the log-sum-exp merge of two attention parts. Pages always
//! begin at a multiple of [`PAGE_SIZE`], so a row meets the same tiles in the same order whether
//! its context was cached, cut into chunks, or computed at once: this is why cached and uncached
//! answers are equal bit for bit.
//!
//! ```text
//! mod       blocks, and who sees what
//! kernel    one block and one key-value head: pages, then ancestors
//! softmax   the running maximum, sum and weighted values
//! ```
//!
//! Work is cut into tasks, one per [`Block`] of rows and key-value head. All query heads that share
//! the key-value head are rows of the same tile product.

mod kernel;
mod softmax;

use std::ops::Range;

use beamline_kv_cache::PageId;

use super::Cpu;
use super::pages::{HeadPages, LayerHeads, LayerPages, PAGE_SIZE};
use super::stored::Stored;
use super::tile::SharedMatrix;
use kernel::Head;

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
        /// Ancestors per row, the row itself last; none for a row that sees the context alone.
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
    /// Page tables that blocks point into.
    pub pages: &'a [PageId],
    /// Branch rows of ancestors: row `r` lies in branch page `r / PAGE_SIZE` at `r % PAGE_SIZE`.
    pub lineage: &'a [u32],
}

/// How heads lie in a row of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Number of query heads.
    pub query: usize,
    /// Key-value heads; each serves `query / key_value` query heads in order.
    pub key_value: usize,
    /// Width of a head.
    pub dim: usize,
}

/// Whether no two blocks have a row in common, as they are written by different threads.
pub(super) fn are_apart(blocks: &[Block]) -> bool {
    blocks.windows(2).all(|pair| pair[0].rows.end <= pair[1].rows.start)
}

impl Heads {
    /// Width of a row `[query heads | key heads | value heads]`.
    pub fn qkv_width(self) -> usize {
        (self.query + 2 * self.key_value) * self.dim
    }
}

/// Attends with all blocks, whose rows ascend. `qkv` is `[rows, qkv_width]` with queries rotated; keys
/// and values are read from `pages`, where the rows' own were written before. `out` is
/// `[rows, query heads * dim]`.
pub fn attend(
    cpu: &Cpu,
    heads: Heads,
    qkv: &[f32],
    pages: LayerPages<'_>,
    blocks: &[Block],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    match pages.0 {
        LayerHeads::F32(pages) => attend_to(cpu, heads, qkv, pages, blocks, tables, out),
        LayerHeads::Bf16(pages) => attend_to(cpu, heads, qkv, pages, blocks, tables, out),
    }
}

fn attend_to<T: Stored>(
    cpu: &Cpu,
    heads: Heads,
    qkv: &[f32],
    pages: &[HeadPages<T>],
    blocks: &[Block],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    assert!(are_apart(blocks), "rows of blocks ascend");
    let out = SharedMatrix::new(out, heads.query * heads.dim);
    let tasks = blocks.len() * heads.key_value;
    cpu.each(tasks, 1, |task| {
        // The last rows of a context first: they see the most, and short tasks at the end keep all
        // threads busy.
        let task = tasks - 1 - task;
        let (block, index) = (&blocks[task / heads.key_value], task % heads.key_value);
        kernel::attend(cpu.isa(), Head { heads, index, pages: &pages[index] }, qkv, block, tables, out);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Bf16;
    use crate::cpu::isa::Isa;
    use crate::cpu::kv_format::KvFormat;
    use crate::cpu::pages::{Destination, PageShape, PageStore};

    const CONTEXT: usize = 75;
    const BRANCHES: usize = 40;

    /// Keys and values of a context in pages from 0 on, and of branches from 3 on.
    fn filled(heads: Heads, format: KvFormat, qkv: &[f32], change: impl Fn(f32) -> f32) -> PageStore {
        let (heads, dim, width) = (heads.key_value, heads.dim, heads.qkv_width());
        let shape = PageShape { format, layers: 1, heads, key_dim: dim, value_dim: dim };
        let mut store = PageStore::new(shape, 5).unwrap();
        for (row, qkv) in qkv.chunks_exact(width).enumerate() {
            let destination = match row.checked_sub(CONTEXT) {
                None => {
                    Destination::Context { page: PageId((row / PAGE_SIZE) as u32), offset: row % PAGE_SIZE }
                }
                Some(branch) => Destination::Branch {
                    page: PageId(3 + (branch / PAGE_SIZE) as u32),
                    offset: branch % PAGE_SIZE,
                },
            };
            let kv: Vec<f32> = qkv[width - 2 * heads * dim..].iter().map(|&x| change(x)).collect();
            for head in 0..heads {
                store.write(
                    0,
                    head,
                    destination,
                    &kv[head * dim..][..dim],
                    &kv[(heads + head) * dim..][..dim],
                );
            }
        }
        store
    }

    #[test]
    fn pages_in_bfloat16_are_seen_as_pages_of_rounded_numbers_bit_for_bit() {
        for heads in [Heads { query: 6, key_value: 2, dim: 23 }, Heads { query: 2, key_value: 1, dim: 64 }] {
            let number = |i: usize| ((i * 7919) % 1009) as f32 / 300.0 - 1.7;
            let qkv: Vec<f32> = (0..(CONTEXT + BRANCHES) * heads.qkv_width()).map(number).collect();
            let stores = [
                filled(heads, KvFormat::F32, &qkv, |x| x),
                filled(heads, KvFormat::Bf16, &qkv, |x| x),
                filled(heads, KvFormat::F32, &qkv, |x| Bf16::nearest(x).widen()),
            ];
            let branch = |rows: Range<usize>| Block {
                context_pages: 0..3,
                sees: Sees::Branch {
                    context_len: CONTEXT,
                    ancestors: 2,
                    lineage: 2 * (rows.start - CONTEXT),
                    branch_pages: 3..5,
                },
                rows,
            };
            let causal = |rows: Range<usize>| {
                let sees = Sees::Causal { first_position: rows.start };
                Block { rows, context_pages: 0..3, sees }
            };
            let blocks = [
                causal(0..32),
                causal(32..64),
                causal(64..CONTEXT),
                branch(CONTEXT..CONTEXT + 32),
                branch(CONTEXT + 32..CONTEXT + BRANCHES),
            ];
            let lineage: Vec<u32> = (0..BRANCHES as u32).flat_map(|row| [row / 2, row]).collect();
            let pages: Vec<PageId> = (0..5).map(PageId).collect();
            let mut of_isa = Vec::new();
            for isa in Isa::all() {
                let found = stores.each_ref().map(|store| {
                    let mut out = vec![0.0; (CONTEXT + BRANCHES) * heads.query * heads.dim];
                    let (cpu, tables) =
                        (Cpu::with_isa(2, isa).unwrap(), Tables { pages: &pages, lineage: &lineage });
                    attend(&cpu, heads, &qkv, store.layer(0), &blocks, tables, &mut out);
                    out.iter().map(|x: &f32| x.to_bits()).collect::<Vec<_>>()
                });
                assert!(found[0] != found[1] && found[1] == found[2], "{heads:?} with {}", isa.name());
                of_isa.push(found);
            }
            assert!(of_isa.windows(2).all(|pair| pair[0] == pair[1]), "{heads:?}");
        }
    }

    #[test]
    fn rows_without_ancestors_see_the_context_alone() {
        let heads = Heads { query: 3, key_value: 3, dim: 12 };
        let number = |i: usize| ((i * 7919) % 1009) as f32 / 300.0 - 1.7;
        let width = heads.qkv_width();
        let qkv: Vec<f32> = (0..(CONTEXT + BRANCHES) * width).map(number).collect();
        let store = filled(heads, KvFormat::F32, &qkv, |x| x);
        // What lies behind the context in its last page is not seen.
        for context_len in [1, 16, 33, 64, CONTEXT] {
            let block = |rows: Range<usize>| Block {
                rows,
                context_pages: 0..3,
                sees: Sees::Branch { context_len, ancestors: 0, lineage: 0, branch_pages: 0..0 },
            };
            let pages: Vec<PageId> = (0..3).map(PageId).collect();
            let tables = Tables { pages: &pages, lineage: &[] };
            let mut of_isa = Vec::new();
            for isa in Isa::all() {
                let mut out = vec![0.0; BRANCHES * heads.query * heads.dim];
                let cpu = Cpu::with_isa(2, isa).unwrap();
                let blocks = [block(0..1), block(1..33), block(33..BRANCHES)];
                attend(&cpu, heads, &qkv, store.layer(0), &blocks, tables, &mut out);
                of_isa.push(out);
            }
            assert!(of_isa.windows(2).all(|pair| pair[0] == pair[1]));
            for (row, head) in (0..BRANCHES).flat_map(|row| (0..3).map(move |head| (row, head))) {
                let part = |row: usize, kind: usize| &qkv[row * width + (3 * kind + head) * 12..][..12];
                let dot = |key: &[f32]| -> f64 {
                    let pairs = part(row, 0).iter().zip(key);
                    pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / 12f64.sqrt()
                };
                let weights: Vec<f64> = (0..context_len).map(|key| dot(part(key, 1)).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in 0..12 {
                    let values = (0..context_len).map(|key| f64::from(part(key, 2)[column]));
                    let truth = values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / total;
                    let found = f64::from(of_isa[0][row * 36 + head * 12 + column]);
                    assert!((found - truth).abs() < 1e-5, "{found} for {truth} over {context_len}");
                }
            }
        }
    }

    #[test]
    fn blocks_that_share_a_row_are_refused() {
        let of = |rows: &[Range<usize>]| {
            let sees = Sees::Causal { first_position: 0 };
            let block =
                |rows: &Range<usize>| Block { rows: rows.clone(), context_pages: 0..1, sees: sees.clone() };
            are_apart(&rows.iter().map(block).collect::<Vec<_>>())
        };
        assert!(of(&[]) && of(&[0..3, 3..5, 7..9]));
        assert!(!of(&[0..3, 2..5]));
        assert!(!of(&[3..5, 0..3]));
    }
}
