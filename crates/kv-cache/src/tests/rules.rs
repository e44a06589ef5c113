//! Each rule of the cache by example.

use super::{PAGE_SIZE, cache, cached, compute, config, context, ns};
use crate::{CacheConfig, ConfigError, KvCache, OutOfPages, PageId, Publish, SessionKey};

#[test]
fn sizes_are_checked() {
    let refused = |config| KvCache::new(config).err();
    assert_eq!(refused(CacheConfig { pages: 0, ..config(1) }), Some(ConfigError::Zero("pages")));
    assert_eq!(refused(CacheConfig { page_size: 0, ..config(1) }), Some(ConfigError::Zero("page_size")));
    assert_eq!(
        refused(CacheConfig { words_per_position: 0, ..config(1) }),
        Some(ConfigError::Zero("words_per_position"))
    );
    assert_eq!(refused(CacheConfig { pages: u32::MAX, ..config(1) }), Some(ConfigError::TooLarge("pages")));
    assert_eq!(
        refused(CacheConfig { sessions: u32::MAX, ..config(1) }),
        Some(ConfigError::TooLarge("sessions"))
    );
    let huge = CacheConfig { page_size: u32::MAX, words_per_position: u32::MAX, ..config(u32::MAX - 1) };
    assert!(matches!(refused(huge), Some(ConfigError::TooLarge(_))));
    let many = CacheConfig { page_size: 1 << 30, words_per_position: 1 << 10, ..config(1 << 18) };
    assert!(matches!(refused(many), Some(ConfigError::OutOfMemory(_))));
}

#[test]
fn a_computed_context_is_found_again() {
    let (mut cache, ns, words) = (cache(8), ns("a"), context(1, 3));
    let table = cached(&mut cache, &ns, &words);
    let mut out = vec![PageId(99)];
    assert_eq!(cache.match_prefix(&ns, None, &words, words.len(), &mut out), words.len());
    assert_eq!(out[1..], table, "pages are appended");
    let stats = cache.stats();
    assert_eq!((stats.referenced, stats.free, stats.hit_positions), (3, 5, 12));
    assert_eq!((stats.lookups, stats.missed_positions), (2, 12), "the first lookup missed everything");
}

#[test]
fn only_whole_pages_within_the_limit_match() {
    let (mut cache, ns, words) = (cache(8), ns("a"), context(1, 3));
    cached(&mut cache, &ns, &words);
    let peek = |words: &[u32], max| cache.peek_prefix(&ns, None, words, max);
    assert_eq!(peek(&words, 12), 12);
    assert_eq!(peek(&words, 11), 8);
    assert_eq!(peek(&words[..11], 12), 8);
    assert_eq!(peek(&words, 3), 0);
    assert_eq!(peek(&[], 12), 0);
    let longer: Vec<u32> = words.iter().copied().chain([7; PAGE_SIZE]).collect();
    assert_eq!(peek(&longer, 16), 12);
}

#[test]
fn allocation_is_all_or_nothing_and_exact() {
    let (mut cache, ns) = (cache(4), ns("a"));
    cached(&mut cache, &ns, &context(1, 2));
    let held = compute(&mut cache, &ns, &context(2, 1));
    assert_eq!(cache.available(), 3);
    let mut out = Vec::new();
    assert_eq!(cache.allocate(4, &mut out), Err(OutOfPages { wanted: 4, available: 3 }));
    assert!(out.is_empty());
    cache.allocate(3, &mut out).unwrap();
    assert_eq!((out.len(), cache.available(), cache.stats().evictions), (3, 0, 2));
    assert!(!out.contains(&held[0]), "a held page is never evicted");
    cache.allocate(0, &mut out).unwrap();
}

#[test]
fn the_least_recently_used_chain_goes_first_and_from_its_tail() {
    let (mut cache, ns) = (cache(6), ns("a"));
    let (old, new) = (context(1, 3), context(2, 3));
    cached(&mut cache, &ns, &old);
    cached(&mut cache, &ns, &new);
    cached(&mut cache, &ns, &old);
    let left = |cache: &KvCache| {
        [&old, &new].map(|words| cache.peek_prefix(&ns, None, words, words.len()) / PAGE_SIZE)
    };
    let mut out = Vec::new();
    for expected in [[3, 2], [3, 1], [3, 0], [2, 0], [1, 0], [0, 0]] {
        cache.allocate(1, &mut out).unwrap();
        cache.check_invariants();
        assert_eq!(left(&cache), expected);
    }
}

