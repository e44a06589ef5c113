//! The host tier by example: what goes there, what comes back, and what does not.

use std::sync::{Arc, atomic::AtomicU64};

use super::{PAGE_SIZE, cache, cached, compute, context, ns};
use crate::{
    HostMemory, HostPage, HostTier, KvCache, LruTier, MokaTier, Namespace, PageContents, PageId, Transfer,
    TransferError,
};

/// A device on which every page holds the number of its last writer.
#[derive(Default)]
struct Device([u64; 16]);

impl PageContents for Device {
    fn page_bytes(&self) -> usize {
        8
    }

    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        to.copy_from_slice(&self.0[page.index()].to_le_bytes());
        Ok(())
    }

    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError> {
        self.0[page.index()] = u64::from_le_bytes(from.try_into().unwrap());
        Ok(())
    }
}

fn page_cost() -> usize {
    HostPage::bytes_of(8, 3 * PAGE_SIZE)
}

fn with_tier(pages: u32, tier: impl HostTier + 'static, window: usize) -> KvCache {
    cache(pages).with_host_memory(HostMemory { tier: Box::new(tier), page_bytes: 8, window })
}

fn lru(host_pages: usize) -> LruTier {
    LruTier::new(host_pages * page_cost(), None, Arc::new(AtomicU64::new(0)))
}

/// Evicts everything and carries out the transfers that this orders.
fn evict_all(cache: &mut KvCache, device: &mut Device) -> usize {
    let mut pages = Vec::new();
    cache.allocate(cache.available(), &mut pages).unwrap();
    let moved = carry_out(cache, device);
    cache.release_chain(&pages);
    moved
}

fn carry_out(cache: &mut KvCache, device: &mut Device) -> usize {
    let mut transfers = Vec::new();
    cache.take_transfers(&mut transfers);
    for transfer in &transfers {
        transfer.carry_out(device).unwrap();
    }
    transfers.len()
}

fn found(cache: &mut KvCache, ns: &Namespace, words: &[u32]) -> usize {
    let mut out = Vec::new();
    cache.match_host(ns, words, words.len(), &[], &mut out) / PAGE_SIZE
}

#[test]
fn an_evicted_chain_comes_back_as_it_was() {
    for tier in [Box::new(lru(8)) as Box<dyn HostTier>, Box::new(MokaTier::new(8 * page_cost(), None))] {
        let (mut cache, ns, words) = (cache(4), ns("a"), context(1, 3));
        cache = cache.with_host_memory(HostMemory { tier, page_bytes: 8, window: 0 });
        let mut device = Device::default();
        for (number, page) in cached(&mut cache, &ns, &words).iter().enumerate() {
            device.0[page.index()] = 100 + number as u64;
        }
        assert_eq!(evict_all(&mut cache, &mut device), 3);
        device.0 = [0; 16];

        let (mut table, mut back) = (Vec::new(), Vec::new());
        assert_eq!(cache.match_prefix(&ns, None, &words, 12, &mut table), 0);
        assert_eq!(cache.match_host(&ns, &words, 11, &table, &mut back), 8, "whole pages within the limit");
        back.clear();
        assert_eq!(cache.match_host(&ns, &words, 12, &table, &mut back), 12);
        cache.allocate(3, &mut table).unwrap();
        for (&page, from) in table.iter().zip(back) {
            Transfer::Import { from, page }.carry_out(&mut device).unwrap();
        }
        assert_eq!([0, 1, 2].map(|index| device.0[table[index].index()]), [100, 101, 102]);
        for index in 0..3 {
            let _ = cache.publish(&ns, &table, index, &words);
        }
        cache.release_chain(&table);
        cache.check_invariants();
        assert_eq!(cache.peek_prefix(&ns, None, &words, 12), 12);
        // When the page is evicted once more, there is nothing to copy: the tier still has it.
        assert_eq!(evict_all(&mut cache, &mut device), 0);
        assert_eq!(found(&mut cache, &ns, &words), 3);
        let stats = cache.stats();
        assert_eq!((stats.host_exports, stats.host.pages), (3, 3));
    }
}

#[test]
fn a_match_on_the_device_is_continued_in_host_memory() {
    let (mut cache, mut device) = (with_tier(6, lru(8), 0), Device::default());
    let (ns, words) = (ns("a"), context(1, 3));
    cached(&mut cache, &ns, &words);
    let mut out = Vec::new();
    cache.allocate(5, &mut out).unwrap();
    assert_eq!(carry_out(&mut cache, &mut device), 2, "the end of the chain went first");
    let (mut table, mut back) = (Vec::new(), Vec::new());
    assert_eq!(cache.match_prefix(&ns, None, &words, 12, &mut table), 4);
    assert_eq!(cache.match_host(&ns, &words, 12, &table, &mut back), 8);
}

#[test]
fn nothing_comes_back_for_another_word_tenant_model_or_place() {
    let (mut cache, mut device) = (with_tier(4, lru(8), 0), Device::default());
    let (a, words) = (ns("a"), context(1, 3));
    cached(&mut cache, &a, &words);
    evict_all(&mut cache, &mut device);
    assert_eq!(found(&mut cache, &a, &words), 3);
    for changed in 0..words.len() {
        let mut other = words.clone();
        other[changed] ^= 1;
        assert_eq!(found(&mut cache, &a, &other), changed / PAGE_SIZE, "word {changed}");
    }
    assert_eq!(found(&mut cache, &ns("b"), &words), 0);
    assert_eq!(found(&mut cache, &Namespace::new(b"other model", b"a"), &words), 0);
    assert_eq!(found(&mut cache, &a, &words[PAGE_SIZE..]), 0);
}

