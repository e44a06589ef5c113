//! The rows of one step, laid out for a forward pass.
//!
//! Place in the flow: the executor fills a batch from a plan; a family runs it. Rows of different
//! requests lie one after the other and never see each other except through the pages their own
//! blocks name.
//!
//! Invariants: every page that a step writes is written by one request and read by no other request
//! of that step ([`Batch::check_writes`]); rows of a block are consecutive.

use beamline_kv_cache::PageId;

use crate::cpu::attention::{Block, Sees};
use crate::cpu::destinations::Destinations;
use crate::cpu::pages::{Destination, PAGE_SIZE};
use crate::page_uses::PageUses;

/// Rows of a step. All vectors are reused.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Absolute position of each row.
    pub positions: Vec<u32>,
    /// Where the key and value of each row go.
    pub destinations: Destinations,
    /// Who attends to what, in every layer but the last.
    pub blocks: Vec<Block>,
    /// The same for the last layer, where only the wanted rows go on.
    pub final_blocks: Vec<Block>,
    /// Rows whose final state is wanted, ascending.
    pub wanted: Vec<usize>,
    /// Page tables that blocks point into.
    pub pages: Vec<PageId>,
    /// Ancestors that blocks point into.
    pub lineage: Vec<u32>,
    /// Who reads and writes which of them.
    uses: PageUses,
}

/// Rows of a batch that continue a context.
#[derive(Clone, Copy, Debug)]
pub struct ContextRows<'a> {
    /// Who asks; only compared with the others of the batch.
    pub owner: u32,
    /// Tokens of the rows.
    pub tokens: &'a [u32],
    /// Position of the first row.
    pub first_position: usize,
    /// Positions below this one are in pages already.
    pub cached: usize,
    /// Context pages from position 0 on.
    pub pages: &'a [PageId],
    /// How many of the last rows' final states are wanted.
    pub wanted: usize,
}

/// Rows of a batch that extend the beams of one request.
#[derive(Clone, Copy, Debug)]
pub struct BranchRows<'a> {
    /// Slot of the request; only compared with the others of the batch.
    pub owner: u32,
    /// Token of each beam.
    pub tokens: &'a [u32],
    /// Positions of the context; the rows stand at `context_len + ancestors - 1`.
    pub context_len: usize,
    /// Ancestors per row, the row itself last.
    pub ancestors: usize,
    /// `ancestors` branch rows for each row.
    pub lineage: &'a [u32],
    /// Context pages from position 0 on.
    pub context_pages: &'a [PageId],
    /// Pages of the branch rows.
    pub branch_pages: &'a [PageId],
}

impl Batch {
    /// Makes the batch empty for another step, and keeps its memory.
    pub fn clear(&mut self) {
        self.clear_part();
        self.uses.clear();
    }

    /// Makes the batch empty for another part of the same step.
    pub fn clear_part(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.destinations.clear();
        self.blocks.clear();
        self.final_blocks.clear();
        self.wanted.clear();
        self.pages.clear();
        self.lineage.clear();
        self.uses.clear_part();
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Adds context rows, cut into one block per page.
    pub fn push_context(&mut self, rows: ContextRows<'_>) {
        let end = rows.first_position + rows.tokens.len();
        let table = self.push_pages(&rows.pages[..end.div_ceil(PAGE_SIZE)]);
        self.uses.push_context(rows.owner, table.clone(), first_written(&rows, end));
        let first_row = self.rows();
        let last_row = first_row + rows.tokens.len();
        let row_of = |position: usize| first_row + position - rows.first_position;
        self.tokens.extend_from_slice(rows.tokens);
        for position in rows.first_position..end {
            self.positions.push(position as u32);
            self.destinations.push(if position < rows.cached {
                Destination::Cached
            } else {
                Destination::Context { page: rows.pages[position / PAGE_SIZE], offset: position % PAGE_SIZE }
            });
        }
        let mut position = rows.first_position;
        while position < end {
            let next = end.min((position / PAGE_SIZE + 1) * PAGE_SIZE);
            self.push_block(
                Block {
                    rows: row_of(position)..row_of(next),
                    context_pages: table.clone(),
                    sees: Sees::Causal { first_position: position },
                },
                last_row - rows.wanted,
            );
            position = next;
        }
        self.wanted.extend(last_row - rows.wanted..last_row);
    }

    /// Adds branch rows; the final states of all of them are wanted.
    pub fn push_branches(&mut self, rows: BranchRows<'_>) {
        assert_eq!(rows.lineage.len(), rows.tokens.len() * rows.ancestors, "a lineage for every row");
        let context_pages = self.push_pages(rows.context_pages);
        let branch_pages = self.push_pages(rows.branch_pages);
        self.uses.push_branch(rows.owner, context_pages.clone(), branch_pages.clone());
        let (first_row, first_lineage) = (self.rows(), self.lineage.len());
        self.lineage.extend_from_slice(rows.lineage);
        self.tokens.extend_from_slice(rows.tokens);
        for row in 0..rows.tokens.len() {
            let own = rows.lineage[(row + 1) * rows.ancestors - 1] as usize;
            self.positions.push((rows.context_len + rows.ancestors - 1) as u32);
            self.destinations.push(Destination::Branch {
                page: rows.branch_pages[own / PAGE_SIZE],
                offset: own % PAGE_SIZE,
            });
        }
        for start in (0..rows.tokens.len()).step_by(PAGE_SIZE) {
            let end = rows.tokens.len().min(start + PAGE_SIZE);
            let sees = Sees::Branch {
                context_len: rows.context_len,
                ancestors: rows.ancestors,
                lineage: first_lineage + start * rows.ancestors,
                branch_pages: branch_pages.clone(),
            };
            let block = Block {
                rows: first_row + start..first_row + end,
                context_pages: context_pages.clone(),
                sees,
            };
            self.push_block(block, 0);
        }
        self.wanted.extend(first_row..first_row + rows.tokens.len());
    }

    /// Adds a block, and to the last layer what remains of it from row `wanted_from` on.
    fn push_block(&mut self, block: Block, wanted_from: usize) {
        let skipped = wanted_from.saturating_sub(block.rows.start).min(block.rows.len());
        if skipped < block.rows.len() {
            let mut last = block.clone();
            last.rows.start += skipped;
            if let Sees::Causal { first_position } = &mut last.sees {
                *first_position += skipped;
            }
            self.final_blocks.push(last);
        }
        self.blocks.push(block);
    }

    fn push_pages(&mut self, pages: &[PageId]) -> std::ops::Range<usize> {
        let start = self.pages.len();
        self.pages.extend_from_slice(pages);
        start..self.pages.len()
    }

    /// Checks that no page is written by one request and touched by another in this step
    /// ([`PageUses::check`]), and no place in it twice. A forward pass demands it.
    pub fn check_writes(&mut self, pages: usize) -> Result<(), String> {
        let Self { uses, pages: table, destinations, .. } = self;
        uses.check(pages, |at| table[at].0)?;
        destinations.check()
    }
}

/// Number of the first context page that these rows write; beyond the last if they write none.
pub(crate) fn first_written(rows: &ContextRows<'_>, end: usize) -> usize {
    match rows.first_position.max(rows.cached) {
        first if first < end => first / PAGE_SIZE,
        _ => end.div_ceil(PAGE_SIZE),
    }
}
