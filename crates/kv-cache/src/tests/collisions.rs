//! With a hash under which everything collides, wrong pages are nominated all the time and never
//! returned.

use super::{cached, config, context, ns};
use crate::KvCache;
use crate::chain::ChainHash;

fn colliding(pages: u32) -> KvCache {
    let config = config(pages);
    let hash = ChainHash::Colliding { hash_key: config.hash_key, values: 1 };
    KvCache::with_hash(config, hash).unwrap()
}

#[test]
fn equal_hashes_are_not_equal_contents() {
    let (mut cache, a, b) = (colliding(16), ns("a"), ns("b"));
    let (one, two) = (context(1, 3), context(2, 3));
    let table = cached(&mut cache, &a, &one);
    assert_eq!(cache.peek_prefix(&a, None, &two, 12), 0, "other words");
    assert_eq!(cache.peek_prefix(&b, None, &one, 12), 0, "other namespace");
    assert_eq!(cache.peek_prefix(&a, None, &one[4..], 8), 0, "other parent");

    let other = cached(&mut cache, &a, &two);
    let foreign = cached(&mut cache, &b, &one);
    for (ns, words, expected) in [(&a, &one, &table), (&a, &two, &other), (&b, &one, &foreign)] {
        let mut out = Vec::new();
        assert_eq!(cache.match_prefix(ns, None, words, 12, &mut out), 12);
        assert_eq!(out, *expected);
        cache.release_chain(&out);
    }
    assert!(cache.stats().hash_collisions > 0);
}

#[test]
fn eviction_takes_the_right_one_of_equal_hashes() {
    let (mut cache, ns) = (colliding(6), ns("a"));
    cached(&mut cache, &ns, &context(1, 3));
    cached(&mut cache, &ns, &context(2, 3));
    let mut out = Vec::new();
    cache.allocate(2, &mut out).unwrap();
    cache.check_invariants();
    assert_eq!(cache.peek_prefix(&ns, None, &context(1, 3), 12), 4);
    assert_eq!(cache.peek_prefix(&ns, None, &context(2, 3), 12), 12);
}

#[test]
fn a_chain_that_does_not_branch_is_hashed_at_its_head_only() {
    let (mut cache, ns, words) = (colliding(4), ns("a"), context(1, 3));
    cached(&mut cache, &ns, &words);
    let before = cache.stats().hash_collisions;
    let mut out = Vec::new();
    assert_eq!(cache.match_prefix(&ns, None, &words, 12, &mut out), 12);
    // The index nominates the newest first: two wrong pages for page 0, and it is not used again.
    assert_eq!(cache.stats().hash_collisions - before, 2);
}
