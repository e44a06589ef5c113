//! The tier by example, over a disk that works only when a test lets it.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::AtomicU64,
    time::Duration,
};

use super::*;
use crate::{
    CacheConfig, HostMemory, HostTier, KvCache, LruTier, PageContents, PageId, TransferError,
    disk::{DiskConfig, DiskIo, DiskTier, DiskUsage, Done, Job, Waker},
};

/// A disk that works only when a test lets it.
struct Slow {
    files: Arc<SlotFiles<Memory>>,
    jobs: VecDeque<Job>,
    done: VecDeque<Done>,
    at_once: Arc<AtomicBool>,
    now: Arc<AtomicU64>,
}

impl Slow {
    fn work(&mut self) {
        while let Some(job) = self.jobs.pop_front() {
            self.done.extend(match job {
                Job::Write { slot, turn, at, key, page } => {
                    Some(Done::Written { slot, key, result: self.files.write(slot, turn, at, key, &page) })
                }
                Job::Read { slot, key, page } => {
                    let result = self.files.read(slot, key, &page);
                    Some(Done::Read { slot, key, page, result, took: Duration::from_millis(1) })
                }
                Job::Erase { slot } => Some(Done::Erased { slot, result: self.files.erase(slot) }),
                Job::Discard => {
                    let _ = self.files.discard();
                    None
                }
            });
        }
    }
}

impl DiskIo for Slow {
    fn start(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    fn done(&mut self) -> Option<Done> {
        if self.at_once.load(Ordering::Relaxed) {
            self.work();
        }
        self.done.pop_front()
    }

    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn readers(&self) -> usize {
        2
    }

    fn wait(&mut self, _most: Duration) {
        self.work();
    }

    fn set_waker(&mut self, _waker: Waker) {}
}

/// A tier, and what moves its pages.
struct Bench {
    tier: DiskTier,
    at_once: Arc<AtomicBool>,
    now: Arc<AtomicU64>,
    failures: Arc<AtomicU64>,
}

impl Bench {
    fn start(disk: &Disk, slots: u32, memory_pages: usize) -> Self {
        let memory = memory_pages * HostPage::bytes_of(LAYOUT.page_bytes, LAYOUT.most_words);
        let memory = LruTier::new(memory, None, Arc::default());
        let memory = (memory_pages > 0).then(|| Box::new(memory) as Box<dyn HostTier>);
        let (at_once, now) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(NOW)));
        let failures = Arc::new(AtomicU64::new(0));
        let config = DiskConfig {
            buffer_bytes: 4 * LAYOUT.page_bytes,
            time_to_live: Some(Duration::from_secs(100)),
            patience: None,
            on_failure: Box::new({
                let failures = Arc::clone(&failures);
                move |_| {
                    failures.fetch_add(1, Ordering::Relaxed);
                }
            }),
        };
        let io = {
            let (at_once, now) = (Arc::clone(&at_once), Arc::clone(&now));
            move |files| {
                let (jobs, done) = (VecDeque::new(), VecDeque::new());
                Ok(Slow { files: Arc::new(files), jobs, done, at_once, now })
            }
        };
        let tier = DiskTier::new(memory, disk.files(), slots, config, io).unwrap();
        Self { tier, at_once, now, failures }
    }

    /// Puts pages whose contents have arrived.
    fn put(&mut self, ns: &Namespace, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            self.tier.put(key(number), page(*ns, number));
            self.tier.settle();
        }
        self.tier.settle();
    }

    /// Fetches a page and waits for it.
    fn fetch(&mut self, ns: &Namespace, number: u32) -> Option<Box<[u8]>> {
        let page = self.tier.fetch(&key(number), ns, &words(number))?;
        self.tier.settle();
        let contents = page.contents().map(Box::from);
        assert_eq!(page.has_contents(), self.at_once.load(Ordering::Relaxed));
        assert_eq!(contents.is_some(), self.tier.get(&key(number)).is_some_and(|page| page.is_filled()));
        contents
    }

    fn disk(&self) -> DiskUsage {
        self.tier.disk().unwrap()
    }
}

