//! The rows of one step of a decoder as its kernels take them: plain arrays, made on the host, copied in
//! one piece.
//!
//! Place in the flow: the executor turns a plan into this; [`Upload`](super::upload::Upload) packs the
//! arrays; the kernels of `kernels/` read them.
//!
//! ```text
//! rows           as in every family
//! prefill tiles  consecutive rows of one chunk
//! branch items   consecutive beams of one request, and a part of its context
//! ```
//!
//! The request alone decides how its context is split into parts, so a result does not depend on what
//! shares the step.
//!
//! What this must not know: devices, addresses.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::rows::{BranchChunk, Rows};
use super::tiles::{Shape, Tiles};
use crate::batch::ContextRows;
use crate::cpu::pages::PAGE_SIZE;

/// Keys of a context that a block looks at, at least.
const SPLIT_KEYS: usize = 256;
/// Blocks that a request's branch step should have: two for each multiprocessor of a large device. The
/// device at hand does not matter, because the split is part of what is computed.
const BLOCKS_PER_REQUEST: usize = 264;

/// Rows of a chunk that a block takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PrefillTile {
    /// First row of the step.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Position of the first row.
    pub first_position: u32,
    /// Where the context's pages begin in the page table.
    pub pages: u32,
}

/// Beams of a request and a part of its context that a block takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct BranchItem {
    /// First row of the step.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Where the context's pages begin in the page table.
    pub pages: u32,
    /// First position of the part.
    pub key_begin: u32,
    /// End of the part.
    pub key_end: u32,
    /// Where the partial result of the first row goes.
    pub partial_first: u32,
}

/// Rows of one step, cut into tiles.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Rows of the step.
    pub rows: Rows,
    /// Tiles of context rows.
    pub prefill: Tiles<PrefillTile>,
    /// The same of the last layer: wanted rows only.
    pub final_prefill: Tiles<PrefillTile>,
    /// Items of branch rows.
    pub branch: Tiles<BranchItem>,
}

impl Layout {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        let Self { rows, prefill, final_prefill, branch } = self;
        rows.clear();
        prefill.clear();
        final_prefill.clear();
        branch.clear();
    }

    /// Adds context rows. All of them come before any branch step.
    pub fn push_context(&mut self, shape: Shape, chunk: ContextRows<'_>) {
        let placed = self.rows.push_context(&chunk);
        let (pages, len) = (placed.pages, chunk.tokens.len());
        let tile = |(start, rows): (usize, u32)| PrefillTile {
            first_row: (placed.first_row + start) as u32,
            rows,
            first_position: (chunk.first_position + start) as u32,
            pages,
        };
        for tile in shape.cut_backwards(0, len).map(tile) {
            self.prefill.push(shape, tile.rows, tile);
        }
        for tile in shape.cut_backwards(len - chunk.wanted, len).map(tile) {
            self.final_prefill.push(shape, tile.rows, tile);
        }
    }

    /// Adds a step of beams.
    pub fn push_branch(&mut self, shape: Shape, chunk: &BranchChunk<'_>) {
        let parts = parts(shape, chunk.width, chunk.context_len);
        let placed = self.rows.push_beams(chunk, parts.len());
        for (part, keys) in parts.iter().enumerate() {
            for (start, rows) in shape.cut(0, chunk.width) {
                let item = BranchItem {
                    first_row: (placed.first_row + start) as u32,
                    rows,
                    pages: placed.pages,
                    key_begin: keys.start as u32,
                    key_end: keys.end as u32,
                    partial_first: (placed.partial_first + part * chunk.width + start) as u32,
                };
                self.branch.push(shape, rows, item);
            }
        }
    }
}

