//! A context that was moved to host memory and back is the one that was computed, bit for bit.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod common;

use beamline_kv_cache::{
    CacheConfig, HostMemory, KvCache, LruTier, Namespace, PageContents, PageId, Publish, Transfer,
};
use beamline_model::cpu::pages::{PAGE_SIZE, PageStore};
use beamline_model::decode::Normalization;
use beamline_model::executor::{Executor, Found, Job};
use beamline_model::step::{Plan, Progress, StepModel};
use common::{CASES, Loaded, Running, run};

const PAGES: usize = 64;
const WIDTH: usize = 20;

fn bits(found: &Found) -> Vec<(u32, u64)> {
    found.hypotheses.iter().map(|h| (h.leaf.0, h.score.to_bits())).collect()
}

fn job(loaded: &Loaded, first: usize, items: usize) -> Job {
    let catalog = &loaded.catalog;
    let all: Vec<String> = catalog.items().map(|item| catalog.item_id(item).to_owned()).collect();
    let history: Vec<String> = (0..items).map(|item| all[(first + item * 7) % all.len()].clone()).collect();
    loaded.job(loaded.prompt(&history), &[], Normalization::FullVocab)
}

/// Runs a job over context pages that are given, the first of them computed already, after some transfers.
fn run_over(
    executor: &mut Executor,
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

#[test]
fn a_context_that_was_moved_away_and_back_changes_no_bit() {
    for case in CASES {
        let loaded = Loaded::open(case);
        let config = loaded.model.config();
        let page_bytes = PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim);
        let store =
            PageStore::new(config.layers, config.kv_heads, config.head_dim, config.head_dim, 1).unwrap();
        assert_eq!(store.page_bytes(), page_bytes);
        let tier = LruTier::new(1 << 30, None, std::sync::Arc::default());
        let mut cache = KvCache::new(CacheConfig {
            pages: PAGES as u32,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: 0,
            hash_key: [3; 32],
        })
        .unwrap()
        .with_host_memory(HostMemory { tier: Box::new(tier), page_bytes, window: 0 });
        let ns = Namespace::new(b"model", b"");
        // Branch pages lie behind those of the cache.
        let mut executor = loaded.executor(2 * PAGES);

        let (visit, again) = (job(&loaded, 3, 40), job(&loaded, 3, 42));
        let cold = run(&mut loaded.executor(PAGES), again.clone(), WIDTH, usize::MAX >> 1).unwrap();
        let full = visit.tokens.len() / PAGE_SIZE;
        let mut table = Vec::new();
        cache.allocate(visit.tokens.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
        run_over(&mut executor, &visit, &table, 0, Vec::new());
        for index in 0..full {
            assert_eq!(cache.publish(&ns, &table, index, &visit.tokens), Publish::Published);
        }
        cache.release_chain(&table);

        // Somebody else takes every page, and writes to those that were the first one's.
        let other = job(&loaded, 5, 40);
        let (mut taken, mut moved) = (Vec::new(), Vec::new());
        cache.allocate(PAGES, &mut taken).unwrap();
        cache.take_transfers(&mut moved);
        assert_eq!(moved.len(), full);
        run_over(&mut executor, &other, &table, 0, moved);
        cache.release_chain(&taken);

        let (mut table, mut back) = (Vec::new(), Vec::new());
        let tokens = &again.tokens;
        assert_eq!(cache.match_prefix(&ns, None, tokens, tokens.len() - 1, &mut table), 0);
        let computed = cache.match_host(&ns, tokens, tokens.len() - 1, &table, &mut back);
        let equal = visit.tokens.iter().zip(tokens.iter()).take_while(|(a, b)| a == b).count();
        assert_eq!(computed, equal.min(full * PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE, "{case}");
        assert!(computed >= PAGE_SIZE, "{case}");
        cache.allocate(tokens.len().div_ceil(PAGE_SIZE), &mut table).unwrap();
        let imports = table.iter().zip(back).map(|(&page, from)| Transfer::Import { from, page }).collect();
        let warm = run_over(&mut executor, &again, &table, computed, imports);
        assert_eq!(bits(&cold), bits(&warm), "{case}");
    }
}
