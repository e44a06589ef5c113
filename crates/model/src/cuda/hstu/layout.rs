//! The rows of one step of an HSTU model as its kernels take them.
//!
//! Place in the flow: as the decoder's [`Layout`](beamline_compute::cuda::layout::Layout). The CPU's
//! counterpart is [`HstuBatch`](crate::families::hstu::batch::HstuBatch).
//!
//! ```text
//! rows    as in every family
//! items   consecutive context rows of one chunk with all keys that they may see | consecutive branch
//!         rows of one request with a part of its context
//! times   of the positions of each context, and of its query
//! ```
//!
//! A branch row attends to its context in parts that begin at multiples of [`PART_KEYS`]. So its result
//! does not depend on how many rows share its call, and candidates may be ranked a few at a time. A
//! context row attends to all its keys at once.
//!
//! What this must not know: devices, addresses, embeddings.

use beamline_compute::batch::ContextRows;
use beamline_compute::cpu::mask::Mask;
use beamline_compute::cuda::kernels::hstu::Item;
use beamline_compute::cuda::rows::{BranchChunk, Placed, Rows, place};
use beamline_compute::cuda::tiles::{Shape, Tiles};

use crate::families::hstu::batch::ContextOf;

/// Keys of a context that a block looks at for branch rows. A multiple of every kernel's tile of keys.
const PART_KEYS: usize = 512;

/// Rows of one step, cut into items.
#[derive(Debug, Default)]
pub struct HstuLayout {
    /// Rows of the step.
    pub rows: Rows,
    /// Items of all rows. [`HstuLayout::finish`] moves the results of branch rows behind those of all rows.
    pub items: Tiles<Item>,
    /// The same of the last layer: wanted rows only.
    pub final_items: Tiles<Item>,
    /// Times of contexts; empty if no layer has a relative bias.
    pub times: Vec<i64>,
    /// Lineages of branch rows; of beams, room for them.
    pub lineage: Vec<i32>,
}

impl HstuLayout {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        let Self { rows, items, final_items, times, lineage } = self;
        rows.clear();
        items.clear();
        final_items.clear();
        times.clear();
        lineage.clear();
    }

    /// Adds context rows. All of them come before any branch rows.
    pub fn push_context(
        &mut self,
        shape: Shape,
        mask: Mask,
        chunk: &ContextRows<'_>,
        context: ContextOf<'_>,
    ) {
        let placed = self.rows.push_context(chunk);
        let (len, times) = (chunk.tokens.len(), self.push_times(context));
        let item = |(start, rows): (usize, u32)| {
            let (row, position) = (placed.first_row + start, chunk.first_position + start);
            let end = if position < mask.contextual { context.len } else { position + rows as usize };
            Item {
                first_row: row as u32,
                rows,
                pages: placed.pages,
                key_begin: 0,
                key_end: end as u32,
                out_first_row: row as u32,
                position: position as u32,
                step: 1,
                context_len: context.len as u32,
                times,
            }
        };
        for item in shape.cut_backwards(0, len).map(item) {
            self.items.push(shape, item.rows, item);
        }
        for item in shape.cut_backwards(len - chunk.wanted, len).map(item) {
            self.final_items.push(shape, item.rows, item);
        }
    }

    /// Adds rows of beams, which are filled in on the device.
    pub fn push_beams(&mut self, shape: Shape, chunk: &BranchChunk<'_>, context: ContextOf<'_>) {
        let placed = self.rows.push_beams(chunk, parts(chunk.context_len));
        self.lineage.resize(self.rows.lineage_len, 0);
        self.push_items(shape, chunk, context, placed);
    }

    /// Adds candidates, each its own only ancestor, with a row of the branch pages for each.
    pub fn push_candidates(&mut self, shape: Shape, chunk: &BranchChunk<'_>, context: ContextOf<'_>) {
        assert_eq!(chunk.ancestors, 1, "candidates do not see each other");
        let placed = self.rows.push_branch(chunk, parts(chunk.context_len));
        for row in 0..chunk.width {
            let place = place(chunk.branch_pages, row);
            self.rows.places[placed.first_row + row] = place;
            self.lineage.push(place);
        }
        self.push_items(shape, chunk, context, placed);
    }

    fn push_items(&mut self, shape: Shape, chunk: &BranchChunk<'_>, context: ContextOf<'_>, placed: Placed) {
        let times = self.push_times(context);
        for (part, key_begin) in (0..chunk.context_len).step_by(PART_KEYS).enumerate() {
            for (start, rows) in shape.cut(0, chunk.width) {
                let item = Item {
                    first_row: (placed.first_row + start) as u32,
                    rows,
                    pages: placed.pages,
                    key_begin: key_begin as u32,
                    key_end: chunk.context_len.min(key_begin + PART_KEYS) as u32,
                    out_first_row: (placed.partial_first + part * chunk.width + start) as u32,
                    position: (chunk.context_len + chunk.ancestors - 1) as u32,
                    step: 0,
                    context_len: chunk.context_len as u32,
                    times,
                };
                self.items.push(shape, rows, item);
                self.final_items.push(shape, rows, item);
            }
        }
    }

    fn push_times(&mut self, context: ContextOf<'_>) -> u32 {
        let start = self.times.len();
        self.times.extend_from_slice(context.times);
        start as u32
    }

    /// Puts partial results behind the rows, and checks what is written. Nothing may be added afterwards.
    ///
    /// # Errors
    ///
    /// As [`Rows::check_writes`].
    pub fn finish(&mut self, pages: usize) -> Result<(), String> {
        let rows = self.rows.count() as u32;
        let items = self.items.iter_mut().chain(self.final_items.iter_mut());
        items.filter(|item| item.step == 0).for_each(|item| item.out_first_row += rows);
        self.rows.merge.iter_mut().for_each(|row| row.partial_first += rows);
        self.rows.check_writes(pages)
    }
}

