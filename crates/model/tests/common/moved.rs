//! A context that was computed, moved to host memory while somebody else took its pages, and brought back.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::time::{Duration, Instant};

use beamline_kv_cache::{CacheConfig, HostMemory, KvCache, LruTier, Namespace, PageId, Publish, Transfer};
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::decode::Normalization;
use beamline_model::executor::{Found, Job};
use beamline_model::step::{Plan, Progress, StepModel};

use crate::common::{Loaded, Running, run};

/// Pages of the cache. Branch pages lie behind them, so an executor has twice as many.
pub const PAGES: usize = 64;
const WIDTH: usize = 20;

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

fn job(loaded: &Loaded, first: usize, items: usize) -> Job {
    let catalog = &loaded.catalog;
    let all: Vec<String> = catalog.items().map(|item| catalog.item_id(item).to_owned()).collect();
    let history: Vec<String> = (0..items).map(|item| all[(first + item * 7) % all.len()].clone()).collect();
    loaded.job(loaded.prompt(&history), &[], Normalization::FullVocab)
}

/// Runs a job over context pages that are given, the first of them computed already, after some transfers.
fn run_over(
    executor: &mut impl StepModel<Payload = Job, Answer = Found>,
    job: &Job,
    pages: &[PageId],
    computed: usize,
    transfers: Vec<Transfer>,
) -> Found {
    let mut running = Running::new(0, job, WIDTH, &mut (PAGES as u32));
    running.context_pages = pages.to_vec();
    running.done = computed.min(job.tokens.len() - 1);
    executor.open(running.slot, job.clone());
    let mut transfers = Some(transfers);
    let found = loop {
        let mut plan = Plan { transfers: transfers.take().unwrap_or_default(), ..Plan::default() };
        running.plan(50, &mut plan);
        for chunk in &mut plan.chunks {
            chunk.cached = chunk.positions.start.max(computed);
        }
        let mut outcomes = Vec::new();
        executor.step(&plan, &mut outcomes).unwrap();
        if let Some((_, Progress::Finished(found))) = outcomes.pop() {
            break found;
        }
    };
    executor.close(running.slot);
    found
}

/// What is found for a context that was never seen, and for one of which most was moved away and back. `executor` makes one of so many pages,
/// of `page_bytes` bytes each.
pub fn cold_and_brought_back<M: StepModel<Payload = Job, Answer = Found>>(
    loaded: &Loaded,
    page_bytes: usize,
    executor: impl Fn(usize) -> M,
) -> [Found; 2] {
    let mut cache = cache(page_bytes);
    let ns = Namespace::new(b"model", b"");
    let (visit, again) = (job(loaded, 3, 40), job(loaded, 3, 42));
    let cold = run(&mut executor(PAGES), again.clone(), WIDTH, usize::MAX >> 1).unwrap();
    let mut executor = executor(2 * PAGES);
    let full = visit.tokens.len() / PAGE_SIZE;
    let mut table = Vec::new();
    cache.allocate(visit.tokens.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
    run_over(&mut executor, &visit, &table, 0, Vec::new());
    for index in 0..full {
        assert_eq!(cache.publish(&ns, &table, index, &visit.tokens), Publish::Published);
    }
    cache.release_chain(&table);

    // Somebody else takes every page, and writes to those that were the first one's.
    let other = job(loaded, 5, 40);
    let (mut taken, mut moved) = (Vec::new(), Vec::new());
    cache.allocate(PAGES, &mut taken).unwrap();
    cache.take_transfers(&mut moved);
    assert_eq!(moved.len(), full);
    run_over(&mut executor, &other, &table, 0, moved.clone());
    cache.release_chain(&taken);
    wait_for_arrival(&moved);

    let (mut table, mut back) = (Vec::new(), Vec::new());
    let tokens = &again.tokens;
    assert_eq!(cache.match_prefix(&ns, None, tokens, tokens.len() - 1, &mut table), 0);
    let computed = cache.match_host(&ns, tokens, tokens.len() - 1, &table, &mut back);
    let equal = visit.tokens.iter().zip(tokens.iter()).take_while(|(a, b)| a == b).count();
    assert_eq!(computed, equal.min(full * PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE);
    assert!(computed >= PAGE_SIZE);
    cache.allocate(tokens.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
    let imports = table.iter().zip(back).map(|(&page, from)| Transfer::Import { from, page }).collect();
    let warm = run_over(&mut executor, &again, &table, computed, imports);
    [cold, warm]
}