#[test]
fn pages_outlive_the_tier_with_memory_and_without() {
    for memory in [0, 2, 100] {
        let (disk, ns) = (Disk::default(), ns("a"));
        let mut bench = Bench::start(&disk, 8, memory);
        bench.put(&ns, 0..5);
        assert_eq!((bench.disk().pages, bench.disk().writes), (5, 5));
        bench.put(&ns, 0..5);
        assert_eq!(bench.disk().writes, 5, "what is there is not written again");
        // The tier is not dropped, as when the process is killed.
        std::mem::forget(bench);
        let mut bench = Bench::start(&disk, 8, memory);
        for number in 0..5 {
            assert_eq!(bench.fetch(&ns, number).as_deref(), Some(&*contents(number)), "{memory}");
        }
        assert_eq!(bench.fetch(&ns, 5), None);
        assert_eq!((bench.disk().hits, bench.disk().misses, bench.disk().damaged), (5, 1, 0));
        assert!(bench.tier.renew(&key(4), &ns, &words(4)), "it need not be copied again");
    }
}

#[test]
fn only_the_owner_gets_a_page_and_only_for_its_words() {
    let disk = Disk::default();
    Bench::start(&disk, 8, 0).put(&ns("a"), 0..1);
    let mut bench = Bench::start(&disk, 8, 0);
    assert_eq!(bench.fetch(&ns("b"), 0), None);
    let mut others = words(0);
    others[0] += 1;
    let page = bench.tier.fetch(&key(0), &ns("a"), &others).unwrap();
    bench.tier.settle();
    assert!(page.has_contents() && !page.is_filled(), "who waits for it goes on without it");
    assert!(bench.fetch(&ns("a"), 0).is_some());
    assert_eq!(bench.disk().damaged, 0);
}

#[test]
fn what_was_forgotten_stays_forgotten() {
    let disk = Disk::default();
    let mut bench = Bench::start(&disk, 8, 2);
    bench.put(&ns("a"), 0..3);
    bench.put(&ns("b"), 10..13);
    // This also covers a page that is being written and one that is being read at that moment.
    bench.at_once.store(false, Ordering::Relaxed);
    bench.put(&ns("a"), 3..4);
    let read = bench.tier.fetch(&key(0), &ns("a"), &words(0)).unwrap();
    bench.tier.retain(&|other| *other != ns("a"));
    bench.at_once.store(true, Ordering::Relaxed);
    bench.tier.settle();
    bench.tier.settle();
    assert!(!read.is_filled());
    assert!((0..4).all(|number| bench.fetch(&ns("a"), number).is_none()));
    drop(bench);
    let mut bench = Bench::start(&disk, 8, 2);
    assert!((0..4).all(|number| bench.fetch(&ns("a"), number).is_none()));
    assert!((10..13).all(|number| bench.fetch(&ns("b"), number).is_some()));
    let pages = disk.pages.copy();
    for number in 0..4 {
        assert!(!pages.windows(24).any(|bytes| *bytes == *contents(number)), "page {number} is still there");
    }
}

#[test]
fn pages_outlive_their_time_for_nobody() {
    let disk = Disk::default();
    let mut bench = Bench::start(&disk, 8, 0);
    bench.put(&ns("a"), 0..3);
    bench.now.store(NOW + 60, Ordering::Relaxed);
    bench.put(&ns("a"), 0..1);
    assert_eq!(bench.disk().writes, 4, "a page whose time is half over is written anew");
    bench.now.store(NOW + 100, Ordering::Relaxed);
    assert_eq!(bench.fetch(&ns("a"), 1), None);
    assert!(bench.fetch(&ns("a"), 0).is_some());
    bench.tier.expire();
    assert_eq!((bench.disk().pages, bench.disk().expirations), (1, 2));
    drop(bench);
    let mut bench = Bench::start(&disk, 8, 0);
    bench.now.store(NOW + 159, Ordering::Relaxed);
    assert!(bench.fetch(&ns("a"), 0).is_some());
    bench.now.store(NOW + 160, Ordering::Relaxed);
    assert_eq!(bench.fetch(&ns("a"), 0), None);
}

