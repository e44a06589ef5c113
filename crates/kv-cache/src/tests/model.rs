//! Hundreds of thousands of random operations on small pools, compared with the naive reference
//! after each one.
//!
//! An operation is plain data, and what it refers to is taken modulo what exists, so any list of
//! operations can be run. When one fails, it is shortened and printed; paste it into a call of
//! `replay` to see it again.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::reference::{Content, HostEntry, HostReference, Reference};
use crate::chain::ChainHash;
use crate::{
    CacheConfig, CacheStats, HostKey, HostMemory, HostPage, KvCache, LruTier, Namespace, OutOfPages,
    PageContents, PageId, Publish, SessionKey, Transfer, TransferError,
};

const SEEDS: u64 = 250;
const OPERATIONS: usize = 2000;

/// The shape of the cache an operation list runs on.
#[derive(Copy, Clone, Debug)]
struct Shape {
    pages: u32,
    page_size: u32,
    words_per_position: u32,
    sessions: u32,
    /// Hash values that exist; `None` is the real hash.
    hash_values: Option<u8>,
    /// Host pages that fit, more or less, and how far copies go ahead.
    host: Option<(u8, u8)>,
    time_to_live: Option<u8>,
}

/// Bytes of a page on the simulated device: the number of its content.
const PAGE_BYTES: usize = 8;

#[derive(Copy, Clone, Debug)]
enum Op {
    /// A request arrives: match, then allocate the rest, or leave when there is no room.
    Begin {
        ns: u8,
        context: u8,
        positions: u8,
        max_positions: u8,
        session: Option<u8>,
        /// Whether the step that would have moved pages fails before it does.
        fails: bool,
    },
    /// The next page of a request is computed and published.
    Compute {
        request: u8,
    },
    /// A request ends, and may be remembered as the user's newest.
    End {
        request: u8,
        remember: Option<u8>,
    },
    /// A second request retains the published pages of another request.
    Fork {
        request: u8,
    },
    /// Another holder takes pages and gives them back.
    Pressure {
        pages: u8,
        fails: bool,
    },
    /// Pages are copied ahead of their eviction.
    CopyAhead {
        pages: u8,
        fails: bool,
    },
    Wait {
        time: u8,
    },
    Forget {
        ns: u8,
    },
}

/// The SplitMix64 random number generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u8 {
        (self.next() % bound) as u8
    }

    fn maybe(&mut self, bound: u64) -> Option<u8> {
        self.next().is_multiple_of(2).then(|| self.below(bound))
    }

    fn shape(&mut self) -> Shape {
        Shape {
            pages: 1 + u32::from(self.below(40)),
            page_size: 1 + u32::from(self.below(3)),
            words_per_position: 1 + u32::from(self.below(2)),
            sessions: u32::from(self.below(9)),
            hash_values: self.maybe(4).map(|values| values + 1),
            host: self.maybe(60).map(|pages| (pages, self.below(20))),
            time_to_live: self.maybe(40).map(|time| time + 1),
        }
    }

    fn op(&mut self) -> Op {
        match self.below(100) {
            0..22 => {
                let ns = self.below(4);
                Op::Begin {
                    ns,
                    context: self.below(12),
                    positions: self.below(20),
                    max_positions: if self.below(3) == 0 { self.below(20) } else { u8::MAX },
                    // Mostly a user of the namespace, now and then another one.
                    session: self.maybe(4).map(|user| if user < 3 { 3 * ns + user } else { self.below(12) }),
                    fails: self.below(10) == 0,
                }
            }
            22..72 => Op::Compute { request: self.below(256) },
            72..90 => Op::End { request: self.below(256), remember: self.maybe(3) },
            90..92 => Op::Fork { request: self.below(256) },
            92..95 => Op::Pressure { pages: self.below(24), fails: self.below(10) == 0 },
            95..98 => Op::CopyAhead { pages: self.below(6), fails: self.below(10) == 0 },
            98 => Op::Wait { time: self.below(10) },
            _ => Op::Forget { ns: self.below(4) },
        }
    }
}

/// A request in flight.
#[derive(Clone)]
struct Request {
    ns: Namespace,
    words: Vec<u32>,
    table: Vec<PageId>,
    /// Pages for which publishing was tried.
    done: usize,
}

