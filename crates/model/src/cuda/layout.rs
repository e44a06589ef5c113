//! The rows of one step as the kernels take them: plain arrays, made on the host, copied in one piece.
//!
//! Place in the flow: the executor turns a plan into this; [`Upload`] packs the arrays; the kernels of `kernels/` read them. The
//! CPU's counterpart is [`Batch`](crate::batch::Batch), with the same words.
//!
//! ```text
//! rows           context rows of all chunks | beams of all branch steps, as many as each beam is wide
//! prefill tiles  consecutive rows of one chunk
//! branch items   consecutive beams of one request, and a part of its context
//! merge rows     one per branch row: the parts of the context it looked at, and its ancestors
//! ```
//!
//! How a context is split into parts follows from the request alone, so that a result does not depend on what shares
//! the step. Tokens, places and lineages of branch rows are filled in on the device, where the beams are.
//!
//! What this must not know: devices, addresses.

use beamline_kv_cache::PageId;
use bytemuck::{Pod, Zeroable};

use crate::cpu::pages::PAGE_SIZE;

/// Keys of a context that a block looks at, at least.
const SPLIT_KEYS: usize = 256;
/// Blocks that a request's branch step should have: two for each multiprocessor of a large device. Not of the device at hand:
/// the split is part of what is computed.
const BLOCKS_PER_REQUEST: usize = 264;

/// What of the model shapes the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query heads per key-value head.
    pub group: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Queries, rows times group, of a tile or item.
    pub queries: usize,
    /// Queries from which on a tile or item is one of [`Tiles::many`].
    pub few_queries: usize,
}

impl Shape {
    /// Rows of a tile.
    fn rows(self) -> usize {
        (self.queries / self.group).max(1)
    }

    fn is_few(self, rows: u32) -> bool {
        rows as usize * self.group <= self.few_queries
    }
}

/// Tiles, or items, by the kernel that takes them: the result is the same bit for bit, the time is not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiles<T> {
    /// Of many queries.
    pub many: Vec<T>,
    /// Of few.
    pub few: Vec<T>,
}

impl<T> Tiles<T> {
    fn clear(&mut self) {
        self.many.clear();
        self.few.clear();
    }

    fn push(&mut self, shape: Shape, rows: u32, tile: T) {
        if shape.is_few(rows) { self.few.push(tile) } else { self.many.push(tile) }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.many.iter().chain(&self.few)
    }
}

/// Rows of a chunk that a block takes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PrefillTile {
    /// First row of the step.
    pub first_row: u32,
    /// Rows.
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
    /// Rows.
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

/// What a branch row is merged from.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeRow {
    /// Row of the step.
    pub row: u32,
    /// Its partial result of the first part.
    pub partial_first: u32,
    /// Parts.
    pub splits: u32,
    /// From the partial result of one part to that of the next.
    pub partial_stride: u32,
    /// Where its ancestors begin in the table of lineages.
    pub lineage: u32,
    /// Ancestors, itself included.
    pub ancestors: u32,
}

/// A branch step of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BranchRequest {
    /// Rows reserved: the width of the beam.
    pub width: usize,
    /// Ancestors of a row, itself included.
    pub ancestors: usize,
    /// Positions of the context.
    pub context_len: usize,
    /// First row of the step.
    pub first_row: usize,
    /// Where its lineages begin.
    pub first_lineage: usize,
    /// Where its branch pages begin in the page table.
    pub branch_pages: usize,
}

/// Rows of one step.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Token of each row; 0 for branch rows.
    pub tokens: Vec<u32>,
    /// Position of each row; 0 for branch rows.
    pub positions: Vec<u32>,
    /// Where each row's key and value are stored, page times 32 plus offset; -1 for nowhere, and for branch rows.
    pub places: Vec<i32>,
    /// Page tables.
    pub pages: Vec<u32>,
    /// Tiles of context rows.
    pub prefill: Tiles<PrefillTile>,
    /// The same of the last layer: wanted rows only.
    pub final_prefill: Tiles<PrefillTile>,
    /// Items of branch rows.
    pub branch: Tiles<BranchItem>,
    /// One for each branch row.
    pub merge: Vec<MergeRow>,
    /// Branch steps in the order of their rows.
    pub requests: Vec<BranchRequest>,
    /// Rows whose final state is wanted, ascending.
    pub wanted: Vec<u32>,
    /// Entries of the table of lineages.
    pub lineage_len: usize,
    /// Rows of partial results.
    pub partial_rows: usize,
    /// Who reads or writes which pages of the table.
    uses: Vec<Use>,
    /// For each page, the step that it was last written in, and by whom.
    writers: Vec<(u64, u32)>,
    step: u64,
}

