//! A model without floats that checks every plan it gets.
//!
//! Every page cell holds the number that stands for its keys and values. The model writes this
//! number for each row that it computes. It reads the number of each row that is attended to, and
//! compares it with the number that the request's own words demand there.

use std::collections::HashSet;

use beamline_kv_cache::{PageContents, PageId, ReuseClass, Transfer, TransferError};
use beamline_model::step::{BranchStep, Chunk, ContextShape, Plan, Progress, Slot, StepError, StepModel};

use crate::{
    rng::{Rng, mix},
    story::{Fault, Story},
};

/// The state of an open slot.
struct Open {
    story: Story,
    contents: Vec<u64>,
    /// Context positions known to lie in pages; unknown before the first chunk.
    computed: Option<usize>,
    expansions: usize,
    width: usize,
    /// Beams alive after every expansion.
    rows: Vec<usize>,
    /// Leading beams of the current branch step that are computed.
    part: usize,
    digest: u64,
}

pub(crate) struct SimModel {
    page_size: usize,
    cells: Vec<u64>,
    slots: Vec<Option<Open>>,
    /// Number of entries of the current plan that name each page.
    named: Vec<u32>,
    rng: Rng,
    /// Steps that fail for no reason, per thousand.
    pub(crate) failing: u32,
    /// Requests that were in a failed step with others: they may never share one again.
    suspects: HashSet<u64>,
    /// Requests that were alone in a failed step: they have failed.
    pub(crate) failed_alone: HashSet<u64>,
}

impl SimModel {
    pub(crate) fn new(pages: usize, page_size: usize, slots: usize, seed: u64) -> Self {
        Self {
            page_size,
            cells: vec![0; pages * page_size],
            slots: (0..slots).map(|_| None).collect(),
            named: vec![0; pages],
            rng: Rng::new(mix(seed, 0x40de1)),
            failing: 0,
            suspects: HashSet::new(),
            failed_alone: HashSet::new(),
        }
    }

