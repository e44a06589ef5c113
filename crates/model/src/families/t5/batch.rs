//! The rows of one step of a T5, laid out for its forward pass.
//!
//! Place in the flow: the executor fills a batch from a plan; [`T5`](super::T5) runs it. A context has
//! two kinds of rows: those of the encoder, and the row that the decoder starts with. Its pages hold
//! both:
//!
//! ```text
//! position 0 .. n - 1   of encoder row i: key and value of the cross-attention of every decoder layer
//! position n            of the start row: key and value of the self-attention of every decoder layer
//! branch rows           of the beams: the same as of the start row
//! ```
//!
//! Invariants: every page that a step writes is written by one request and read by no other request of
//! that step ([`T5Batch::check_writes`]); the decoder's rows of a block are consecutive; contexts are
//! whole.

use std::ops::Range;

use beamline_kv_cache::PageId;

use beamline_compute::batch::BranchRows;
use beamline_compute::cpu::attention::{Block, MAX_ANCESTORS, Sees};
use beamline_compute::cpu::destinations::Destinations;
use beamline_compute::cpu::pages::{Destination, PAGE_SIZE};
use beamline_compute::cpu::relative::branch::OwnBlock;
use beamline_compute::page_uses::PageUses;

/// Rows of a step. All vectors are reused.
#[derive(Debug, Default)]
pub struct T5Batch {
    /// Token of each row of the encoder.
    pub(super) encoder_tokens: Vec<u32>,
    /// The rows of each request that is encoded.
    pub(super) sequences: Vec<Range<usize>>,
    /// Where the encoder's rows go for cross-attention.
    pub(super) cross: Destinations,
    /// Token of each row of the decoder.
    pub(super) decoder_tokens: Vec<u32>,
    /// Where the decoder's rows go for self-attention.
    pub(super) own: Destinations,
    /// Which of the decoder's rows a row sees.
    pub(super) own_blocks: Vec<OwnBlock>,
    /// Which rows of the encoder it sees.
    pub(super) cross_blocks: Vec<Block>,
    /// Page tables that blocks point into.
    pub(super) pages: Vec<PageId>,
    /// Ancestors that blocks point into.
    pub(super) lineage: Vec<u32>,
    /// All destinations, to be checked.
    all: Destinations,
    uses: PageUses,
}

/// The context of a request.
#[derive(Clone, Copy, Debug)]
pub struct WholeContext<'a> {
    /// Who asks; only compared with the others of the batch.
    pub owner: u32,
    /// Tokens of the encoder, at least one, and the one that the decoder starts with.
    pub tokens: &'a [u32],
    /// Whether all positions lie in pages already: then only the start row is computed, and nothing is
    /// written.
    pub cached: bool,
    /// Context pages from position 0 on.
    pub pages: &'a [PageId],
}

impl T5Batch {
    /// Makes the batch empty for another step, and keeps its memory.
    pub fn clear(&mut self) {
        self.clear_part();
        self.uses.clear();
    }

    /// Makes the batch empty for another part of the same step.
    pub fn clear_part(&mut self) {
        self.encoder_tokens.clear();
        self.sequences.clear();
        self.cross.clear();
        self.decoder_tokens.clear();
        self.own.clear();
        self.own_blocks.clear();
        self.cross_blocks.clear();
        self.pages.clear();
        self.lineage.clear();
        self.all.clear();
        self.uses.clear_part();
    }

    /// Rows of the decoder. The final states of all of them are wanted.
    pub fn rows(&self) -> usize {
        self.decoder_tokens.len()
    }

    /// Adds a context: its start row, and unless it is cached the rows of the encoder.
    ///
    /// # Errors
    ///
    /// When there is no row of the encoder, or too few pages.
    pub fn push_context(&mut self, context: WholeContext<'_>) -> Result<(), String> {
        let WholeContext { owner, tokens, cached, pages } = context;
        let Some((&start, encoded)) = tokens.split_last().filter(|(_, encoded)| !encoded.is_empty()) else {
            return Err("a context needs a token for the encoder and one that the decoder starts with".into());
        };
        let needed = tokens.len().div_ceil(PAGE_SIZE);
        let Some(pages) = pages.get(..needed) else {
            return Err(format!("{} pages for {} positions", pages.len(), tokens.len()));
        };
        let place = |position: usize| Destination::Context {
            page: pages[position / PAGE_SIZE],
            offset: position % PAGE_SIZE,
        };
        let table = self.push_pages(pages);
        self.uses.push_context(owner, table.clone(), if cached { table.len() } else { 0 });
        if !cached {
            let first = self.encoder_tokens.len();
            self.encoder_tokens.extend_from_slice(encoded);
            self.sequences.push(first..self.encoder_tokens.len());
            (0..encoded.len()).for_each(|position| self.push_cross(place(position)));
        }
        self.push_own(if cached { Destination::Cached } else { place(encoded.len()) });
        self.decoder_tokens.push(start);
        let rows = self.rows() - 1..self.rows();
        self.push_blocks(rows, encoded.len(), table, 0, 0..0, 0);
        Ok(())
    }