/// The real cache, the naive one, and the memory of the device.
struct World {
    shape: Shape,
    cache: KvCache,
    reference: Reference,
    /// What each page's KV was last computed or restored from: the truth by which a hit is judged.
    device: Device,
    /// The time of the host tier.
    now: Arc<AtomicU64>,
    requests: Vec<Request>,
    namespaces: Vec<Namespace>,
    users: Vec<SessionKey>,
    /// Pages that were copied ahead, each with its generation.
    copied: HashSet<(PageId, u64)>,
    /// How many pages came back from the host tier.
    restored: u64,
    before: CacheStats,
}

/// The simulated contents of a page are the number of its content.
#[derive(Default)]
struct Device {
    contents: Vec<Content>,
    pages: HashMap<PageId, u64>,
}

impl Device {
    fn write(&mut self, page: PageId, content: Content) {
        self.pages.insert(page, self.contents.len() as u64);
        self.contents.push(content);
    }

    fn read(&self, page: PageId) -> &Content {
        &self.contents[self.pages[&page] as usize]
    }
}

impl PageContents for Device {
    fn page_bytes(&self) -> usize {
        PAGE_BYTES
    }

    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        to.copy_from_slice(&self.pages[&page].to_le_bytes());
        Ok(())
    }

    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError> {
        self.pages.insert(page, u64::from_le_bytes(from.try_into().unwrap()));
        Ok(())
    }
}

/// The key under which a content is filed.
fn key_of(hash: &ChainHash, words_per_page: usize, (ns, words): &Content) -> HostKey {
    let pages = words.chunks(words_per_page);
    HostKey(pages.fold(hash.root(ns), |link, words| hash.next(&link, words)).bytes())
}

impl World {
    fn new(shape: Shape) -> Self {
        let Shape { pages, page_size, words_per_position, sessions, hash_values, host, time_to_live } = shape;
        let hash_key = [9; 32];
        let hash = move || match hash_values {
            None => ChainHash::Keyed(hash_key),
            Some(values) => ChainHash::Colliding { hash_key, values },
        };
        let config = CacheConfig { pages, page_size, words_per_position, sessions, hash_key };
        let namespaces: Vec<Namespace> =
            [("m1", "t1"), ("m1", "t2"), ("m2", "t1"), ("m2", "t2")].map(of_names).into();
        let users = namespaces.iter().flat_map(|ns| ["a", "b", "c"].map(|user| SessionKey::new(ns, user)));
        let words_per_page = (page_size * words_per_position) as usize;
        let mut cache = KvCache::with_hash(config, hash()).unwrap();
        let mut reference = Reference::new(pages as usize, sessions as usize, words_per_page);
        let now = Arc::new(AtomicU64::new(0));
        if let Some((host_pages, window)) = host {
            let capacity = host_pages as usize * HostPage::bytes_of(PAGE_BYTES, 5 * words_per_page);
            let time_to_live = time_to_live.map(u64::from);
            let tier = LruTier::new(capacity, time_to_live, Arc::clone(&now));
            cache = cache.with_host_memory(HostMemory {
                tier: Box::new(tier),
                page_bytes: PAGE_BYTES,
                window: window.into(),
            });
            reference.host = Some(HostReference {
                capacity: capacity as u64,
                time_to_live,
                now: 0,
                pages: Vec::new(),
                key_of: Box::new(move |content| key_of(&hash(), words_per_page, content)),
                page_bytes: PAGE_BYTES,
            });
        }
        Self {
            shape,
            cache,
            reference,
            device: Device::default(),
            now,
            requests: Vec::new(),
            users: users.collect(),
            namespaces,
            copied: HashSet::new(),
            restored: 0,
            before: CacheStats::default(),
        }
    }

