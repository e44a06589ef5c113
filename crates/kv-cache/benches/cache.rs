//! What a visit costs in bookkeeping: match, allocate, publish, release, evict.
//! `examples/match_cost.rs` asks the same of tables that are larger than the processor's caches.
#![allow(missing_docs, reason = "criterion's macro makes public items")]
#![allow(clippy::expect_used, reason = "a measurement for people to run")]

use std::hint::black_box;

use beamline_kv_cache::{CacheConfig, KvCache, Namespace, SessionKey};
use criterion::{Criterion, criterion_group, criterion_main};

const PAGE_SIZE: usize = 32;
/// Pages of a context of 640 positions.
const PAGES: usize = 20;
const USERS: usize = 64;

fn cache() -> KvCache {
    let config = CacheConfig {
        pages: (USERS * PAGES) as u32,
        page_size: PAGE_SIZE as u32,
        words_per_position: 1,
        sessions: USERS as u32,
        hash_key: [1; 32],
    };
    KvCache::new(config).expect("the sizes are sound")
}

fn context(user: usize) -> Vec<u32> {
    (0..(PAGES * PAGE_SIZE) as u32)
        .map(|word| (word ^ (user as u32) << 16).wrapping_mul(0x9e37_79b9))
        .collect()
}

/// Allocates, publishes, remembers and releases a context.
fn visit(
    cache: &mut KvCache,
    ns: &Namespace,
    key: SessionKey,
    words: &[u32],
    table: &mut Vec<beamline_kv_cache::PageId>,
) {
    table.clear();
    cache.allocate(PAGES, table).expect("nothing is held");
    for index in 0..PAGES {
        let _ = cache.publish(ns, table, index, words);
    }
    cache.remember(key, ns, table);
    cache.release_chain(table);
}

fn visits(c: &mut Criterion) {
    let ns = Namespace::new(b"model", b"tenant");
    let key = |user: usize| SessionKey::new(&ns, &format!("user {user}"));
    let mut table = Vec::with_capacity(PAGES);

    let mut full = cache();
    for user in 0..USERS {
        visit(&mut full, &ns, key(user), &context(user), &mut table);
    }
    let (words, session) = (context(7), key(7));
    for (name, session) in [("by session", Some(session)), ("by content", None)] {
        c.bench_function(&format!("match {PAGES} pages {name} and release"), |b| {
            b.iter(|| {
                table.clear();
                let covered = full.match_prefix(&ns, session, black_box(&words), usize::MAX, &mut table);
                assert_eq!(covered, PAGES * PAGE_SIZE);
                full.release_chain(&table);
            });
        });
    }
    let strange = context(USERS + 1);
    c.bench_function("match nothing", |b| {
        b.iter(|| {
            table.clear();
            full.match_prefix(&ns, None, black_box(&strange), usize::MAX, &mut table)
        });
    });

    // Twice as many users as there is room for, in turn: every visit pushes an earlier one out.
    let contexts: Vec<_> = (0..2 * USERS).map(|user| (key(user), context(user))).collect();
    let mut pressed = cache();
    let mut next = 0;
    c.bench_function(&format!("a new context of {PAGES} pages in a full pool"), |b| {
        b.iter(|| {
            let (key, words) = &contexts[next];
            next = (next + 1) % contexts.len();
            visit(&mut pressed, &ns, *key, words, &mut table);
        });
    });
}

criterion_group!(benches, visits);
criterion_main!(benches);
