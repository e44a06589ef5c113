//! The smallest possible driver of a step model: plans as the scheduler writes them, for requests that run together.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use beamline_kv_cache::PageId;
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::step::{BranchStep, Chunk, Plan, Progress, Slot, StepModel};

/// A request that waits.
pub struct Queued<P> {
    pub payload: P,
    pub context_len: usize,
    pub width: usize,
    /// Branch rows that it holds at a time.
    pub branch_rows: usize,
}

/// A request on its way.
pub struct Running<A> {
    pub slot: Slot,
    pub context_len: usize,
    pub done: usize,
    pub width: usize,
    pub context_pages: Vec<PageId>,
    pub branch_pages: Vec<PageId>,
    pub decoding: bool,
    pub found: Option<A>,
    pub failed: Option<String>,
}

impl<A> Running<A> {
    pub fn of<P>(slot: u32, queued: &Queued<P>, next_page: &mut u32) -> Self {
        let mut take = |rows: usize| -> Vec<PageId> {
            let count = rows.div_ceil(PAGE_SIZE) as u32;
            *next_page += count;
            (*next_page - count..*next_page).map(PageId).collect()
        };
        Self {
            slot: Slot(slot),
            context_len: queued.context_len,
            done: 0,
            width: queued.width,
            context_pages: take(queued.context_len),
            branch_pages: take(queued.branch_rows),
            decoding: false,
            found: None,
            failed: None,
        }
    }

    fn goes_on(&self) -> bool {
        self.found.is_none() && self.failed.is_none()
    }

    /// Adds the next piece of work to a plan: at most `rows` context rows, or a branch step.
    pub fn plan(&mut self, rows: usize, plan: &mut Plan) {
        let mut pages = |table: &[PageId]| {
            let start = plan.pages.len();
            plan.pages.extend_from_slice(table);
            start..plan.pages.len()
        };
        if self.decoding {
            let (context_pages, branch_pages) = (pages(&self.context_pages), pages(&self.branch_pages));
            plan.branches.push(BranchStep { slot: self.slot, context_pages, branch_pages });
        } else {
            let end = self.context_len.min(self.done + rows.max(1));
            let last = end == self.context_len;
            let context_pages = pages(&self.context_pages);
            plan.chunks.push(Chunk {
                slot: self.slot,
                positions: self.done..end,
                cached: 0,
                context_pages,
                expand: last.then_some(self.width),
            });
            self.done = end;
            self.decoding = last;
        }
    }
}

/// Runs all requests together, each at its own pace, in chunks of `rows` rows.
pub fn run_together<M: StepModel>(
    executor: &mut M,
    queued: Vec<Queued<M::Payload>>,
    rows: usize,
) -> Vec<Result<M::Answer, String>> {
    let mut next_page = 0;
    let mut running = Vec::new();
    for (index, queued) in queued.into_iter().enumerate() {
        let request = Running::of(index as u32, &queued, &mut next_page);
        executor.open(request.slot, queued.payload);
        running.push(request);
    }
    while running.iter().any(Running::goes_on) {
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        for request in running.iter_mut().filter(|request| request.goes_on()) {
            request.plan(rows, &mut plan);
        }
        executor.step(&plan, &mut outcomes).unwrap();
        for (slot, progress) in outcomes {
            let request = &mut running[slot.0 as usize];
            match progress {
                Progress::Finished(answer) => request.found = Some(answer),
                Progress::Failed(why) => request.failed = Some(why),
                Progress::Prefilled | Progress::Expanded { .. } => {}
            }
        }
    }
    running.iter().for_each(|request| executor.close(request.slot));
    running.into_iter().map(|request| request.found.ok_or_else(|| request.failed.unwrap())).collect()
}