#[test]
fn a_shared_head_stays_as_long_as_a_branch_is_held() {
    let (mut cache, ns) = (cache(4), ns("a"));
    let (left, mut right) = (context(1, 2), context(1, 2));
    right[PAGE_SIZE] += 1;
    let held = compute(&mut cache, &ns, &left);
    let other = cached(&mut cache, &ns, &right);
    assert_eq!(held[0], other[0]);
    let mut out = Vec::new();
    cache.allocate(cache.available(), &mut out).unwrap();
    assert_eq!(cache.peek_prefix(&ns, None, &left, 8), 8);
    assert_eq!(cache.peek_prefix(&ns, None, &right, 8), 4);
}

#[test]
fn of_two_equal_pages_one_is_kept() {
    let (mut cache, ns, words) = (cache(4), ns("a"), context(1, 2));
    let (mut first, mut second) = (Vec::new(), Vec::new());
    cache.allocate(2, &mut first).unwrap();
    cache.allocate(2, &mut second).unwrap();
    for index in 0..2 {
        assert_eq!(cache.publish(&ns, &first, index, &words), Publish::Published);
        assert_eq!(cache.publish(&ns, &second, index, &words), Publish::Duplicate(first[index]));
        second[index] = first[index];
        cache.check_invariants();
    }
    assert_eq!(cache.publish(&ns, &first, 1, &words), Publish::Published, "publishing again changes nothing");
    let stats = cache.stats();
    assert_eq!((stats.free, stats.published, stats.publications, stats.duplicates), (2, 2, 2, 2));
    cache.release_chain(&first);
    assert_eq!(cache.stats().referenced, 2, "the second request still holds the chain");
    cache.release_chain(&second);
    assert_eq!(cache.stats().cached_unreferenced, 2);
}

#[test]
fn a_retained_chain_needs_two_releases() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let table = compute(&mut cache, &ns, &context(1, 2));
    for &page in &table {
        cache.retain(page);
    }
    cache.release_chain(&table);
    cache.check_invariants();
    assert_eq!(cache.available(), 0);
    cache.release_chain(&table);
    assert_eq!(cache.available(), 2);
}

#[test]
fn a_session_leads_to_the_newest_chain() {
    let (mut cache, ns) = (cache(8), ns("a"));
    let (user, words) = (SessionKey::new(&ns, "u"), context(1, 3));
    let mut table = compute(&mut cache, &ns, &words);
    cache.allocate(1, &mut table).unwrap();
    cache.remember(user, &ns, &table);
    cache.release_chain(&table);

    // On the next visit the last page has changed and the ones before have not.
    let mut next = words.clone();
    next[2 * PAGE_SIZE] = 7;
    let mut out = Vec::new();
    assert_eq!(cache.match_prefix(&ns, Some(user), &next, next.len(), &mut out), 8);
    assert_eq!(out, table[..2]);
    assert_eq!(cache.stats().session_hit_positions, 8);
    cache.release_chain(&out);

    // Where the session's chain ends or differs, the index takes over.
    cached(&mut cache, &ns, &next);
    assert_eq!(cache.peek_prefix(&ns, Some(user), &next, next.len()), 12);
    assert_eq!(cache.peek_prefix(&ns, Some(user), &next, 7), 4, "a session goes no further than asked");
}

#[test]
fn a_session_does_not_outlive_its_page() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let (user, words) = (SessionKey::new(&ns, "u"), context(1, 2));
    let table = compute(&mut cache, &ns, &words);
    cache.remember(user, &ns, &table);
    cache.release_chain(&table);
    let other = cached(&mut cache, &ns, &context(2, 2));
    assert_eq!(
        {
            let mut pages = other;
            pages.sort();
            pages
        },
        [PageId(0), PageId(1)],
        "recycled"
    );
    assert_eq!(cache.peek_prefix(&ns, Some(user), &words, 8), 0);
    assert_eq!(cache.peek_prefix(&ns, Some(user), &context(2, 2), 8), 8, "by hash, not by session");
    let mut out = Vec::new();
    cache.match_prefix(&ns, Some(user), &context(2, 2), 8, &mut out);
    assert_eq!(cache.stats().session_hit_positions, 0);
}