    fn words_per_page(&self) -> usize {
        (self.shape.page_size * self.shape.words_per_position) as usize
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Begin { ns, context, positions, max_positions, session, fails } => {
                let words = words_of(context, positions as usize * self.shape.words_per_position as usize);
                let session = session.map(|user| self.users[user as usize]);
                self.begin(self.namespaces[ns as usize], words, max_positions as usize, session, fails);
            }
            Op::Compute { request } => {
                if let Some(request) = self.pick(request) {
                    self.compute(request);
                }
            }
            Op::End { request, remember } => {
                if let Some(request) = self.pick(request) {
                    let request = self.requests.swap_remove(request);
                    self.end(&request, remember);
                }
            }
            Op::Fork { request } => {
                if let Some(request) = self.pick(request) {
                    self.fork(request);
                }
            }
            Op::Pressure { pages, fails } => {
                let mut taken = Vec::new();
                if self.allocate(pages as usize, &mut taken) {
                    self.move_out(fails);
                    self.release_all(&taken);
                }
            }
            Op::CopyAhead { pages, fails } => {
                self.copy_ahead(pages as usize);
                self.move_out(fails);
            }
            Op::Wait { time } => {
                let now = self.now.load(Ordering::Relaxed) + u64::from(time);
                self.now.store(now, Ordering::Relaxed);
                if let Some(host) = &mut self.reference.host {
                    host.now = now;
                    host.expire();
                }
                self.cache.expire_host();
            }
            Op::Forget { ns } => {
                let ns = self.namespaces[ns as usize];
                assert_eq!(self.cache.forget_namespace(&ns), self.reference.forget(ns));
            }
        }
        self.compare();
    }

    fn begin(
        &mut self,
        ns: Namespace,
        words: Vec<u32>,
        max_positions: usize,
        session: Option<SessionKey>,
        fails: bool,
    ) {
        let max_words = max_positions * self.shape.words_per_position as usize;
        let expected = self.reference.longest(ns, &words, max_words);
        let covered = expected.len() * self.shape.page_size as usize;
        assert_eq!(self.cache.peek_prefix(&ns, session, &words, max_positions), covered);
        let mut table = Vec::new();
        assert_eq!(self.cache.match_prefix(&ns, session, &words, max_positions, &mut table), covered);
        assert_eq!(table, expected);
        for (index, &page) in table.iter().enumerate() {
            let content = (ns, words[..(index + 1) * self.words_per_page()].to_vec());
            assert_eq!(*self.device.read(page), content, "{page:?} holds the KV of something else");
            self.reference.hold(page);
        }

        let (matched, words_per_page) = (table.len(), self.words_per_page());
        let limit = max_words.min(words.len()) / words_per_page;
        let host = self.reference.host.as_mut();
        let expected = host.map_or(0, |host| host.take_over(ns, &words, matched, limit, words_per_page));
        let mut restored = Vec::new();
        let covered = self.cache.match_host(&ns, &words, max_positions, &table, &mut restored);
        assert_eq!(covered, restored.len() * self.shape.page_size as usize);
        assert_eq!(restored.len(), expected);

        let missing = words.len().div_ceil(words_per_page) - matched;
        if !self.allocate(missing, &mut table) {
            self.release_all(&table);
            return;
        }
        self.move_out(fails);
        if fails && !restored.is_empty() {
            self.release_all(&table);
            return;
        }
        for (index, from) in (matched..).zip(restored) {
            let page = table[index];
            Transfer::Import { from, page }.carry_out(&mut self.device).unwrap();
            let content = (ns, words[..(index + 1) * words_per_page].to_vec());
            assert_eq!(*self.device.read(page), content, "something else came back");
            self.restored += 1;
        }
        self.requests.push(Request { ns, words, table, done: 0 });
    }

    /// Carries out the transfers that the cache ordered, or loses them.
    fn move_out(&mut self, fails: bool) {
        let (mut transfers, expected) = (Vec::new(), std::mem::take(&mut self.reference.offloaded));
        self.cache.take_transfers(&mut transfers);
        assert_eq!(transfers.len(), expected.len());
        for (transfer, (from, content)) in transfers.iter().zip(expected) {
            let Transfer::Export { page, to } = transfer else { panic!("nothing comes back unasked") };
            assert_eq!((*page, self.device.read(*page)), (from, &content));
            if !fails {
                transfer.carry_out(&mut self.device).unwrap();
                assert!(to.is_filled());
                if let Some(host) = &mut self.reference.host {
                    host.fill(&content);
                }
            }
        }
    }

    fn copy_ahead(&mut self, most: usize) {
        let window = self.shape.host.map_or(0, |(_, window)| usize::from(window));
        let window = window.saturating_sub(self.reference.free());
        let next: Vec<PageId> = self.reference.unreferenced.iter().take(window).copied().collect();
        let is_new = |page: &&PageId| !self.copied.contains(&(**page, self.reference.epoch(**page)));
        let chosen: Vec<PageId> = next.iter().filter(is_new).take(most).copied().collect();
        for &page in &chosen {
            self.copied.insert((page, self.reference.epoch(page)));
            self.reference.offload(page);
        }
        self.cache.copy_ahead(most);
    }

    fn allocate(&mut self, n: usize, out: &mut Vec<PageId>) -> bool {
        let available = self.reference.available();
        let held = out.len();
        match self.cache.allocate(n, out) {
            Ok(()) => {
                assert!(n <= available && out.len() == held + n);
                self.reference.allocate(&out[held..]);
                true
            }
            Err(error) => {
                assert_eq!(error, OutOfPages { wanted: n, available });
                assert!(n > available && out.len() == held);
                false
            }
        }
    }

    fn compute(&mut self, index: usize) {
        let words_per_page = self.words_per_page();
        let request = &mut self.requests[index];
        let (page, end) = (request.done, (request.done + 1) * words_per_page);
        if end > request.words.len() {
            return;
        }
        if !self.reference.contents.contains_key(&request.table[page]) {
            self.device.write(request.table[page], (request.ns, request.words[..end].to_vec()));
        }
        let expected = self.reference.publish(request.ns, &request.table, page, &request.words);
        let published = self.cache.publish(&request.ns, &request.table, page, &request.words);
        assert_eq!(published, expected);
        if let Publish::Duplicate(existing) = published {
            assert_eq!(*self.device.read(existing), (request.ns, request.words[..end].to_vec()));
            request.table[page] = existing;
        }
        request.done += 1;
    }

    fn fork(&mut self, index: usize) {
        let mut fork = self.requests[index].clone();
        let is_private = |page: &PageId| self.reference.is_private(*page);
        let shared = fork.table.iter().position(is_private).unwrap_or(fork.table.len());
        fork.table.truncate(shared);
        fork.words.truncate(shared * self.words_per_page());
        fork.done = 0;
        for &page in &fork.table {
            self.cache.retain(page);
            self.reference.hold(page);
        }
        self.requests.push(fork);
    }

    fn end(&mut self, request: &Request, remember: Option<u8>) {
        if let Some(user) = remember {
            let key = SessionKey::new(&request.ns, ["a", "b", "c"][user as usize]);
            self.cache.remember(key, &request.ns, &request.table);
            self.reference.remember(key, &request.table);
        }
        self.release_all(&request.table);
    }

    fn release_all(&mut self, table: &[PageId]) {
        self.cache.release_chain(table);
        for &page in table.iter().rev() {
            self.reference.release(page);
        }
    }

    fn pick(&self, request: u8) -> Option<usize> {
        (request as usize).checked_rem(self.requests.len())
    }

    fn compare(&mut self) {
        self.cache.check_invariants();
        let (stats, reference) = (self.cache.stats(), &self.reference);
        assert_eq!(stats.free as usize, reference.free());
        assert_eq!(stats.cached_unreferenced as usize, reference.unreferenced.len());
        assert_eq!(stats.referenced as usize, reference.references.len());
        assert_eq!(stats.published as usize, reference.published.len());
        assert_eq!(stats.sessions as usize, reference.sessions.len());
        assert_eq!(stats.evictions, reference.evictions);
        assert_eq!(self.cache.available(), reference.available());
        assert!(self.cache.unreferenced.iter().map(PageId).eq(reference.unreferenced.iter().copied()));
        for (page, state) in (0..).map(PageId).zip(&self.cache.pages) {
            assert_eq!(state.references, reference.references.get(&page).copied().unwrap_or(0), "{page:?}");
        }
        for (ns, words) in reference.published.keys() {
            let positions = words.len() / self.shape.words_per_position as usize;
            let found = self.cache.peek_prefix(ns, None, words, usize::MAX);
            assert_eq!(found, positions, "a published page cannot be found");
        }
        if let Some(host) = &reference.host {
            assert_eq!((stats.host.pages, stats.host.bytes), (host.pages.len() as u64, host.bytes()));
            assert!(stats.host.bytes <= host.capacity);
            self.assert_chains_are_usable(host);
        }
        assert_monotone(&self.before, &stats);
        self.before = stats;
    }

    /// Asserts that the tier has dropped pages only from the ends of chains. (Colliding keys
    /// overwrite each other.)
    fn assert_chains_are_usable(&self, host: &HostReference) {
        let lost = self.shape.hash_values.is_some();
        for HostEntry { content: (ns, words), .. } in host.pages.iter().filter(|_| !lost) {
            let before = (*ns, words[..words.len() - self.words_per_page()].to_vec());
            let there = before.1.is_empty()
                || self.reference.published.contains_key(&before)
                || host.pages.iter().any(|entry| entry.content == before);
            assert!(there, "a page is kept that no hit can reach");
        }
    }

    /// Ends all requests and asserts that nothing is left behind.
    fn finish(mut self) {
        while let Some(request) = self.requests.pop() {
            self.end(&request, None);
            self.compare();
        }
        let stats = self.cache.stats();
        assert_eq!((stats.referenced, stats.free + stats.cached_unreferenced), (0, stats.pages), "a leak");
        for ns in self.namespaces.clone() {
            self.cache.forget_namespace(&ns);
            self.reference.forget(ns);
            self.compare();
        }
        let stats = self.cache.stats();
        assert_eq!((stats.free, stats.host.pages, stats.host.bytes), (stats.pages, 0, 0), "a leak");
    }
}

