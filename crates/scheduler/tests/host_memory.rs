//! Contexts that come back from host memory, by example. The simulation shows that they come back
//! right.

// Helper functions are test code too.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::sync::Arc;

use beamline_kv_cache::{
    CacheConfig, HostMemory, LruTier, Namespace, PageContents, PageId, ReuseClass, Transfer, TransferError,
};
use beamline_model::step::{ContextShape, Plan, Progress};
use beamline_scheduler::{
    Ended, Ending, Event, Failure, Micros, Priority, Request, RequestId, Scheduler, SchedulerConfig,
};

const PAGE_SIZE: usize = 4;

/// A device whose pages hold nothing: these tests only check that pages are moved.
struct Nowhere;

impl PageContents for Nowhere {
    fn page_bytes(&self) -> usize {
        1
    }

    fn export(&self, _page: PageId, _to: &mut [u8]) -> Result<(), TransferError> {
        Ok(())
    }

    fn import(&mut self, _from: &[u8], _page: PageId) -> Result<(), TransferError> {
        Ok(())
    }
}

/// A scheduler over 16 pages and a larger host memory, and the events that it produced.
struct Bench {
    scheduler: Scheduler<()>,
    plan: Plan,
    events: Vec<Event<(), u64>>,
}

impl Bench {
    fn new(max_step_transfers: usize, window: usize) -> Self {
        let config = SchedulerConfig { max_step_transfers, max_context: 64, ..SchedulerConfig::default() };
        let cache = CacheConfig {
            pages: 16,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: 8,
            hash_key: [1; 32],
        };
        let tier = Box::new(LruTier::new(1 << 20, None, Arc::default()));
        let scheduler = Scheduler::new(SchedulerConfig { max_beam_width: 16, ..config }, cache).unwrap();
        let scheduler = scheduler.with_host_memory(HostMemory { tier, page_bytes: 1, window });
        Self { scheduler, plan: Plan::default(), events: Vec::new() }
    }

    fn submit(&mut self, request: Request<()>) {
        assert_eq!(self.scheduler.submit(Micros(0), request), Ok(()));
    }

    fn plan(&mut self) {
        self.scheduler.plan(Micros(0), &mut self.plan, &mut self.events);
    }

    /// Commits the step: beams of one row, three expansions.
    fn commit(&mut self) {
        for transfer in &self.plan.transfers {
            transfer.carry_out(&mut Nowhere).unwrap();
        }
        let chunks = self.plan.chunks.iter().map(|chunk| match chunk.expand {
            Some(_) => (chunk.slot, Progress::Expanded { rows: 1 }),
            None => (chunk.slot, Progress::Prefilled),
        });
        let branches = self.plan.branches.iter().map(|branch| (branch.slot, Progress::Finished(7)));
        let mut outcomes = chunks.chain(branches).collect();
        self.scheduler.commit(Micros(1), Micros(1), &mut outcomes, &mut self.events);
        self.scheduler.check_invariants();
    }

    fn imports(&self) -> usize {
        self.plan.transfers.iter().filter(|transfer| matches!(transfer, Transfer::Import { .. })).count()
    }

    fn exports(&self) -> usize {
        self.plan.transfers.len() - self.imports()
    }

    fn finish(&mut self) -> Vec<Ended<u64>> {
        while !self.scheduler.is_idle() {
            self.plan();
            self.commit();
        }
        self.ended()
    }

    fn ended(&mut self) -> Vec<Ended<u64>> {
        let ended = |event| if let Event::Ended(ended) = event { Some(ended) } else { None };
        self.events.drain(..).filter_map(ended).collect()
    }

    /// Computes a user's context of ten pages, and displaces it by another's of sixteen.
    fn displace(&mut self) {
        self.submit(request(1, 41));
        self.finish();
        self.submit(request(2, 60));
        self.finish();
        assert!(self.scheduler.cache().stats().host.pages >= 10);
    }
}

/// A decode over a context of `len` positions that is the same for every request of this user.
fn request(user: u32, len: usize) -> Request<()> {
    Request {
        id: RequestId(user.into()),
        namespace: Namespace::new(b"model", b"tenant"),
        session: None,
        words: (0..len as u32).map(|position| user * 1000 + position).collect(),
        context_len: len,
        reuse: ReuseClass::CrossRequest,
        shape: ContextShape::Causal,
        beam_width: 1,
        beam_widths: None,
        min_beam_width: 1,
        priority: Priority::Interactive,
        keeps_branches: true,
        generated_steps: 3,
        deadline: None,
        payload: Arc::new(()),
    }
}