    /// Adds beams. A context of `context_len` positions has one row of the decoder, its last.
    ///
    /// # Errors
    ///
    /// When a beam has no ancestors or more than a row can see, or there are too few pages.
    pub fn push_beams(&mut self, beams: BranchRows<'_>) -> Result<(), String> {
        let BranchRows { owner, tokens, context_len, ancestors, lineage, context_pages, branch_pages } =
            beams;
        assert_eq!(lineage.len(), tokens.len() * ancestors, "a lineage for every row");
        if !(1..=MAX_ANCESTORS).contains(&ancestors) {
            return Err(format!("{ancestors} generated tokens, expected 1 to {MAX_ANCESTORS}"));
        }
        if context_len < 2 || context_pages.len() * PAGE_SIZE < context_len {
            return Err(format!("{} pages for {context_len} positions", context_pages.len()));
        }
        let table = self.push_pages(context_pages);
        let branches = self.push_pages(branch_pages);
        self.uses.push_branch(owner, table.clone(), branches.clone());
        let (first_row, first_lineage) = (self.rows(), self.lineage.len());
        self.lineage.extend_from_slice(lineage);
        self.decoder_tokens.extend_from_slice(tokens);
        for own in lineage.iter().skip(ancestors - 1).step_by(ancestors) {
            let (page, offset) = (*own as usize / PAGE_SIZE, *own as usize % PAGE_SIZE);
            self.push_own(Destination::Branch { page: branch_pages[page], offset });
        }
        for start in (0..tokens.len()).step_by(PAGE_SIZE) {
            let end = tokens.len().min(start + PAGE_SIZE);
            let lineage = first_lineage + start * ancestors;
            let rows = first_row + start..first_row + end;
            self.push_blocks(rows, context_len - 1, table.clone(), ancestors, branches.clone(), lineage);
        }
        Ok(())
    }

    /// Rows at the same decoder position of a request, over `encoded` rows of the encoder.
    fn push_blocks(
        &mut self,
        rows: Range<usize>,
        encoded: usize,
        context_pages: Range<usize>,
        ancestors: usize,
        branch_pages: Range<usize>,
        lineage: usize,
    ) {
        self.cross_blocks.push(Block {
            rows: rows.clone(),
            context_pages: context_pages.clone(),
            sees: Sees::Branch { context_len: encoded, ancestors: 0, lineage: 0, branch_pages: 0..0 },
        });
        let page = self.pages[context_pages.start + encoded / PAGE_SIZE];
        let start = (page, encoded % PAGE_SIZE);
        self.own_blocks.push(OwnBlock { rows, start, ancestors, lineage, branch_pages });
    }

    fn push_cross(&mut self, destination: Destination) {
        self.cross.push(destination);
        self.all.push(destination);
    }

    fn push_own(&mut self, destination: Destination) {
        self.own.push(destination);
        self.all.push(destination);
    }

    fn push_pages(&mut self, pages: &[PageId]) -> Range<usize> {
        let start = self.pages.len();
        self.pages.extend_from_slice(pages);
        start..self.pages.len()
    }

    /// Checks that no page is written by one request and touched by another in this step
    /// ([`PageUses::check`]), and no place in it twice. A forward pass requires this check.
    ///
    /// # Errors
    ///
    /// Which page or place is.
    pub fn check_writes(&mut self, pages: usize) -> Result<(), String> {
        let Self { uses, pages: table, all, cross, own, .. } = self;
        uses.check(pages, |at| table[at].0)?;
        all.check()?;
        cross.check()?;
        own.check()
    }
}
