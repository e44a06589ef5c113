//! The rows of one step as both families have them: where their keys and values go, whose they are,
//! which are wanted.
//!
//! Place in the flow: a family's layout adds rows here and cuts them into what its own kernels take; the
//! kernels read these arrays. The CPU's counterpart is [`Batch`](crate::batch::Batch), with the same
//! words.
//!
//! ```text
//! rows    context rows of all chunks | branch rows of all branch steps, as many as each beam is wide
//! merge   one entry per branch row: the parts of the context it looked at, and its ancestors
//! ```
//!
//! Tokens, places and lineages of beams are filled in on the device, where the beams are.
//!
//! Invariant: every page that a step writes is written by one request and read by no other request of
//! that step.
//!
//! What this must not know: devices, addresses, attention.

use beamline_kv_cache::PageId;
use bytemuck::{Pod, Zeroable};

use super::upload::Upload;
use crate::batch::{ContextRows, first_written};
use crate::cpu::pages::PAGE_SIZE;
use crate::page_uses::PageUses;

/// What a branch row is merged from.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeRow {
    /// Row of the step.
    pub row: u32,
    /// Its partial result of the first part.
    pub partial_first: u32,
    /// Number of parts.
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
pub struct Rows {
    /// Token of each row; 0 for branch rows.
    pub tokens: Vec<u32>,
    /// Position of each row; 0 for branch rows.
    pub positions: Vec<u32>,
    /// Where each row's key and value are stored, page times 32 plus offset; -1 for nowhere, and for
    /// rows of beams.
    pub places: Vec<i32>,
    /// Page tables of all requests.
    pub pages: Vec<u32>,
    /// One for each branch row.
    pub merge: Vec<MergeRow>,
    /// Steps of beams in the order of their rows.
    pub requests: Vec<BranchRequest>,
    /// Rows whose final state is wanted, ascending.
    pub wanted: Vec<u32>,
    /// Entries of the table of lineages.
    pub lineage_len: usize,
    /// Rows of partial results.
    pub partial_rows: usize,
    /// Who reads or writes which pages of the table.
    uses: PageUses,
}

/// A branch step of one request.
#[derive(Clone, Copy, Debug)]
pub struct BranchChunk<'a> {
    /// Slot of the request; only compared with the others of the step.
    pub owner: u32,
    /// Rows reserved: the width of the beam.
    pub width: usize,
    /// Ancestors of a row, itself included.
    pub ancestors: usize,
    /// Positions of the context.
    pub context_len: usize,
    /// The context's pages.
    pub context_pages: &'a [PageId],
    /// Pages of the request's branch rows, which it may write.
    pub branch_pages: &'a [PageId],
}

/// Where rows were put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// First row of the step.
    pub first_row: usize,
    /// Where the context's pages begin in the page table.
    pub pages: u32,
    /// First partial result; those of a part follow each other, part after part.
    pub partial_first: usize,
}

/// Where the arrays lie.
#[derive(Clone, Copy, Debug)]
pub struct RowArrays {
    /// Tokens of rows.
    pub tokens: u64,
    /// Positions of rows.
    pub positions: u64,
    /// Where keys and values of rows are stored.
    pub places: u64,
    /// Page tables of all requests.
    pub pages: u64,
    /// What branch rows are merged from.
    pub merge: u64,
    /// Rows whose final state is wanted.
    pub wanted: u64,
    /// How rows of beams are filled in.
    pub requests: u64,
    /// Lineages of branch rows.
    pub lineage: u64,
}

