//! What a match costs: `cargo run --release -p beamline-kv-cache --example match_cost`.
//!
//! Many users' contexts are cached, so that the tables are larger than the processor's caches, and
//! users return in an order that no prefetcher knows. Each line is the median over rounds of the
//! mean over all users.

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a measurement for people to run")]

use std::hint::black_box;
use std::time::Instant;

use beamline_kv_cache::{CacheConfig, KvCache, Namespace, PageId, SessionKey};

const PAGE_SIZE: usize = 32;
const PAGES: usize = 80;
const ROUNDS: usize = 15;

fn main() {
    println!("contexts of {} positions, {PAGES} pages of {PAGE_SIZE}", PAGES * PAGE_SIZE);
    for words_per_position in [1, 4] {
        for users in [1, 500] {
            measure(users, words_per_position);
        }
    }
}

fn measure(users: usize, words_per_position: usize) {
    let mut cache = KvCache::new(CacheConfig {
        // As many again for the decoys.
        pages: (2 * users * PAGES) as u32,
        page_size: PAGE_SIZE as u32,
        words_per_position: words_per_position as u32,
        sessions: users as u32,
        hash_key: [1; 32],
    })
    .expect("the sizes are sound");
    let ns = Namespace::new(b"model", b"tenant");
    let contexts: Vec<Vec<u32>> = (0..users as u32).map(|user| context(user, words_per_position)).collect();
    let keys: Vec<SessionKey> =
        (0..users).map(|user| SessionKey::new(&ns, &format!("user {user}"))).collect();

    let start = Instant::now();
    let mut table = Vec::with_capacity(PAGES);
    for (words, key) in contexts.iter().zip(&keys) {
        table.clear();
        cache.allocate(PAGES, &mut table).expect("there is a page for all");
        for index in 0..PAGES {
            let _ = cache.publish(&ns, &table, index, words);
        }
        cache.remember(*key, &ns, &table);
        cache.release_chain(&table);
    }
    println!("\n{users} users, {words_per_position} words per position");
    report("allocate, publish, remember, release", start.elapsed().as_nanos() as f64 / users as f64);

    visit("match by session, release", &mut cache, &ns, &contexts, Some(&keys));
    visit("match by newest child, release", &mut cache, &ns, &contexts, None);
    add_decoys(&mut cache, &ns, &contexts);
    visit("match by hash, release", &mut cache, &ns, &contexts, None);

    let peek = median(|| {
        let start = Instant::now();
        for (words, key) in contexts.iter().zip(&keys) {
            black_box(cache.peek_prefix(&ns, Some(*key), words, PAGES * PAGE_SIZE));
        }
        start.elapsed().as_nanos() as f64 / users as f64
    });
    report("peek by session", peek);

    let mut pressed: Vec<PageId> = Vec::with_capacity(2 * users * PAGES);
    let start = Instant::now();
    cache.allocate(2 * users * PAGES, &mut pressed).expect("nothing is held");
    report("evict one page", start.elapsed().as_nanos() as f64 / (2 * users * PAGES) as f64);
}

/// Every user returns once per round, finds the whole context and releases it.
fn visit(
    name: &str,
    cache: &mut KvCache,
    ns: &Namespace,
    contexts: &[Vec<u32>],
    sessions: Option<&[SessionKey]>,
) {
    let users = contexts.len();
    let mut table = Vec::with_capacity(PAGES);
    let nanoseconds = median(|| {
        let start = Instant::now();
        for visit in 0..users {
            // A stride that shares no factor with the number of users visits each of them once.
            let user = visit * 241 % users;
            table.clear();
            let session = sessions.map(|keys| keys[user]);
            let covered =
                cache.match_prefix(ns, session, &contexts[user], PAGES * PAGE_SIZE, black_box(&mut table));
            assert_eq!(covered, PAGES * PAGE_SIZE);
            cache.release_chain(&table);
        }
        start.elapsed().as_nanos() as f64 / users as f64
    });
    report(name, nanoseconds);
}

/// Branches every chain at every page, so that the newest child is never the one asked for: the worst case.
fn add_decoys(cache: &mut KvCache, ns: &Namespace, contexts: &[Vec<u32>]) {
    let mut table = Vec::with_capacity(PAGES);
    for words in contexts {
        let words_per_page = words.len() / PAGES;
        for page in 0..PAGES {
            let mut decoy = words[..(page + 1) * words_per_page].to_vec();
            decoy[page * words_per_page] ^= 1;
            table.clear();
            cache.match_prefix(ns, None, &decoy, usize::MAX, &mut table);
            cache.allocate(1, &mut table).expect("there is a page for all");
            let _ = cache.publish(ns, &table, page, &decoy);
            cache.release_chain(&table);
        }
    }
}

fn context(user: u32, words_per_position: usize) -> Vec<u32> {
    let words = (PAGES * PAGE_SIZE * words_per_position) as u32;
    (0..words).map(|word| (word ^ user.rotate_left(16)).wrapping_mul(0x9e37_79b9)).collect()
}

fn median(mut round: impl FnMut() -> f64) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn report(name: &str, nanoseconds: f64) {
    println!("  {name:<38} {nanoseconds:>9.0} ns");
}
