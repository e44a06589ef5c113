//! Nothing stale: a context that differs in one word, in its tenant or in its model hits only what it shares.

use super::{PAGE_SIZE, compute, config, context};
use crate::{CacheConfig, KvCache, Namespace, SessionKey};

#[test]
fn a_changed_word_ends_the_match_before_its_page() {
    let words_per_position = 3;
    let pages = 5;
    let mut cache =
        KvCache::new(CacheConfig { words_per_position: words_per_position as u32, ..config(32) }).unwrap();
    let ns = Namespace::new(b"model", b"tenant");
    let user = SessionKey::new(&ns, "u");
    let words = context(1, pages * words_per_position);
    let positions = pages * PAGE_SIZE;
    let mut table = Vec::new();
    cache.allocate(pages, &mut table).unwrap();
    for index in 0..pages {
        let _ = cache.publish(&ns, &table, index, &words);
    }
    cache.remember(user, &ns, &table);
    cache.release_chain(&table);

    for session in [None, Some(user)] {
        assert_eq!(cache.peek_prefix(&ns, session, &words, positions), positions);
        for changed in 0..words.len() {
            for bit in [0, 17, 31] {
                let mut other = words.clone();
                other[changed] ^= 1 << bit;
                let expected = changed / words_per_position / PAGE_SIZE * PAGE_SIZE;
                assert_eq!(cache.peek_prefix(&ns, session, &other, positions), expected, "word {changed}");
                let mut out = Vec::new();
                assert_eq!(cache.match_prefix(&ns, session, &other, positions, &mut out), expected);
                assert_eq!(out, table[..expected / PAGE_SIZE]);
                cache.release_chain(&out);
            }
        }
    }
}

#[test]
fn pages_are_found_at_their_own_place_only() {
    let mut cache = KvCache::new(config(32)).unwrap();
    let ns = Namespace::new(b"model", b"tenant");
    let words = context(1, 4);
    compute(&mut cache, &ns, &words);
    for dropped in 1..words.len() {
        let later = &words[dropped..];
        assert_eq!(cache.peek_prefix(&ns, None, later, later.len()), 0, "{dropped} positions dropped");
    }
    let swapped = [&words[PAGE_SIZE..2 * PAGE_SIZE], &words[..PAGE_SIZE]].concat();
    assert_eq!(cache.peek_prefix(&ns, None, &swapped, swapped.len()), 0);
    let repeated = [&words[..PAGE_SIZE], &words[..PAGE_SIZE]].concat();
    assert_eq!(cache.peek_prefix(&ns, None, &repeated, repeated.len()), PAGE_SIZE);
}

#[test]
fn other_models_and_tenants_never_hit() {
    let mut cache = KvCache::new(config(32)).unwrap();
    let ns = Namespace::new(b"model", b"tenant");
    let (user, words) = (SessionKey::new(&ns, "u"), context(1, 4));
    let table = compute(&mut cache, &ns, &words);
    cache.remember(user, &ns, &table);
    for (model, salt) in
        [("model2", "tenant"), ("model", "tenant2"), ("modelt", "enant"), ("tenant", "model")]
    {
        let other = Namespace::new(model.as_bytes(), salt.as_bytes());
        // This holds even with the session key of the other namespace: the key is a hint, not a
        // permission.
        for session in [None, Some(user), Some(SessionKey::new(&other, "u"))] {
            assert_eq!(cache.peek_prefix(&other, session, &words, words.len()), 0);
            let mut out = Vec::new();
            assert_eq!(cache.match_prefix(&other, session, &words, words.len(), &mut out), 0);
            assert!(out.is_empty());
        }
    }
}
