//! Tests of the whole cache: each rule by example, and all of them together against a naive reference.

mod collisions;
mod host;
mod model;
mod reference;
mod rules;
mod stale;

use crate::{CacheConfig, KvCache, Namespace, PageId, Publish};

/// Positions per page in these tests.
const PAGE_SIZE: usize = 4;

fn config(pages: u32) -> CacheConfig {
    CacheConfig { pages, page_size: PAGE_SIZE as u32, words_per_position: 1, sessions: 4, hash_key: [42; 32] }
}

fn cache(pages: u32) -> KvCache {
    KvCache::new(config(pages)).unwrap()
}

fn ns(name: &str) -> Namespace {
    Namespace::new(b"model", name.as_bytes())
}

/// A context of `pages` whole pages; different seeds differ in every page.
fn context(seed: u32, pages: usize) -> Vec<u32> {
    (0..(pages * PAGE_SIZE) as u32).map(|position| seed * 1000 + position).collect()
}

/// Does what a request does: match, allocate the rest, compute, publish. Returns its table.
fn compute(cache: &mut KvCache, ns: &Namespace, words: &[u32]) -> Vec<PageId> {
    let mut table = Vec::new();
    let covered = cache.match_prefix(ns, None, words, words.len(), &mut table) / PAGE_SIZE;
    let pages = words.len() / PAGE_SIZE;
    cache.allocate(pages - covered, &mut table).unwrap();
    for index in covered..pages {
        if let Publish::Duplicate(existing) = cache.publish(ns, &table, index, words) {
            table[index] = existing;
        }
    }
    cache.check_invariants();
    table
}

/// Computes a context and releases it, so that it is cached and unreferenced.
fn cached(cache: &mut KvCache, ns: &Namespace, words: &[u32]) -> Vec<PageId> {
    let table = compute(cache, ns, words);
    cache.release_chain(&table);
    cache.check_invariants();
    table
}