    pub(crate) fn open_slots(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn cell(&self, table: &[PageId], position: usize) -> usize {
        table[position / self.page_size].0 as usize * self.page_size + position % self.page_size
    }

    fn story(&self, slot: Slot) -> &Story {
        &self.slots[slot.0 as usize].as_ref().expect("the slot is open").story
    }

    fn chunk(&mut self, plan: &Plan, chunk: &Chunk) -> Progress<u64> {
        let Self { page_size, .. } = *self;
        let table = &plan.pages[chunk.context_pages.clone()];
        let mut open = self.slots[chunk.slot.0 as usize].take().expect("the slot is open");
        let (start, end, len) = (chunk.positions.start, chunk.positions.end, open.story.context_len);
        assert!(start < end && end <= len);
        assert_eq!(table.len(), end.div_ceil(page_size), "enough pages and no more");
        if chunk.cached > start {
            // A request that only warms the cache goes as far as its last whole page.
            let shared = open.story.findable_positions(page_size);
            let last = if open.story.is_warm() { shared } else { len };
            assert_eq!(
                (start, end, chunk.cached),
                (last - 1, last, last),
                "only a last row is computed again"
            );
        } else {
            assert_eq!(start, chunk.cached, "positions are consecutive");
        }
        match open.computed {
            None => {
                let shared = open.story.reusable_positions();
                let again = self.suspects.contains(&open.story.id);
                assert!(chunk.cached <= shared || again, "reused too much");
                let exact = open.story.reuse == ReuseClass::Exact && chunk.cached > 0;
                assert!(!exact || again || chunk.cached == len, "a part of a context is of no use");
            }
            Some(computed) => assert_eq!(computed, chunk.cached, "positions are consecutive"),
        }
        let again = open.story.reuse == ReuseClass::Exact && chunk.cached == len;
        if open.story.shape == ContextShape::Whole && (start, end) != (0, len) && !again {
            self.slots[chunk.slot.0 as usize] = Some(open);
            return Progress::Failed("the context was cut".into());
        }
        for position in 0..start.max(chunk.cached) {
            let cell = self.cells[self.cell(table, position)];
            assert_eq!(cell, open.contents[position], "position {position} of {:?} is wrong", chunk.slot);
        }
        for position in chunk.cached.max(start)..end {
            let page = table[position / page_size];
            assert_eq!(self.named[page.0 as usize], 1, "a shared page is written");
            let cell = self.cell(table, position);
            self.cells[cell] = open.contents[position];
        }
        open.computed = Some(end);
        if matches!(open.story.fault, Fault::Fails(0)) {
            // A failed request may leave anything in its pages.
            for position in chunk.cached.max(start)..end {
                let cell = self.cell(table, position);
                self.cells[cell] = self.rng.next();
            }
        }

        let story = &open.story;
        let last_page_full = story.findable_positions(page_size);
        let progress = if story.is_warm() {
            assert!(end <= last_page_full && chunk.expand.is_none(), "nobody could use these rows");
            if story.fault == Fault::Fails(0) {
                Progress::Failed("as the story goes".into())
            } else if story.fault == Fault::Babbles(0) {
                Progress::Expanded { rows: 1 }
            } else {
                Progress::Prefilled
            }
        } else if story.fault == Fault::Fails(0) {
            Progress::Failed("as the story goes".into())
        } else if story.fault == Fault::Babbles(0) {
            Progress::Expanded { rows: story.beam_width + 1 }
        } else if end < len {
            assert_eq!(chunk.expand, None);
            Progress::Prefilled
        } else {
            let width = chunk.expand.expect("the last row is expanded");
            assert!((story.min_beam_width..=story.beam_width).contains(&width));
            open.width = width;
            open.digest = Story::first_digest(self.cells[self.cell(table, len - 1)], width);
            expand(&mut open)
        };
        self.slots[chunk.slot.0 as usize] = Some(open);
        progress
    }

    fn branch(&mut self, plan: &Plan, branch: &BranchStep) -> Progress<u64> {
        let context = &plan.pages[branch.context_pages.clone()];
        let rows = &plan.pages[branch.branch_pages.clone()];
        let mut open = self.slots[branch.slot.0 as usize].take().expect("the slot is open");
        let story = &open.story;
        assert_eq!(open.computed, Some(story.context_len), "a decode has its whole context");
        assert!(open.expansions > 0, "the first expansion uses the last context row");
        assert_eq!(context.len(), story.context_len.div_ceil(self.page_size));
        for position in 0..story.context_len {
            assert_eq!(self.cells[self.cell(context, position)], open.contents[position]);
        }
        assert!(rows.iter().all(|page| self.named[page.0 as usize] == 1), "branch pages are shared");
        let step = open.expansions - 1;
        for (step, alive) in open.rows[..step].iter().enumerate() {
            for beam in 0..*alive {
                let cell = self.cell(rows, story.first_row(step) + beam);
                assert_eq!(self.cells[cell], story.branch_row(step, beam), "an ancestor was overwritten");
            }
        }
        let left = open.rows[step] - open.part;
        assert!((1..=left).contains(&branch.rows), "as many beams as are left, or some of them");
        for beam in 0..open.part {
            let cell = self.cell(rows, story.first_row(step) + beam);
            assert_eq!(
                self.cells[cell],
                story.branch_row(step, beam),
                "a beam of an earlier part was overwritten"
            );
        }
        let part = open.part..open.part + branch.rows;
        for beam in part.clone() {
            let cell = self.cell(rows, story.first_row(step) + beam);
            self.cells[cell] = story.branch_row(step, beam);
            open.digest = mix(open.digest, self.cells[cell]);
        }
        let progress = if branch.rows < left {
            open.part = part.end;
            Progress::Partly { left: left - branch.rows }
        } else {
            open.part = 0;
            expand(&mut open)
        };
        self.slots[branch.slot.0 as usize] = Some(open);
        progress
    }

    /// Moves pages. A page that is filled is read and written by at most one request.
    fn transfer(&mut self, plan: &Plan) {
        for transfer in &plan.transfers {
            if let Transfer::Import { page, .. } = transfer {
                assert!(self.named[page.0 as usize] <= 1, "a page comes back into others' hands");
            }
            transfer.carry_out(self).expect("the transfer is possible");
        }
    }

    /// Whether this step must fail as a whole.
    fn fails(&mut self, plan: &Plan) -> bool {
        let poisoned = plan.chunks.iter().any(|chunk| match self.story(chunk.slot).fault {
            Fault::Poison(0) => true,
            Fault::Poison(1) => chunk.expand.is_some(),
            _ => false,
        }) || plan.branches.iter().any(|branch| {
            let open = self.slots[branch.slot.0 as usize].as_ref().expect("the slot is open");
            open.story.fault == Fault::Poison(open.expansions + 1)
        });
        poisoned || self.rng.permille(self.failing)
    }

    /// Simulates what a failed step leaves behind: anything, in every place where it was allowed to
    /// write.
    fn wreck(&mut self, plan: &Plan) {
        if self.rng.permille(500) {
            self.transfer(plan);
        }
        for transfer in &plan.transfers {
            if let Transfer::Import { page, .. } = transfer {
                self.cells[page.0 as usize * self.page_size] = self.rng.next();
            }
        }
        for chunk in &plan.chunks {
            let table = &plan.pages[chunk.context_pages.clone()];
            for position in chunk.cached.max(chunk.positions.start)..chunk.positions.end {
                let cell = self.cell(table, position);
                self.cells[cell] = self.rng.next();
            }
        }
        for branch in &plan.branches {
            for page in &plan.pages[branch.branch_pages.clone()] {
                self.cells[page.0 as usize * self.page_size] = self.rng.next();
            }
        }
    }

    fn slots_of(plan: &Plan) -> impl Iterator<Item = Slot> {
        plan.chunks.iter().map(|chunk| chunk.slot).chain(plan.branches.iter().map(|branch| branch.slot))
    }

    /// Adds the tables of the plan to the counts, or subtracts them.
    fn name_pages(&mut self, plan: &Plan, by: i32) {
        let ranges = plan.chunks.iter().map(|chunk| &chunk.context_pages);
        let ranges = ranges.chain(plan.branches.iter().flat_map(|b| [&b.context_pages, &b.branch_pages]));
        for page in ranges.flat_map(|range| &plan.pages[range.clone()]) {
            let named = &mut self.named[page.0 as usize];
            *named = named.checked_add_signed(by).expect("counts match");
        }
    }

    fn check_company(&mut self, plan: &Plan) {
        let slots: Vec<Slot> = Self::slots_of(plan).collect();
        let distinct: HashSet<Slot> = slots.iter().copied().collect();
        assert_eq!(distinct.len(), slots.len(), "one entry per request");
        if slots.len() > 1 && !self.suspects.is_empty() {
            for &slot in &slots {
                assert!(!self.suspects.contains(&self.story(slot).id), "a suspect is served alone");
            }
        }
    }
}

/// Computes the next expansion of a request.
fn expand(open: &mut Open) -> Progress<u64> {
    open.expansions += 1;
    let story = &open.story;
    assert!(open.expansions <= story.generated_steps, "more steps than asked for");
    if story.fault == Fault::Fails(open.expansions) {
        return Progress::Failed("as the story goes".into());
    }
    if story.fault == Fault::Babbles(open.expansions) {
        return Progress::Prefilled;
    }
    if story.is_last(open.expansions) {
        return Progress::Finished(open.digest);
    }
    let rows = story.rows_after(open.expansions, open.width);
    open.rows.push(rows);
    Progress::Expanded { rows }
}

impl PageContents for SimModel {
    fn page_bytes(&self) -> usize {
        self.page_size * 8
    }

    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        let cells = &self.cells[page.0 as usize * self.page_size..][..self.page_size];
        for (bytes, cell) in to.as_chunks_mut().0.iter_mut().zip(cells) {
            *bytes = cell.to_le_bytes();
        }
        Ok(())
    }

    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError> {
        let cells = &mut self.cells[page.0 as usize * self.page_size..][..self.page_size];
        for (cell, bytes) in cells.iter_mut().zip(from.as_chunks().0) {
            *cell = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

impl StepModel for SimModel {
    type Payload = Story;
    type Answer = u64;

    fn open(&mut self, slot: Slot, story: Story) {
        let place = &mut self.slots[slot.0 as usize];
        assert!(place.is_none(), "{slot:?} is open already");
        let mut contents = Vec::with_capacity(story.context_len);
        story.contents(&mut contents);
        *place = Some(Open {
            story,
            contents,
            computed: None,
            expansions: 0,
            width: 0,
            rows: Vec::new(),
            part: 0,
            digest: 0,
        });
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<u64>)>) -> Result<(), StepError> {
        assert!(!plan.is_empty() && outcomes.is_empty());
        self.check_company(plan);
        if self.fails(plan) {
            self.wreck(plan);
            let ids: Vec<u64> = Self::slots_of(plan).map(|slot| self.story(slot).id).collect();
            if let [id] = ids.as_slice() {
                self.failed_alone.insert(*id);
            } else {
                self.suspects.extend(&ids);
            }
            return Err(StepError("as the story goes".into()));
        }
        self.name_pages(plan, 1);
        self.transfer(plan);
        for chunk in &plan.chunks {
            let progress = self.chunk(plan, chunk);
            outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            let progress = self.branch(plan, branch);
            outcomes.push((branch.slot, progress));
        }
        self.name_pages(plan, -1);
        Ok(())
    }

    fn close(&mut self, slot: Slot) {
        assert!(self.slots[slot.0 as usize].take().is_some(), "{slot:?} is not open");
    }
}