#[test]
fn a_slow_disk_costs_pages_and_no_time() {
    let disk = Disk::default();
    let mut bench = Bench::start(&disk, 100, 0);
    bench.at_once.store(false, Ordering::Relaxed);
    bench.put(&ns("a"), 0..90);
    // 64 are at the writer, 4 wait, and the oldest of the others were dropped.
    assert_eq!((bench.disk().dropped, bench.disk().waiting), (90 - 64 - 4, 4));
    let buffer = bench.disk().waiting;
    bench.at_once.store(true, Ordering::Relaxed);
    bench.tier.settle();
    bench.tier.settle();
    assert_eq!((bench.disk().writes, bench.disk().waiting), (64 + buffer, 0));
    assert!(bench.fetch(&ns("a"), 89).is_some() && bench.fetch(&ns("a"), 64).is_none());
    // Reads are bounded as well.
    bench.at_once.store(false, Ordering::Relaxed);
    let fetch = |bench: &mut Bench, numbers: std::ops::Range<u32>| -> Vec<_> {
        let page = |number| bench.tier.fetch(&key(number), &ns("a"), &words(number));
        let pages: Vec<_> = numbers.filter_map(page).collect();
        pages.into_iter().map(|page| (page, bench.tier.hold())).collect()
    };
    let held = fetch(&mut bench, 0..40);
    assert_eq!((held.len(), bench.disk().reading), (4, 4));
    assert_eq!(bench.tier.reading_takes(), Duration::from_millis(2));
    // So are pages that were read and are held.
    bench.at_once.store(true, Ordering::Relaxed);
    bench.tier.settle();
    assert_eq!((bench.disk().reading, fetch(&mut bench, 40..60).len()), (0, 0));
    drop(held);
    assert_eq!(fetch(&mut bench, 40..60).len(), 4);
}

#[test]
fn a_page_whose_step_failed_is_not_waited_for() {
    let mut bench = Bench::start(&Disk::default(), 8, 0);
    let lost = empty(ns("a"), 0);
    bench.tier.put(key(0), Arc::clone(&lost));
    bench.tier.settle();
    assert_eq!((bench.disk().waiting, bench.disk().writes), (1, 0), "its contents may still come");
    // The page is put again before the failure is known, and this time it arrives.
    bench.put(&ns("a"), 0..1);
    assert_eq!((bench.disk().waiting, bench.disk().writes), (0, 1));
    let lost = empty(ns("a"), 1);
    bench.tier.put(key(1), Arc::clone(&lost));
    drop(lost);
    bench.tier.settle();
    assert_eq!((bench.disk().waiting, bench.disk().writes, bench.disk().dropped), (0, 1, 0));
}

#[test]
fn a_damaged_page_is_counted_erased_and_written_again() {
    let disk = Disk::default();
    Bench::start(&disk, 8, 0).put(&ns("a"), 0..3);
    disk.pages.bytes.lock().unwrap()[4096 + 3] ^= 1;
    let mut bench = Bench::start(&disk, 8, 0);
    let found: Vec<bool> = (0..3).map(|number| bench.fetch(&ns("a"), number).is_some()).collect();
    assert_eq!((found, bench.disk().damaged, bench.disk().pages), (vec![true, false, true], 1, 2));
    bench.put(&ns("a"), 1..2);
    assert!(bench.fetch(&ns("a"), 1).is_some());
    assert_eq!(bench.failures.load(Ordering::Relaxed), 0, "the disk is as good as before");
}

#[test]
fn a_disk_that_fails_is_left_alone_and_told_once() {
    let disk = Disk::default();
    let mut bench = Bench::start(&disk, 8, 2);
    bench.put(&ns("a"), 0..4);
    bench.at_once.store(false, Ordering::Relaxed);
    let reads = [0, 1].map(|number| bench.tier.fetch(&key(number), &ns("a"), &words(number)).unwrap());
    bench.put(&ns("a"), 5..7);
    disk.break_down();
    bench.at_once.store(true, Ordering::Relaxed);
    bench.tier.settle();
    assert!(reads.iter().all(|page| page.has_contents() && !page.is_filled()), "nobody waits");
    let usage = bench.disk();
    assert_eq!((usage.working, usage.errors, usage.pages, usage.reading), (0, 4, 0, 0));
    assert_eq!(bench.failures.load(Ordering::Relaxed), 1);
    // Memory goes on alone.
    bench.put(&ns("a"), 7..8);
    assert!(bench.fetch(&ns("a"), 7).is_some() && bench.fetch(&ns("a"), 0).is_none());
    bench.tier.expire();
    assert_eq!(bench.disk().errors, 4);
}