fn of_names((model, tenant): (&str, &str)) -> Namespace {
    Namespace::new(model.as_bytes(), tenant.as_bytes())
}

/// The first `len` words of one of a few contexts that share beginnings: mostly zeros, a one here and there.
fn words_of(context: u8, len: usize) -> Vec<u32> {
    let mut random = Random(u64::from(context));
    (0..len).map(|_| u32::from(random.below(8) == 0)).collect()
}

fn assert_monotone(before: &CacheStats, after: &CacheStats) {
    let counters = |stats: &CacheStats| {
        [
            stats.lookups,
            stats.hit_positions,
            stats.session_hit_positions,
            stats.missed_positions,
            stats.hash_collisions,
            stats.publications,
            stats.duplicates,
            stats.evictions,
            stats.host_lookups,
            stats.host_hit_positions,
            stats.host_exports,
            stats.host.evictions,
            stats.host.expirations,
        ]
    };
    assert!(counters(before).iter().zip(counters(after)).all(|(before, after)| *before <= after));
    assert!(after.session_hit_positions <= after.hit_positions);
}

/// Runs an operation list and returns what the cache counted, and how many pages came back.
fn replay(shape: Shape, ops: &[Op]) -> (CacheStats, u64) {
    let mut world = World::new(shape);
    for &op in ops {
        world.apply(op);
    }
    let (stats, restored) = (world.cache.stats(), world.restored);
    world.finish();
    (stats, restored)
}