#[test]
fn a_page_that_never_arrived_is_not_believed() {
    let (mut cache, mut device) = (with_tier(4, lru(8), 0), Device::default());
    let (ns, words) = (ns("a"), context(1, 2));
    cached(&mut cache, &ns, &words);
    let (mut pages, mut lost) = (Vec::new(), Vec::new());
    cache.allocate(4, &mut pages).unwrap();
    cache.take_transfers(&mut lost);
    assert_eq!((lost.len(), found(&mut cache, &ns, &words)), (2, 0));
    let Transfer::Export { to, .. } = &lost[0] else { panic!("it was to be copied out") };
    let import = Transfer::Import { from: Arc::clone(to), page: PageId(0) };
    assert_eq!(import.carry_out(&mut device), Err(TransferError::Empty));
    // The page is computed again, evicted again, and this time it arrives.
    cache.release_chain(&pages);
    cached(&mut cache, &ns, &words);
    assert_eq!(evict_all(&mut cache, &mut device), 2);
    assert_eq!(found(&mut cache, &ns, &words), 2);
}

/// A device whose copies fail half way.
struct Failing;

impl PageContents for Failing {
    fn page_bytes(&self) -> usize {
        8
    }

    fn export(&self, _page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        to[..4].fill(1);
        Err(TransferError::Memory("gone".into()))
    }

    fn import(&mut self, _from: &[u8], _page: PageId) -> Result<(), TransferError> {
        Err(TransferError::Memory("gone".into()))
    }
}

#[test]
fn what_a_failed_copy_left_is_not_believed() {
    let (mut cache, mut device) = (with_tier(4, lru(8), 0), Device::default());
    let (ns, words) = (ns("a"), context(1, 2));
    cached(&mut cache, &ns, &words);
    let (mut pages, mut transfers) = (Vec::new(), Vec::new());
    cache.allocate(4, &mut pages).unwrap();
    cache.take_transfers(&mut transfers);
    for transfer in &transfers {
        let Transfer::Export { to, .. } = transfer else { panic!("it was to be copied out") };
        assert_eq!(transfer.carry_out(&mut Failing), Err(TransferError::Memory("gone".into())));
        assert!(!to.is_filled());
    }
    assert_eq!((transfers.len(), found(&mut cache, &ns, &words)), (2, 0));
    // The same copies may be tried again; then the pages are there.
    for transfer in &transfers {
        transfer.carry_out(&mut device).unwrap();
    }
    let Transfer::Export { to, .. } = &transfers[0] else { panic!("it was copied out") };
    let import = Transfer::Import { from: Arc::clone(to), page: PageId(0) };
    assert_eq!(import.carry_out(&mut Failing), Err(TransferError::Memory("gone".into())));
    assert_eq!(import.carry_out(&mut device), Ok(()));
}

#[test]
fn a_hit_ends_where_the_chain_is_broken() {
    let (mut cache, mut device) = (with_tier(4, lru(2), 0), Device::default());
    let (ns, words) = (ns("a"), context(1, 3));
    cached(&mut cache, &ns, &words);
    evict_all(&mut cache, &mut device);
    assert_eq!(found(&mut cache, &ns, &words), 2, "the end of the chain had no room");
    cached(&mut cache, &ns, &context(2, 1));
    evict_all(&mut cache, &mut device);
    assert_eq!(found(&mut cache, &ns, &words), 1);
}

#[test]
fn pages_are_copied_ahead_of_their_eviction_once_and_in_order() {
    let (mut cache, mut device) = (with_tier(6, lru(8), 6), Device::default());
    let (ns, words) = (ns("a"), context(1, 3));
    cached(&mut cache, &ns, &words);
    cache.copy_ahead(10);
    assert_eq!(carry_out(&mut cache, &mut device), 3, "three pages are free, three may go next");
    cache.copy_ahead(10);
    assert_eq!(carry_out(&mut cache, &mut device), 0, "once is enough");
    assert_eq!(evict_all(&mut cache, &mut device), 0, "an eviction finds them there");
    assert_eq!(found(&mut cache, &ns, &words), 3);

    let other = context(2, 3);
    cached(&mut cache, &ns, &other);
    cache.copy_ahead(1);
    assert_eq!(carry_out(&mut cache, &mut device), 1);
    cache.copy_ahead(1);
    assert_eq!(carry_out(&mut cache, &mut device), 1);
    assert_eq!(evict_all(&mut cache, &mut device), 1, "what is left is copied at the last moment");
    assert_eq!(found(&mut cache, &ns, &other), 3);
}

#[test]
fn a_forgotten_namespace_leaves_nothing_in_host_memory() {
    let (mut cache, mut device) =
        (with_tier(4, MokaTier::new(100 * page_cost(), None), 0), Device::default());
    let (a, b, words) = (ns("a"), ns("b"), context(1, 2));
    for ns in [&a, &b] {
        cached(&mut cache, ns, &words);
        evict_all(&mut cache, &mut device);
    }
    cache.forget_namespace(&a);
    assert_eq!((found(&mut cache, &a, &words), found(&mut cache, &b, &words)), (0, 2));
    assert_eq!(cache.stats().host.pages, 2);
}

#[test]
fn without_a_tier_nothing_is_moved() {
    let (mut cache, mut device) = (cache(4), Device::default());
    let (ns, words) = (ns("a"), context(1, 2));
    compute(&mut cache, &ns, &words);
    cache.copy_ahead(10);
    assert_eq!((carry_out(&mut cache, &mut device), found(&mut cache, &ns, &words)), (0, 0));
    assert_eq!(cache.stats().host, crate::HostUsage::default());
}