/// Parts of a context.
fn parts(context_len: usize) -> usize {
    context_len.div_ceil(PART_KEYS)
}

#[cfg(test)]
mod tests {
    use beamline_kv_cache::PageId;
    use proptest::prelude::*;

    use super::*;

    const SHAPE: Shape = Shape { group: 1, kv_heads: 2, queries: 128, few_queries: 32 };

    fn pages(first: u32, positions: usize) -> Vec<PageId> {
        (first..first + positions.div_ceil(32) as u32).map(PageId).collect()
    }

    proptest! {
        #[test]
        fn every_row_gets_its_result_from_the_keys_it_sees_and_every_branch_row_from_each_part(
            chunks in prop::collection::vec((0..300_usize, 1..300_usize, 0..3_usize), 0..4),
            branches in prop::collection::vec((1..300_usize, 1..1500_usize, any::<bool>()), 0..3),
            contextual in 0..5_usize,
        ) {
            let mut layout = HstuLayout::default();
            let mask = Mask { contextual, ..Mask::default() };
            for (owner, &(first_position, rows, wanted)) in chunks.iter().enumerate() {
                let (tokens, len) = (vec![7; rows], first_position + rows);
                let chunk = ContextRows { owner: owner as u32, tokens: &tokens, first_position, cached: len, pages: &pages(3, len), wanted: wanted.min(rows) };
                layout.push_context(SHAPE, mask, &chunk, ContextOf { len, times: &vec![1; len + 1] });
            }
            for (owner, &(width, context_len, beams)) in branches.iter().enumerate() {
                let own = 1000 + 100 * owner as u32;
                let chunk = BranchChunk { owner: own, width, ancestors: 1, context_len, context_pages: &pages(50, context_len), branch_pages: &pages(own, width) };
                let context = ContextOf { len: context_len, times: &vec![1; context_len + 1] };
                if beams { layout.push_beams(SHAPE, &chunk, context) } else { layout.push_candidates(SHAPE, &chunk, context) }
            }
            prop_assert_eq!(layout.finish(2000), Ok(()));
            let rows = layout.rows.count();
            let mut written = vec![None; rows + layout.rows.partial_rows];
            for item in layout.items.iter() {
                prop_assert!(item.key_begin < item.key_end && item.key_end <= item.context_len);
                prop_assert_eq!(layout.times.get(item.times as usize + item.context_len as usize), Some(&1));
                for row in 0..item.rows {
                    let place = &mut written[(item.out_first_row + row) as usize];
                    prop_assert_eq!(*place, None);
                    *place = Some(item.first_row + row);
                    if item.step == 1 {
                        prop_assert_eq!(layout.rows.positions[(item.first_row + row) as usize], item.position + row);
                        let seen = if item.position < contextual as u32 { item.context_len } else { item.position + item.rows };
                        prop_assert_eq!((item.key_begin, item.key_end), (0, seen));
                    }
                }
            }
            for (row, written) in written[..layout.rows.context_count()].iter().enumerate() {
                prop_assert_eq!(*written, Some(row as u32));
            }
            for merge in &layout.rows.merge {
                for split in 0..merge.splits {
                    prop_assert_eq!(written[(merge.partial_first + split * merge.partial_stride) as usize], Some(merge.row));
                }
                prop_assert!((merge.lineage + merge.ancestors) as usize <= layout.lineage.len());
            }
            let mut last: Vec<u32> = layout.final_items.iter().filter(|item| item.key_begin == 0).flat_map(|item| item.first_row..item.first_row + item.rows).collect();
            last.sort_unstable();
            prop_assert_eq!(&last, &layout.rows.wanted);
        }
    }
}