#[test]
fn a_displaced_context_comes_back_and_only_the_rest_is_computed() {
    let mut bench = Bench::new(4, 0);
    bench.displace();
    bench.submit(request(1, 43));
    bench.plan();
    // No other request waits, so all pages come at once.
    assert_eq!(bench.imports(), 10);
    let [chunk] = &bench.plan.chunks[..] else { panic!("{:?}", bench.plan.chunks) };
    assert_eq!(chunk.positions, 40..43);
    bench.commit();
    let ended = bench.finish();
    assert_eq!((ended[0].usage.context_tokens, ended[0].usage.cached_tokens), (43, 40));
    let stats = bench.scheduler.stats();
    assert_eq!((stats.restored_tokens, stats.restored_pages), (40, 10));
    // The context is on the device again, for every request.
    bench.submit(request(1, 43));
    assert_eq!(bench.finish()[0].usage.cached_tokens, 40);
    assert_eq!((bench.scheduler.stats().restored_tokens, bench.scheduler.stats().hit_tokens), (40, 40));
}

#[test]
fn others_do_not_wait_for_what_they_do_not_need() {
    let mut bench = Bench::new(4, 0);
    bench.displace();
    bench.submit(Request { beam_width: 4, min_beam_width: 4, ..request(3, 2) });
    bench.submit(request(1, 43));
    let (mut imports, mut served) = (Vec::new(), Vec::new());
    while !bench.scheduler.is_idle() {
        bench.plan();
        imports.push(bench.imports());
        served.push(bench.plan.chunks.len() + bench.plan.branches.len());
        bench.commit();
    }
    // There are ten pages. While another request is served, at most four come in a step, less the
    // pages that are evicted for them in the same step.
    assert!(imports[..2].iter().all(|moved| (1..=4).contains(moved)), "{imports:?}");
    assert_eq!(imports.iter().sum::<usize>(), 10);
    assert_eq!(served[0], 1, "nothing is computed over pages that are not back");
    let ended = bench.ended();
    assert_eq!(ended.iter().map(|ended| ended.id.0).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(ended[1].usage.cached_tokens, 40);
}

#[test]
fn what_a_failed_step_was_to_bring_back_is_ordered_again() {
    let mut bench = Bench::new(4, 0);
    bench.displace();
    bench.submit(request(3, 2));
    bench.submit(request(1, 43));
    bench.plan();
    let before = bench.plan.transfers.clone();
    let wanted = bench.imports();
    bench.scheduler.fail_step(Micros(1), Failure::Step("smoke".into()), &mut bench.events);
    bench.scheduler.check_invariants();
    assert!(wanted > 0);
    let mut again = Vec::new();
    while !bench.scheduler.is_idle() {
        bench.plan();
        again.extend(bench.plan.transfers.clone());
        bench.commit();
    }
    let imports = |transfers: &[Transfer]| {
        transfers
            .iter()
            .filter(|transfer| matches!(transfer, Transfer::Import { .. }))
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(imports(&again).len(), 10);
    assert!(imports(&before).iter().all(|transfer| again.contains(transfer)));
    assert!(bench.ended().iter().any(|ended| ended.usage.cached_tokens == 40));
}

#[test]
fn a_request_that_is_cancelled_while_its_pages_come_back_leaves_nothing_behind() {
    let mut bench = Bench::new(1, 0);
    bench.displace();
    bench.submit(request(3, 2));
    bench.submit(request(1, 43));
    bench.plan();
    bench.commit();
    assert!(bench.scheduler.cancel(Micros(1), RequestId(1), &mut bench.events));
    bench.scheduler.check_invariants();
    bench.finish();
    bench.submit(request(1, 43));
    assert_eq!(bench.finish().last().unwrap().usage.cached_tokens, 40, "host memory still has it");
}

#[test]
fn warming_brings_a_context_back_to_the_device() {
    let mut bench = Bench::new(4, 0);
    bench.displace();
    bench.submit(Request { generated_steps: 0, ..request(1, 43) });
    let ended = bench.finish();
    assert_eq!((&ended[0].ending, ended[0].usage.cached_tokens), (&Ending::Warmed, 40));
    bench.submit(request(1, 43));
    bench.plan();
    assert_eq!(bench.imports(), 0);
    bench.commit();
    assert_eq!(bench.finish()[0].usage.cached_tokens, 40);
}

#[test]
fn pages_are_copied_ahead_a_few_per_step() {
    let mut bench = Bench::new(2, 16);
    bench.submit(request(1, 41));
    let mut exports = Vec::new();
    let mut run = |bench: &mut Bench| {
        while !bench.scheduler.is_idle() {
            bench.plan();
            exports.push(bench.exports());
            bench.commit();
        }
    };
    run(&mut bench);
    // Held pages are not next to be evicted; those of an earlier visit are, two per step.
    bench.submit(request(3, 2));
    run(&mut bench);
    bench.submit(request(4, 2));
    run(&mut bench);
    bench.submit(request(5, 2));
    run(&mut bench);
    assert_eq!(exports, [0, 0, 2, 2, 2, 2, 2, 0]);
    // So the next one evicts without copying.
    bench.submit(request(2, 60));
    bench.plan();
    assert_eq!(bench.exports(), 0);
    bench.commit();
    bench.finish();
}