/// Pages that a request reads, and those of them that it writes: ranges of the page table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Use {
    owner: u32,
    read: std::ops::Range<usize>,
    written: std::ops::Range<usize>,
}

/// Consecutive context rows of one request.
#[derive(Clone, Copy, Debug)]
pub struct ContextChunk<'a> {
    /// Who asks; only compared with the others of the step.
    pub owner: u32,
    /// Tokens of the rows.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub first_position: usize,
    /// Positions below this one are in pages already.
    pub cached: usize,
    /// The context's pages.
    pub pages: &'a [PageId],
    /// Whether the last row's final state is wanted.
    pub wanted: bool,
}

impl Layout {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        let Self {
            tokens,
            positions,
            places,
            pages,
            prefill,
            final_prefill,
            branch,
            merge,
            requests,
            wanted,
            uses,
            ..
        } = self;
        tokens.clear();
        positions.clear();
        places.clear();
        pages.clear();
        prefill.clear();
        final_prefill.clear();
        branch.clear();
        merge.clear();
        requests.clear();
        wanted.clear();
        uses.clear();
        (self.lineage_len, self.partial_rows) = (0, 0);
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that are not branch rows; they come first.
    pub fn context_rows(&self) -> usize {
        self.rows() - self.merge.len()
    }

    /// Adds context rows. All of them come before any branch step.
    pub fn push_context(&mut self, shape: Shape, chunk: ContextChunk<'_>) {
        assert!(self.requests.is_empty(), "context rows come first");
        let (first_row, end) = (self.rows(), chunk.first_position + chunk.tokens.len());
        let pages = self.push_pages(&chunk.pages[..end.div_ceil(PAGE_SIZE)]);
        self.tokens.extend_from_slice(chunk.tokens);
        for position in chunk.first_position..end {
            self.positions.push(position as u32);
            let page = chunk.pages[position / PAGE_SIZE].0 as usize;
            let place = (page * PAGE_SIZE + position % PAGE_SIZE) as i32;
            self.places.push(if position < chunk.cached { -1 } else { place });
        }
        let first_written = chunk.first_position.max(chunk.cached).min(end) / PAGE_SIZE;
        let table = pages as usize;
        let read = table..table + end.div_ceil(PAGE_SIZE);
        let written = if chunk.cached < end { table + first_written..read.end } else { 0..0 };
        self.uses.push(Use { owner: chunk.owner, read, written });
        // The last tiles see most keys: they come first, so that no block is left alone at the end.
        for start in (0..chunk.tokens.len()).step_by(shape.rows()).rev() {
            let rows = shape.rows().min(chunk.tokens.len() - start) as u32;
            let tile = PrefillTile {
                first_row: (first_row + start) as u32,
                rows,
                first_position: (chunk.first_position + start) as u32,
                pages,
            };
            self.prefill.push(shape, rows, tile);
        }
        if chunk.wanted {
            let row = (self.rows() - 1) as u32;
            let tile = PrefillTile { first_row: row, rows: 1, first_position: end as u32 - 1, pages };
            self.final_prefill.push(shape, 1, tile);
            self.wanted.push(row);
        }
    }

