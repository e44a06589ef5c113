//! The smallest possible driver of a step model: plans as the scheduler writes them, for requests that
//! run together.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::time::{Duration, Instant};

use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::{CacheConfig, HostMemory, KvCache, LruTier, Namespace, PageId, Publish, Transfer};
use beamline_model::step::{BranchStep, Chunk, Plan, Progress, Slot, StepModel};

/// Pages of the cache. Branch pages lie behind them, so an executor has twice as many.
pub const PAGES: usize = 64;

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

    /// Adds the next piece of work to a plan: at most `rows` context rows, or as many beams.
    pub fn plan(&mut self, rows: usize, plan: &mut Plan) {
        let mut pages = |table: &[PageId]| {
            let start = plan.pages.len();
            plan.pages.extend_from_slice(table);
            start..plan.pages.len()
        };
        if self.decoding {
            let (context_pages, branch_pages) = (pages(&self.context_pages), pages(&self.branch_pages));
            plan.branches.push(BranchStep {
                slot: self.slot,
                rows: rows.max(1),
                context_pages,
                branch_pages,
            });
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

/// Runs all requests together, each at its own pace, in chunks of `rows` rows and parts of as many beams.
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
                Progress::Prefilled | Progress::Partly { .. } | Progress::Expanded { .. } => {}
            }
        }
    }
    running.iter().for_each(|request| executor.close(request.slot));
    running.into_iter().map(|request| request.found.ok_or_else(|| request.failed.unwrap())).collect()
}

/// A cache of [`PAGES`] pages with a host tier.
pub fn cache(page_bytes: usize) -> KvCache {
    let tier = LruTier::new(1 << 30, None, std::sync::Arc::default());
    let config = CacheConfig {
        pages: PAGES as u32,
        page_size: PAGE_SIZE as u32,
        words_per_position: 1,
        sessions: 0,
        hash_key: [3; 32],
    };
    KvCache::new(config).unwrap().with_host_memory(HostMemory { tier: Box::new(tier), page_bytes, window: 0 })
}

/// Waits until what left has arrived.
pub fn wait_for_arrival(transfers: &[Transfer]) {
    let start = Instant::now();
    for (_, host) in transfers.iter().filter_map(Transfer::leaving) {
        while !host.is_filled() {
            assert!(start.elapsed() < Duration::from_secs(20), "a page has not arrived");
            std::thread::yield_now();
        }
    }
}

/// Runs a request over given context pages, the first positions computed already, after some transfers.
fn run_over<M: StepModel>(
    executor: &mut M,
    queued: Queued<M::Payload>,
    pages: &[PageId],
    computed: usize,
    transfers: Vec<Transfer>,
) -> M::Answer {
    let mut running = Running::of(0, &queued, &mut (PAGES as u32));
    running.context_pages = pages.to_vec();
    running.done = computed.min(queued.context_len - 1);
    executor.open(running.slot, queued.payload);
    let mut transfers = Some(transfers);
    let found = loop {
        let mut plan = Plan { transfers: transfers.take().unwrap_or_default(), ..Plan::default() };
        running.plan(50, &mut plan);
        for chunk in &mut plan.chunks {
            chunk.cached = chunk.positions.start.max(computed);
        }
        let mut outcomes = Vec::new();
        executor.step(&plan, &mut outcomes).unwrap();
        match outcomes.pop() {
            Some((_, Progress::Finished(found))) => break found,
            Some((_, Progress::Failed(why))) => panic!("{why}"),
            _ => running.found = None::<M::Answer>,
        }
    };
    executor.close(running.slot);
    found
}

/// The answer to the second of three requests. Its context was computed for the first, moved to host
/// memory while the third took the pages, and brought back. `words` identify the first two contexts, one
/// for each position. The executor has twice [`PAGES`] pages.
pub fn brought_back<M: StepModel>(
    executor: &mut M,
    page_bytes: usize,
    [visit, again, other]: [Queued<M::Payload>; 3],
    [before, after]: [&[u32]; 2],
) -> M::Answer {
    let mut cache = cache(page_bytes);
    let ns = Namespace::new(b"model", b"");
    let full = before.len() / PAGE_SIZE;
    let mut table = Vec::new();
    cache.allocate(before.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
    run_over(executor, visit, &table, 0, Vec::new());
    for index in 0..full {
        assert_eq!(cache.publish(&ns, &table, index, before), Publish::Published);
    }
    cache.release_chain(&table);

    // Somebody else takes every page, and writes to those that were the first one's.
    let (mut taken, mut moved) = (Vec::new(), Vec::new());
    cache.allocate(PAGES, &mut taken).unwrap();
    cache.take_transfers(&mut moved);
    assert_eq!(moved.len(), full);
    run_over(executor, other, &table, 0, moved.clone());
    cache.release_chain(&taken);
    wait_for_arrival(&moved);

    let (mut table, mut back) = (Vec::new(), Vec::new());
    assert_eq!(cache.match_prefix(&ns, None, after, after.len() - 1, &mut table), 0);
    let computed = cache.match_host(&ns, after, after.len() - 1, &table, &mut back);
    let equal = before.iter().zip(after).take_while(|(a, b)| a == b).count();
    assert_eq!(computed, equal.min(full * PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE);
    assert!(computed >= PAGE_SIZE);
    cache.allocate(after.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
    let imports = table.iter().zip(back).map(|(&page, from)| Transfer::Import { from, page }).collect();
    run_over(executor, again, &table, computed, imports)
}