#[test]
fn forgetting_on_a_disk_that_failed_takes_all_of_it() {
    let disk = Disk::default();
    let mut bench = Bench::start(&disk, 8, 0);
    bench.put(&ns("a"), 0..4);
    disk.break_down();
    bench.put(&ns("a"), 5..6);
    assert_eq!(bench.disk().working, 0);
    // The disk works again, but stays unused.
    disk.index.broken.store(false, Ordering::Relaxed);
    disk.pages.broken.store(false, Ordering::Relaxed);
    bench.tier.retain(&|other| *other != ns("a"));
    bench.tier.settle();
    drop(bench);
    let mut bench = Bench::start(&disk, 8, 0);
    assert!((0..6).all(|number| bench.fetch(&ns("a"), number).is_none()));
}

#[test]
fn a_smaller_disk_keeps_what_fits_and_the_newest_written_last() {
    let disk = Disk::default();
    Bench::start(&disk, 8, 0).put(&ns("a"), 0..8);
    let mut bench = Bench::start(&disk, 4, 0);
    assert_eq!((bench.disk().pages, disk.pages.copy().len()), (4, 4 * 4096));
    bench.put(&ns("a"), 20..22);
    let found: HashMap<u32, bool> =
        (0..22).map(|number| (number, bench.fetch(&ns("a"), number).is_some())).collect();
    let found: Vec<u32> = (0..22).filter(|number| found[number]).collect();
    assert_eq!(found, [2, 3, 20, 21], "those written longest ago made room");
    assert_eq!(LAYOUT.slots_in(4096 + 10 * (4096 + 256)), 10);
    assert_eq!(LAYOUT.slots_in(0), 0);
}

/// A device whose pages hold nothing.
struct Nowhere;

impl PageContents for Nowhere {
    fn page_bytes(&self) -> usize {
        LAYOUT.page_bytes
    }

    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        to.fill(page.0 as u8);
        Ok(())
    }

    fn import(&mut self, _from: &[u8], _page: PageId) -> Result<(), TransferError> {
        Ok(())
    }
}

#[test]
fn pages_of_the_device_are_saved_once_and_outlive_it() {
    let (disk, ns, words) = (Disk::default(), ns("a"), [1, 2, 3, 4, 5, 6]);
    let cache = || {
        let Bench { tier, .. } = Bench::start(&disk, 8, 1);
        let config =
            CacheConfig { pages: 6, page_size: 2, words_per_position: 1, sessions: 1, hash_key: [3; 32] };
        let memory = HostMemory { tier: Box::new(tier), page_bytes: LAYOUT.page_bytes, window: 0 };
        KvCache::new(config).unwrap().with_host_memory(memory)
    };
    let step = |cache: &mut KvCache, most: usize| {
        let mut transfers = Vec::new();
        cache.copy_ahead(most);
        cache.take_transfers(&mut transfers);
        transfers.iter().for_each(|transfer| transfer.carry_out(&mut Nowhere).unwrap());
        cache.settle();
        cache.settle();
        transfers.len()
    };
    let mut first = cache();
    let mut table = Vec::new();
    first.allocate(3, &mut table).unwrap();
    for index in 0..3 {
        let _ = first.publish(&ns, &table, index, &words);
    }
    assert_eq!([2, 2, 2].map(|most| step(&mut first, most)), [2, 1, 0], "a few per step, and once");
    let stats = first.stats();
    assert_eq!((stats.disk.writes, stats.host.pages), (3, 0), "they are not in host memory");
    std::mem::forget(first);

    let mut second = cache();
    let fetch = second.fetch(&ns, None, &words, 6).unwrap();
    assert_eq!((fetch.coming(), fetch.is_over()), (3, false));
    second.settle();
    assert!(fetch.is_over());
    let mut back = Vec::new();
    assert_eq!(second.match_host(&ns, &words, 6, &[], &mut back), 6);
    assert!(second.fetch(&ns, None, &words, 6).is_none(), "nothing is left to wait for");
    drop(fetch);
    assert!(second.fetch(&ns, None, &[9; 6], 6).is_none());
    second.forget_namespace(&ns);
    second.settle();
    std::mem::forget(second);
    assert!(cache().fetch(&ns, None, &words, 6).is_none());
}
