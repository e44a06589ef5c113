//! The tier that serves: a `moka` cache, weighed in bytes, least recently used first, with a time to live.
//!
//! This module has the crate's only clock outside `disk`: `moka`'s own. The tier belongs to the
//! engine thread, so `moka`'s maintenance is run by hand after every change. That keeps the bound:
//! at most one page over, and only while that page is put. `moka` may hold on to an entry for a
//! while after dropping it, so an entry is a place for a page, which is emptied when it is dropped.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use moka::{notification::RemovalCause, policy::EvictionPolicy, sync::Cache};

use super::{HostKey, HostPage, HostTier, HostUsage};
use crate::namespace::Namespace;

/// `moka` remembers this many reads until maintenance is run, and forgets the reads after them.
const READS: usize = 32;

/// A least-recently-used tier bounded in bytes, with a time to live.
pub struct MokaTier {
    pages: Cache<HostKey, Arc<Place>>,
    capacity: u64,
    dropped: Arc<Dropped>,
}

/// The place of a page; empty once the page was dropped.
struct Place(Mutex<Option<Arc<HostPage>>>);

impl Place {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<HostPage>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Dropped {
    evictions: AtomicU64,
    expirations: AtomicU64,
}

impl MokaTier {
    /// A tier of `capacity` bytes whose pages live for `time_to_live` after they were put.
    pub fn new(capacity: usize, time_to_live: Option<Duration>) -> Self {
        let (capacity, dropped) = (capacity as u64, Arc::new(Dropped::default()));
        let count = Arc::clone(&dropped);
        let mut pages = Cache::builder()
            .max_capacity(capacity)
            .weigher(|_, place: &Arc<Place>| {
                let bytes = place.lock().as_ref().map_or(0, |page| page.bytes());
                u32::try_from(bytes).unwrap_or(u32::MAX)
            })
            // Not by frequency: a page that was evicted for the first time must be able to enter.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, place, cause| {
                place.lock().take();
                match cause {
                    RemovalCause::Size => count.evictions.fetch_add(1, Ordering::Relaxed),
                    RemovalCause::Expired => count.expirations.fetch_add(1, Ordering::Relaxed),
                    RemovalCause::Explicit | RemovalCause::Replaced => 0,
                };
            });
        if let Some(time_to_live) = time_to_live {
            pages = pages.time_to_live(time_to_live);
        }
        Self { pages: pages.build(), capacity, dropped }
    }
}

impl HostTier for MokaTier {
    fn put(&mut self, key: HostKey, page: Arc<HostPage>) {
        self.pages.insert(key, Arc::new(Place(Mutex::new(Some(page)))));
        self.pages.run_pending_tasks();
    }

    fn get(&mut self, key: &HostKey) -> Option<Arc<HostPage>> {
        let place = self.pages.get(key)?;
        let page = place.lock();
        page.clone()
    }

    fn touch(&mut self, keys: &[HostKey]) {
        // Process earlier reads first; they would otherwise count as newer than these.
        self.pages.run_pending_tasks();
        for keys in keys.chunks(READS) {
            for key in keys {
                self.pages.get(key);
            }
            self.pages.run_pending_tasks();
        }
    }

    fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool) {
        let is_kept = |place: &Place| place.lock().as_ref().is_some_and(|page| keep(page.namespace()));
        let dropped: Vec<HostKey> =
            self.pages.iter().filter(|(_, place)| !is_kept(place)).map(|(key, _)| *key).collect();
        for key in dropped {
            self.pages.invalidate(&key);
        }
        self.pages.run_pending_tasks();
    }

    fn expire(&mut self) {
        self.pages.run_pending_tasks();
    }

    fn usage(&self) -> HostUsage {
        HostUsage {
            pages: self.pages.entry_count(),
            bytes: self.pages.weighted_size(),
            capacity: self.capacity,
            evictions: self.dropped.evictions.load(Ordering::Relaxed),
            expirations: self.dropped.expirations.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::*;

    const PAGE_BYTES: usize = 1000;

    fn page(ns: &str, words: u32) -> Arc<HostPage> {
        let page = HostPage::new(
            Namespace::new(b"model", ns.as_bytes()),
            vec![0; words as usize].into(),
            PAGE_BYTES,
        );
        page.fill(|_| Ok::<(), ()>(())).unwrap();
        page
    }

    fn key(number: u32) -> HostKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        HostKey(key)
    }

    fn kept(tier: &MokaTier, keys: u32) -> Vec<u32> {
        (0..keys).filter(|&number| tier.pages.contains_key(&key(number))).collect()
    }

    #[test]
    fn bytes_are_bounded_and_what_is_dropped_is_freed() {
        let capacity = 50 * HostPage::bytes_of(PAGE_BYTES, 8);
        let mut tier = MokaTier::new(capacity, None);
        let mut all: Vec<Weak<HostPage>> = Vec::new();
        for number in 0..5000 {
            let page = page("a", number % 16);
            all.push(Arc::downgrade(&page));
            tier.put(key(number), page);
            assert!(tier.usage().bytes <= capacity as u64);
        }
        let usage = tier.usage();
        assert_eq!(usage.pages + usage.evictions, 5000);
        assert!(usage.pages >= 48, "{usage:?}");
        let alive: usize = all.iter().filter_map(Weak::upgrade).map(|page| page.bytes()).sum();
        assert_eq!(alive as u64, usage.bytes, "memory is held that nobody can find");
    }

    #[test]
    fn the_page_used_longest_ago_goes_first_and_a_chain_from_its_tail() {
        let bytes = HostPage::bytes_of(PAGE_BYTES, 8);
        for len in [5, 200] {
            let mut tier = MokaTier::new(2 * len as usize * bytes, None);
            // Two chains, evicted tail first: numbers grow towards the tail.
            for number in (0..len).rev().chain((len..2 * len).rev()) {
                tier.put(key(number), page("a", 8));
            }
            // The older chain is read head first, as a match does, and touched tail first.
            for number in 0..len {
                assert!(tier.get(&key(number)).is_some());
            }
            tier.touch(&(0..len).rev().map(key).collect::<Vec<_>>());
            for more in 0..len / 2 {
                tier.put(key(1000 + more), page("a", 8));
            }
            let left: Vec<u32> = (0..2 * len - len / 2).collect();
            assert_eq!(kept(&tier, 2 * len), left, "half of the other chain, from its head");
            for more in len / 2..len + 2 {
                tier.put(key(1000 + more), page("a", 8));
            }
            assert_eq!(
                kept(&tier, 2 * len),
                (0..len - 2).collect::<Vec<_>>(),
                "then the touched one, from its tail"
            );
        }
    }

    #[test]
    fn a_page_that_is_put_again_is_the_newest() {
        let mut tier = MokaTier::new(3 * HostPage::bytes_of(PAGE_BYTES, 8), None);
        for number in [0, 1, 2, 0, 3] {
            let page = tier.get(&key(number)).unwrap_or_else(|| page("a", 8));
            tier.put(key(number), page);
        }
        assert_eq!(kept(&tier, 4), [0, 2, 3]);
    }

    #[test]
    fn pages_outlive_their_time_for_nobody() {
        let capacity = 10 * HostPage::bytes_of(PAGE_BYTES, 8);
        let mut brief = MokaTier::new(capacity, Some(Duration::from_millis(1)));
        let mut long = MokaTier::new(capacity, Some(Duration::from_secs(3600)));
        let held = page("a", 8);
        for tier in [&mut brief, &mut long] {
            tier.put(key(1), Arc::clone(&held));
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(brief.get(&key(1)).is_none() && long.get(&key(1)).is_some());
        brief.expire();
        assert_eq!(
            brief.usage(),
            HostUsage { capacity: capacity as u64, expirations: 1, ..HostUsage::default() }
        );
        assert_eq!(Arc::strong_count(&held), 2, "the memory of an expired page is free");
    }

    #[test]
    fn a_page_larger_than_the_tier_is_not_kept() {
        let mut tier = MokaTier::new(PAGE_BYTES, None);
        tier.put(key(1), page("a", 8));
        assert!(tier.get(&key(1)).is_none());
        assert_eq!((tier.usage().pages, tier.usage().bytes), (0, 0));
    }

    #[test]
    fn what_is_not_retained_is_gone_at_once() {
        let mut tier = MokaTier::new(100 * HostPage::bytes_of(PAGE_BYTES, 8), None);
        let mut dropped = Vec::new();
        for number in 0..20 {
            let page = page(if number % 2 == 0 { "a" } else { "b" }, 8);
            dropped.extend((number % 2 == 1).then(|| Arc::downgrade(&page)));
            tier.put(key(number), page);
        }
        let a = Namespace::new(b"model", b"a");
        tier.retain(&|ns| *ns == a);
        assert_eq!(kept(&tier, 20), (0..20).step_by(2).collect::<Vec<_>>());
        assert_eq!(tier.usage().pages, 10);
        assert!(dropped.iter().all(|page| page.upgrade().is_none()), "the memory of forgotten pages is free");
    }
}