impl Rows {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        let Self { tokens, positions, places, pages, merge, requests, wanted, uses, .. } = self;
        tokens.clear();
        positions.clear();
        places.clear();
        pages.clear();
        merge.clear();
        requests.clear();
        wanted.clear();
        uses.clear();
        (self.lineage_len, self.partial_rows) = (0, 0);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.tokens.len()
    }

    /// How many are not branch rows; they come first.
    pub fn context_count(&self) -> usize {
        self.count() - self.merge.len()
    }

    /// Branch rows of the widest step of beams.
    pub fn widest(&self) -> usize {
        self.requests.iter().map(|request| request.width).max().unwrap_or(0)
    }

    /// Adds context rows. All of them come before any branch step.
    pub fn push_context(&mut self, chunk: &ContextRows<'_>) -> Placed {
        assert!(self.merge.is_empty(), "context rows come first");
        let (first_row, end) = (self.count(), chunk.first_position + chunk.tokens.len());
        let pages = self.push_pages(&chunk.pages[..end.div_ceil(PAGE_SIZE)]);
        self.tokens.extend_from_slice(chunk.tokens);
        for position in chunk.first_position..end {
            self.positions.push(position as u32);
            let place = place(chunk.pages, position);
            self.places.push(if position < chunk.cached { -1 } else { place });
        }
        let table = pages as usize..self.pages.len();
        self.uses.push_context(chunk.owner, table, first_written(chunk, end));
        let last = self.count();
        self.wanted.extend((last - chunk.wanted..last).map(|row| row as u32));
        Placed { first_row, pages, partial_first: 0 }
    }

    /// Adds branch rows that look at their context in this number of parts. The final states of all are
    /// wanted.
    pub fn push_branch(&mut self, rows: &BranchChunk<'_>, parts: usize) -> Placed {
        let (first_row, partial_first, first_lineage) = (self.count(), self.partial_rows, self.lineage_len);
        let pages = self.push_pages(&rows.context_pages[..rows.context_len.div_ceil(PAGE_SIZE)]);
        let read = pages as usize..self.pages.len();
        let own = self.push_pages(rows.branch_pages) as usize;
        self.uses.push_branch(rows.owner, read, own..self.pages.len());
        self.lineage_len += rows.width * rows.ancestors;
        self.partial_rows += parts * rows.width;
        for row in 0..rows.width {
            self.tokens.push(0);
            self.positions.push(0);
            self.places.push(-1);
            self.wanted.push((first_row + row) as u32);
            self.merge.push(MergeRow {
                row: (first_row + row) as u32,
                partial_first: (partial_first + row) as u32,
                splits: parts as u32,
                partial_stride: rows.width as u32,
                lineage: (first_lineage + row * rows.ancestors) as u32,
                ancestors: rows.ancestors as u32,
            });
        }
        Placed { first_row, pages, partial_first }
    }

    /// Adds rows of beams, which are filled in on the device.
    pub fn push_beams(&mut self, rows: &BranchChunk<'_>, parts: usize) -> Placed {
        let first_lineage = self.lineage_len;
        let placed = self.push_branch(rows, parts);
        self.requests.push(BranchRequest {
            width: rows.width,
            ancestors: rows.ancestors,
            context_len: rows.context_len,
            first_row: placed.first_row,
            first_lineage,
            branch_pages: self.pages.len() - rows.branch_pages.len(),
        });
        placed
    }

    /// Adds the arrays that the host knows; requests and lineages are left out.
    pub fn upload(&self, to: &mut Upload) -> RowArrays {
        RowArrays {
            tokens: to.push(&self.tokens),
            positions: to.push(&self.positions),
            places: to.push(&self.places),
            pages: to.push(&self.pages),
            merge: to.push(&self.merge),
            wanted: to.push(&self.wanted),
            requests: 0,
            lineage: 0,
        }
    }

    /// Checks that no page is written by one request and touched by another in this step.
    ///
    /// # Errors
    ///
    /// As [`PageUses::check`].
    pub fn check_writes(&mut self, pages: usize) -> Result<(), String> {
        let Self { uses, pages: table, .. } = self;
        if let Some(page) = table.iter().find(|page| **page as usize >= pages) {
            return Err(format!("page {page} of {pages} is used"));
        }
        uses.check(pages, |at| table[at])
    }

    /// Pages that the step writes.
    pub fn written(&self) -> impl Iterator<Item = u32> {
        self.uses.written().map(|at| self.pages[at])
    }

    fn push_pages(&mut self, pages: &[PageId]) -> u32 {
        let start = self.pages.len();
        self.pages.extend(pages.iter().map(|page| page.0));
        start as u32
    }
}

impl RowArrays {
    /// From places within an upload to addresses.
    pub fn at(self, base: u64) -> Self {
        Self {
            tokens: base + self.tokens,
            positions: base + self.positions,
            places: base + self.places,
            pages: base + self.pages,
            merge: base + self.merge,
            wanted: base + self.wanted,
            ..self
        }
    }
}

/// The row of the pages that a position, or a branch row, has.
pub fn place(pages: &[PageId], position: usize) -> i32 {
    (pages[position / PAGE_SIZE].0 as usize * PAGE_SIZE + position % PAGE_SIZE) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(count: usize, first: u32) -> Vec<PageId> {
        (0..count as u32).map(|page| PageId(first + page)).collect()
    }

    #[test]
    fn pages_of_others_are_not_written() {
        let chunk = |owner: u32, first: u32, cached: usize| (owner, pages(2, first), cached);
        let check = |chunks: &[(u32, Vec<PageId>, usize)], branch: Option<(u32, u32, u32)>| {
            let mut rows = Rows::default();
            for (owner, pages, cached) in chunks {
                let tokens = vec![7; 64 - cached.min(&63)];
                let first_position = 64 - tokens.len();
                let (owner, cached) = (*owner, *cached);
                rows.push_context(&ContextRows {
                    owner,
                    tokens: &tokens,
                    first_position,
                    cached,
                    pages,
                    wanted: 1,
                });
            }
            if let Some((owner, context, own)) = branch {
                let (context_pages, branch_pages) = (&pages(2, context)[..], &pages(1, own)[..]);
                let chunk = BranchChunk {
                    owner,
                    width: 8,
                    ancestors: 1,
                    context_len: 64,
                    context_pages,
                    branch_pages,
                };
                rows.push_beams(&chunk, 1);
            }
            rows.check_writes(16)
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
}
