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
use super::pages::{HeadPages, PAGE_SIZE};
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
    pages: &[HeadPages],
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