/// Parts of a context that are looked at side by side. None is empty, and each is whole pages, except at
/// the end.
fn parts(shape: Shape, width: usize, context_len: usize) -> Vec<Range<usize>> {
    let blocks = width.div_ceil(shape.rows()) * shape.kv_heads;
    let splits = BLOCKS_PER_REQUEST.div_ceil(blocks.max(1)).min(context_len.div_ceil(SPLIT_KEYS)).max(1);
    let keys = context_len.div_ceil(splits).next_multiple_of(2 * PAGE_SIZE);
    (0..context_len).step_by(keys.max(1)).map(|start| start..context_len.min(start + keys)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use beamline_kv_cache::PageId;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape { group: 2, kv_heads: 2, queries: 128, few_queries: 32 };

    fn pages(count: usize, first: u32) -> Vec<PageId> {
        (0..count as u32).map(|page| PageId(first + page)).collect()
    }

    proptest! {
        #[test]
        fn parts_cover_the_context_once(width in 1..600_usize, context_len in 0..6000_usize, group in 1..8_usize) {
            let parts = parts(Shape { group, ..SHAPE }, width, context_len);
            let mut at = 0;
            for part in &parts {
                prop_assert_eq!(part.start, at);
                prop_assert!(part.end > part.start && part.start % (2 * PAGE_SIZE) == 0);
                at = part.end;
            }
            prop_assert_eq!(at, context_len);
        }

        #[test]
        fn every_row_is_in_one_tile_and_every_branch_row_in_one_item_per_part(
            chunks in prop::collection::vec((0..100_usize, 1..200_usize, any::<bool>()), 0..4),
            branches in prop::collection::vec((1..90_usize, 1..4_usize, 0..700_usize), 0..4),
        ) {
            let mut layout = Layout::default();
            for &(first_position, rows, wanted) in &chunks {
                let tokens = vec![7; rows];
                let pages = pages((first_position + rows).div_ceil(PAGE_SIZE), 3);
                let cached = first_position;
                layout.push_context(SHAPE, ContextRows { owner: layout.rows.count() as u32, tokens: &tokens, first_position, cached, pages: &pages, wanted: usize::from(wanted) });
            }
            let context_rows = layout.rows.count();
            for &(width, ancestors, context_len) in &branches {
                let own = pages((width * ancestors).div_ceil(PAGE_SIZE), 900);
                let (owner, context_pages) = (1000, pages(context_len.div_ceil(PAGE_SIZE), 50));
                layout.push_branch(SHAPE, &BranchChunk { owner, width, ancestors, context_len, context_pages: &context_pages, branch_pages: &own });
            }
            prop_assert_eq!(layout.rows.context_count(), context_rows);
            let mut seen = vec![0; layout.rows.count()];
            for tile in layout.prefill.iter() {
                for row in tile.first_row..tile.first_row + tile.rows {
                    seen[row as usize] += 1;
                    let position = layout.rows.positions[row as usize];
                    prop_assert_eq!(position, tile.first_position + row - tile.first_row);
                    let page = layout.rows.pages[tile.pages as usize + position as usize / PAGE_SIZE];
                    prop_assert_eq!(layout.rows.places[row as usize], (page * 32 + position % 32) as i32);
                }
            }
            prop_assert!(seen[..context_rows].iter().all(|&times| times == 1));
            // Every partial row is written once, and read by the row it is of.
            let mut written = vec![None; layout.rows.partial_rows];
            for item in layout.branch.iter() {
                for row in 0..item.rows {
                    let place = &mut written[(item.partial_first + row) as usize];
                    prop_assert_eq!(*place, None);
                    *place = Some(item.first_row + row);
                }
            }
            for (row, merge) in layout.rows.merge.iter().enumerate() {
                for split in 0..merge.splits {
                    let place = merge.partial_first + split * merge.partial_stride;
                    prop_assert_eq!(written[place as usize], Some((context_rows + row) as u32));
                }
                prop_assert!((merge.lineage + merge.ancestors) as usize <= layout.rows.lineage_len);
            }
            let expected = chunks.iter().filter(|chunk| chunk.2).count() + layout.rows.merge.len();
            prop_assert_eq!(layout.rows.wanted.len(), expected);
            prop_assert!(layout.rows.wanted.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