#[test]
fn a_forgotten_namespace_is_gone_and_leaks_nothing() {
    let (mut cache, a, b) = (cache(12), ns("a"), ns("b"));
    let (kept, dropped, held) = (context(1, 2), context(2, 2), context(3, 2));
    cached(&mut cache, &b, &kept);
    let table = compute(&mut cache, &a, &dropped);
    let user = SessionKey::new(&a, "u");
    cache.remember(user, &a, &table);
    cache.release_chain(&table);
    let mut table = compute(&mut cache, &a, &held);
    cache.allocate(2, &mut table).unwrap();

    assert_eq!(cache.forget_namespace(&a), 2);
    cache.check_invariants();
    assert_eq!(cache.stats().sessions, 0);
    assert_eq!(cache.peek_prefix(&a, Some(user), &dropped, 8), 0);
    assert_eq!(cache.peek_prefix(&a, None, &held, 8), 0);
    assert_eq!(cache.peek_prefix(&b, None, &kept, 8), 8);

    // The request goes on to its end, on its own.
    let longer = context(3, 4);
    for index in 0..4 {
        assert_eq!(cache.publish(&a, &table, index, &longer), Publish::Withdrawn);
    }
    cache.remember(user, &a, &table);
    assert_eq!((cache.stats().sessions, cache.stats().published), (0, 2));
    // The model comes back: its new pages have nothing to do with the old ones.
    let again = compute(&mut cache, &a, &held);
    assert!(again.iter().all(|page| !table.contains(page)));
    cache.release_chain(&table);
    cache.release_chain(&again);
    cache.check_invariants();
    assert_eq!((cache.stats().free, cache.stats().cached_unreferenced), (8, 4));
}

#[test]
fn an_exact_context_is_found_as_a_whole_only() {
    let (mut cache, ns, words) = (cache(8), ns("a"), context(1, 2));
    let exact = ns.narrowed_to(&words);
    cached(&mut cache, &exact, &words);
    assert_eq!(cache.peek_prefix(&ns.narrowed_to(&words), None, &words, 8), 8);
    let longer = context(1, 3);
    assert_eq!(cache.peek_prefix(&ns.narrowed_to(&longer), None, &longer, 12), 0);
}

#[test]
#[should_panic(expected = "released before the pages after it")]
fn releasing_head_first_is_a_bug() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let table = compute(&mut cache, &ns, &context(1, 2));
    cache.release(table[0]);
}

#[test]
#[should_panic(expected = "does not hold it")]
fn releasing_twice_is_a_bug() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let table = cached(&mut cache, &ns, &context(1, 1));
    cache.release(table[0]);
}

#[test]
#[should_panic(expected = "does not hold it")]
fn retaining_what_nobody_holds_is_a_bug() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let table = cached(&mut cache, &ns, &context(1, 1));
    cache.retain(table[0]);
}

#[test]
#[should_panic(expected = "has one holder")]
fn sharing_a_private_page_is_a_bug() {
    let (mut cache, mut table) = (cache(2), Vec::new());
    cache.allocate(1, &mut table).unwrap();
    cache.retain(table[0]);
}

#[test]
#[should_panic(expected = "is not published")]
fn publishing_out_of_order_is_a_bug() {
    let (mut cache, mut table) = (cache(2), Vec::new());
    cache.allocate(2, &mut table).unwrap();
    let _ = cache.publish(&ns("a"), &table, 1, &context(1, 2));
}

#[test]
#[should_panic(expected = "holds other words")]
fn publishing_after_another_context_is_a_bug() {
    let (mut cache, ns) = (cache(2), ns("a"));
    let mut table = compute(&mut cache, &ns, &context(1, 1));
    cache.allocate(1, &mut table).unwrap();
    let _ = cache.publish(&ns, &table, 1, &context(2, 2));
}