    /// Adds a branch step of `width` beams whose rows have `ancestors` ancestors, themselves included.
    pub fn push_branch(
        &mut self,
        shape: Shape,
        owner: u32,
        width: usize,
        ancestors: usize,
        context_len: usize,
        context_pages: &[PageId],
        branch_pages: &[PageId],
    ) {
        let first_row = self.rows();
        let pages = self.push_pages(&context_pages[..context_len.div_ceil(PAGE_SIZE)]);
        let read = pages as usize..self.pages.len();
        let branch_pages = self.push_pages(branch_pages) as usize;
        self.uses.push(Use { owner, read, written: branch_pages..self.pages.len() });
        let request = BranchRequest {
            width,
            ancestors,
            context_len,
            first_row,
            first_lineage: self.lineage_len,
            branch_pages,
        };
        self.requests.push(request);
        self.lineage_len += width * ancestors;
        let parts = parts(shape, width, context_len);
        let partial_first = self.partial_rows;
        self.partial_rows += parts.len() * width;
        for (part, keys) in parts.iter().enumerate() {
            for start in (0..width).step_by(shape.rows()) {
                let rows = shape.rows().min(width - start) as u32;
                let item = BranchItem {
                    first_row: (first_row + start) as u32,
                    rows,
                    pages,
                    key_begin: keys.start as u32,
                    key_end: keys.end as u32,
                    partial_first: (partial_first + part * width + start) as u32,
                };
                self.branch.push(shape, rows, item);
            }
        }
        for row in 0..width {
            self.tokens.push(0);
            self.positions.push(0);
            self.places.push(-1);
            self.wanted.push((first_row + row) as u32);
            self.merge.push(MergeRow {
                row: (first_row + row) as u32,
                partial_first: (partial_first + row) as u32,
                splits: parts.len() as u32,
                partial_stride: width as u32,
                lineage: (request.first_lineage + row * ancestors) as u32,
                ancestors: ancestors as u32,
            });
        }
    }

    /// Checks that no page is written by one request and read or written by another in this step.
    ///
    /// # Errors
    ///
    /// Which page is. The scheduler promises that none is; a broken promise would show one user another's history, so it is
    /// checked again here, where it would do the harm.
    pub fn check_writes(&mut self, pages: usize) -> Result<(), String> {
        self.step += 1;
        self.writers.resize(pages, (0, 0));
        if let Some(page) = self.pages.iter().find(|page| **page as usize >= pages) {
            return Err(format!("page {page} of {pages} is used"));
        }
        for Use { owner, written, .. } in &self.uses {
            for &page in &self.pages[written.clone()] {
                let writer = &mut self.writers[page as usize];
                if writer.0 == self.step && writer.1 != *owner {
                    return Err(format!("page {page} is written by two requests"));
                }
                *writer = (self.step, *owner);
            }
        }
        for Use { owner, read, .. } in &self.uses {
            for &page in &self.pages[read.clone()] {
                let writer = self.writers[page as usize];
                if writer.0 == self.step && writer.1 != *owner {
                    return Err(format!("page {page} is written by one request and read by another"));
                }
            }
        }
        Ok(())
    }

    /// Pages that the step writes.
    pub fn written(&self) -> impl Iterator<Item = u32> {
        self.uses.iter().flat_map(|used| self.pages[used.written.clone()].iter().copied())
    }

    fn push_pages(&mut self, pages: &[PageId]) -> u32 {
        let start = self.pages.len();
        self.pages.extend(pages.iter().map(|page| page.0));
        start as u32
    }
}

/// Parts of a context that are looked at side by side, none of them empty, whole pages but for the end.
fn parts(shape: Shape, width: usize, context_len: usize) -> Vec<std::ops::Range<usize>> {
    let blocks = width.div_ceil(shape.rows()) * shape.kv_heads;
    let splits = BLOCKS_PER_REQUEST.div_ceil(blocks.max(1)).min(context_len.div_ceil(SPLIT_KEYS)).max(1);
    let keys = context_len.div_ceil(splits).next_multiple_of(2 * PAGE_SIZE);
    (0..context_len).step_by(keys.max(1)).map(|start| start..context_len.min(start + keys)).collect()
}

/// Arrays of a step, packed into one piece of memory.
#[derive(Debug, Default)]
pub struct Upload {
    bytes: Vec<u8>,
}