fn fails(shape: Shape, ops: &[Op]) -> bool {
    catch_unwind(AssertUnwindSafe(|| replay(shape, ops))).is_err()
}

/// Leaves out ever smaller pieces of a failing list for as long as it still fails.
fn shorten(shape: Shape, mut ops: Vec<Op>) -> Vec<Op> {
    let mut piece = ops.len() / 2;
    while piece > 0 {
        let mut start = 0;
        while start < ops.len() {
            let end = (start + piece).min(ops.len());
            let shorter = [&ops[..start], &ops[end..]].concat();
            if fails(shape, &shorter) {
                ops = shorter;
            } else {
                start = end;
            }
        }
        piece /= 2;
    }
    ops
}

#[test]
fn random_operations_agree_with_the_reference() {
    let mut total = CacheStats::default();
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let shape = random.shape();
        let ops: Vec<Op> = (0..OPERATIONS).map(|_| random.op()).collect();
        let Ok((stats, restored)) = catch_unwind(AssertUnwindSafe(|| replay(shape, &ops))) else {
            // The panics of attempts on the way to the short list are of no interest.
            std::panic::set_hook(Box::new(|_| {}));
            let ops = shorten(shape, ops);
            let _ = std::panic::take_hook();
            let trace: String = ops.iter().map(|op| format!("    Op::{op:?},\n")).collect();
            panic!("seed {seed} fails; replay({shape:?}, &[\n{trace}])");
        };
        total.hit_positions += stats.hit_positions;
        total.session_hit_positions += stats.session_hit_positions;
        total.hash_collisions += stats.hash_collisions;
        total.duplicates += stats.duplicates;
        total.evictions += stats.evictions;
        total.host_hit_positions += restored;
        total.host_exports += stats.host_exports;
        total.host.evictions += stats.host.evictions;
        total.host.expirations += stats.host.expirations;
    }
    println!("{total:?}");
    // The operations must have reached what they are meant to test.
    for reached in [
        total.hit_positions,
        total.session_hit_positions,
        total.hash_collisions,
        total.duplicates,
        total.evictions,
        total.host_hit_positions,
        total.host_exports,
        total.host.evictions,
        total.host.expirations,
    ] {
        assert!(reached > 1000, "{total:?}");
    }
}
