//! After start-up the cache allocates nothing: requests come, hit, miss, evict and are remembered
//! without a single call of the allocator. Counted per thread, so that the test harness does not
//! disturb.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use beamline_kv_cache::{CacheConfig, KvCache, Namespace, PageId, Publish, SessionKey};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came; counting touches no memory of others.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAGE_SIZE: usize = 32;
const PAGES_OF_A_REQUEST: usize = 20;
const USERS: usize = 12;

fn visit(cache: &mut KvCache, ns: &Namespace, user: SessionKey, words: &[u32], table: &mut Vec<PageId>) {
    table.clear();
    assert!(cache.peek_prefix(ns, Some(user), words, words.len()) <= words.len());
    let covered = cache.match_prefix(ns, Some(user), words, words.len(), table) / PAGE_SIZE;
    let allocated = cache.allocate(PAGES_OF_A_REQUEST - covered, table);
    assert!(allocated.is_ok(), "one request at a time fits");
    for index in covered..PAGES_OF_A_REQUEST {
        if let Publish::Duplicate(existing) = cache.publish(ns, table, index, words) {
            table[index] = existing;
        }
    }
    cache.remember(user, ns, table);
    cache.release_chain(table);
}

#[test]
fn the_steady_path_does_not_allocate() {
    let mut cache = KvCache::new(CacheConfig {
        pages: 100,
        page_size: PAGE_SIZE as u32,
        words_per_position: 1,
        sessions: 8,
        hash_key: [3; 32],
    })
    .unwrap();
    let ns = Namespace::new(b"model", b"tenant");
    let users: Vec<SessionKey> = (0..USERS).map(|user| SessionKey::new(&ns, &user.to_string())).collect();
    let mut words = vec![0; PAGES_OF_A_REQUEST * PAGE_SIZE];
    let mut table = Vec::with_capacity(PAGES_OF_A_REQUEST);

    let before = ALLOCATIONS.get();
    for round in 0..5000 {
        // More users than sessions, more pages than room, and histories that share a beginning and
        // change at the end.
        let user = round * 7 % USERS;
        let shared = (round % PAGES_OF_A_REQUEST) * PAGE_SIZE;
        for (position, word) in words.iter_mut().enumerate() {
            *word = if position < shared { user / 2 } else { round / 3 } as u32;
        }
        visit(&mut cache, &ns, users[user], &words, &mut table);
        if round % 1000 == 999 {
            cache.forget_namespace(&ns);
        }
    }
    let allocations = ALLOCATIONS.get() - before;

    assert_eq!(allocations, 0);
    assert!(before > 0, "the allocator counts");
    let stats = cache.stats();
    assert!(stats.evictions > 1000 && stats.hit_positions > 1000, "the rounds must hit and evict: {stats:?}");
    cache.check_invariants();
}