impl Upload {
    /// Alignment of every array.
    const ALIGNMENT: usize = 16;

    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Adds an array; returns where it begins.
    pub fn push<T: bytemuck::NoUninit>(&mut self, array: &[T]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(Self::ALIGNMENT), 0);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytemuck::cast_slice(array));
        start as u64
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHAPE: Shape = Shape { group: 2, kv_heads: 2, queries: 128, few_queries: 32 };

    fn pages(count: usize, first: u32) -> Vec<PageId> {
        (0..count as u32).map(|page| PageId(first + page)).collect()
    }

    #[test]
    fn pages_of_others_are_not_written() {
        let chunk = |owner: u32, first: u32, cached: usize| (owner, pages(2, first), cached);
        let check = |chunks: &[(u32, Vec<PageId>, usize)], branch: Option<(u32, u32, u32)>| {
            let mut layout = Layout::default();
            for (owner, pages, cached) in chunks {
                let tokens = vec![7; 64 - cached.min(&63)];
                let first_position = 64 - tokens.len();
                let (owner, cached) = (*owner, *cached);
                layout.push_context(
                    SHAPE,
                    ContextChunk { owner, tokens: &tokens, first_position, cached, pages, wanted: true },
                );
            }
            if let Some((owner, context, own)) = branch {
                layout.push_branch(SHAPE, owner, 8, 1, 64, &pages(2, context), &pages(1, own));
            }
            layout.check_writes(16)
        };
        assert_eq!(check(&[chunk(1, 0, 0), chunk(2, 2, 0)], Some((3, 4, 6))), Ok(()));
        // Shared pages are read by all.
        assert_eq!(check(&[chunk(1, 0, 64), chunk(2, 0, 64)], Some((3, 0, 6))), Ok(()));
        assert_eq!(
            check(&[chunk(1, 0, 32), chunk(2, 0, 64)], None).unwrap_err(),
            "page 1 is written by one request and read by another"
        );
        assert!(check(&[chunk(1, 0, 0), chunk(2, 1, 0)], None).is_err());
        assert!(check(&[chunk(1, 0, 0)], Some((2, 4, 1))).is_err(), "beams over a context");
        assert!(check(&[chunk(1, 0, 0)], Some((2, 0, 6))).is_err(), "a context that is being written");
        assert!(check(&[chunk(1, 15, 0)], None).is_err(), "a page that is not there");
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
                layout.push_context(SHAPE, ContextChunk { owner: layout.uses.len() as u32, tokens: &tokens, first_position, cached, pages: &pages, wanted });
            }
            let context_rows = layout.rows();
            for &(width, ancestors, context_len) in &branches {
                let own = pages((width * ancestors).div_ceil(PAGE_SIZE), 900);
                layout.push_branch(SHAPE, 1000 + layout.uses.len() as u32, width, ancestors, context_len, &pages(context_len.div_ceil(PAGE_SIZE), 50), &own);
            }
            prop_assert_eq!(layout.context_rows(), context_rows);
            let mut seen = vec![0; layout.rows()];
            for tile in layout.prefill.iter() {
                for row in tile.first_row..tile.first_row + tile.rows {
                    seen[row as usize] += 1;
                    let position = layout.positions[row as usize];
                    prop_assert_eq!(position, tile.first_position + row - tile.first_row);
                    let page = layout.pages[tile.pages as usize + position as usize / PAGE_SIZE];
                    prop_assert_eq!(layout.places[row as usize], (page * 32 + position % 32) as i32);
                }
            }
            prop_assert!(seen[..context_rows].iter().all(|&times| times == 1));
            // Every partial row is written once, and read by the row it is of.
            let mut written = vec![None; layout.partial_rows];
            for item in layout.branch.iter() {
                for row in 0..item.rows {
                    let place = &mut written[(item.partial_first + row) as usize];
                    prop_assert_eq!(*place, None);
                    *place = Some(item.first_row + row);
                }
            }
            for (row, merge) in layout.merge.iter().enumerate() {
                for split in 0..merge.splits {
                    let place = merge.partial_first + split * merge.partial_stride;
                    prop_assert_eq!(written[place as usize], Some((context_rows + row) as u32));
                }
                prop_assert!((merge.lineage + merge.ancestors) as usize <= layout.lineage_len);
            }
            let expected = chunks.iter().filter(|chunk| chunk.2).count() + layout.merge.len();
            prop_assert_eq!(layout.wanted.len(), expected);
            prop_assert!(layout.wanted.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
