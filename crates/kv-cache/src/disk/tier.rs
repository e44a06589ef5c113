//! The tier: memory in front, the disk behind it.
//!
//! A page is written when it comes, not when it leaves memory. So a crash costs little, and leaving
//! costs nothing. Every page is written once, and again only when it would soon be too old.
//!
//! A page that was read goes into memory. Where there is no memory tier, it lives for as long as
//! the caller that asked for it holds it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use super::{DiskIo, Done, Job, ReadError, SlotFiles, Storage, Waker, slots::Slots};
use crate::{
    config::ConfigError,
    host::{HostContents, HostKey, HostPage, HostTier, HostUsage},
    namespace::Namespace,
};

/// Most writes handed to the writer. Writes that still wait in the tier's queue can be forgotten.
const WRITES: usize = 64;
/// Size of `passing` below which it is not searched for entries that are no longer held.
const LEAST_PASSING: usize = 64;
/// How long the tier waits at its end for pages to be written.
const PATIENCE: Duration = Duration::from_secs(5);
/// A read counts for one eighth (1 / `INERTIA`) in the estimate of the read time.
const INERTIA: u32 = 8;

/// Settings of a disk tier.
pub struct DiskConfig {
    /// Bytes of pages that may wait to be written, and the same again for pages being read or held.
    pub buffer_bytes: usize,
    /// Time after which a page on disk is dropped; `None` keeps it.
    pub time_to_live: Option<Duration>,
    /// How long a request waits for pages; `None`: as long as computing them would take.
    pub patience: Option<Duration>,
    /// Called when the disk fails. The disk is not used after that.
    pub on_failure: Box<dyn Fn(&io::Error) + Send>,
}

/// What is on disk, and what was done there.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct DiskUsage {
    /// Gauge: tiers that work; 0 after an error.
    pub working: u64,
    /// Gauge: pages on disk.
    pub pages: u64,
    /// Gauge: bytes of these pages, padding included.
    pub bytes: u64,
    /// Gauge: bytes that may be used.
    pub capacity: u64,
    /// Gauge: pages that are being read.
    pub reading: u64,
    /// Gauge: pages that wait to be written.
    pub waiting: u64,
    /// Counter: pages that were read and verified.
    pub hits: u64,
    /// Counter: searches that ended at a page that is not on disk.
    pub misses: u64,
    /// Counter: pages written.
    pub writes: u64,
    /// Counter: pages that were not written because the disk was too slow.
    pub dropped: u64,
    /// Counter: pages overwritten to make room.
    pub evictions: u64,
    /// Counter: pages erased because they had outlived their time.
    pub expirations: u64,
    /// Counter: pages that failed verification.
    pub damaged: u64,
    /// Counter: errors that the disk reported.
    pub errors: u64,
}

/// A page on its way to the disk.
type Leaving = (HostKey, Arc<HostPage>);

/// A tier on disk behind one in memory, or behind none.
pub struct DiskTier {
    memory: Option<Box<dyn HostTier>>,
    slots: Slots,
    slot_bytes: u64,
    io: Box<dyn DiskIo>,
    config: DiskConfig,
    page_bytes: usize,
    /// Pages whose contents have not arrived, oldest first.
    arriving: VecDeque<Leaving>,
    /// Pages that wait for the writer, oldest first.
    queue: VecDeque<Leaving>,
    /// Keys of the pages in `arriving` and `queue` and at the writer.
    leaving: HashSet<HostKey>,
    /// Writes and erasures handed to the writer and not done.
    at_writer: usize,
    /// Pages that are being read, by key.
    reading: HashMap<HostKey, Arc<HostPage>>,
    /// Pages that are being read, or were read and are held. Without a memory tier, also pages on
    /// their way to the disk.
    passing: HashMap<HostKey, Weak<HostPage>>,
    /// Size of `passing` at which the entries that are no longer held are removed.
    most_passing: usize,
    /// Cloned for every page that a fetch holds, so that its count bounds them.
    held: Arc<()>,
    /// When the tier last looked for old pages.
    aged_at: u64,
    /// Estimated time to read a page; `None` before the first read.
    read_time: Option<Duration>,
    usage: DiskUsage,
}

/// Contents that will never come.
struct Nothing;

impl HostContents for Nothing {
    fn bytes(&self) -> Option<&[u8]> {
        None
    }
}

impl DiskTier {
    /// Bytes of memory that a tier of `slots` slots takes, pages on their way included.
    pub fn memory_bytes(slots: u32, buffer_bytes: usize) -> usize {
        Slots::bytes_of(slots).saturating_add(buffer_bytes.saturating_mul(2))
    }

    /// Builds a tier over the first `slots` slots of `files`. `io` starts what carries out jobs on
    /// them.
    ///
    /// # Errors
    ///
    /// When the files cannot be read, or the tables do not fit in memory.
    pub fn new<S: Storage, I: DiskIo + 'static>(
        memory: Option<Box<dyn HostTier>>,
        files: SlotFiles<S>,
        slots: u32,
        config: DiskConfig,
        io: impl FnOnce(SlotFiles<S>) -> io::Result<I>,
    ) -> io::Result<Self> {
        files.keep_first(slots)?;
        let time_to_live = config.time_to_live.map(|time| time.as_secs().max(1));
        let slots = Slots::new(slots, time_to_live, files.entries(slots)?)
            .map_err(|error: ConfigError| io::Error::other(error))?;
        let layout = files.layout();
        Ok(Self {
            memory,
            slots,
            slot_bytes: layout.slot_bytes(),
            page_bytes: layout.page_bytes,
            io: Box::new(io(files)?),
            config,
            arriving: VecDeque::new(),
            queue: VecDeque::new(),
            leaving: HashSet::new(),
            at_writer: 0,
            reading: HashMap::new(),
            passing: HashMap::new(),
            most_passing: LEAST_PASSING,
            held: Arc::new(()),
            aged_at: 0,
            read_time: None,
            usage: DiskUsage { working: 1, ..DiskUsage::default() },
        })
    }

    fn is_off(&self) -> bool {
        self.usage.working == 0
    }

    /// Pages that fit into the buffer.
    fn buffered(&self) -> usize {
        (self.config.buffer_bytes / self.page_bytes.max(1)).max(1)
    }

    /// Accepts a page whose contents are on their way into host memory.
    fn write_soon(&mut self, key: HostKey, page: &Arc<HostPage>) {
        if self.is_off() {
            return;
        }
        if self.leaving.contains(&key) {
            // The step that was to fill the earlier page may have failed.
            if let Some(place) = self.arriving.iter_mut().find(|(other, _)| *other == key) {
                place.1 = Arc::clone(page);
                self.pass(key, page);
            }
            return;
        }
        let now = self.io.now();
        if let Some(slot) = self.slots.find(&key, now)
            && !self.slots.is_ageing(slot, now)
        {
            self.slots.touch(&key);
            return;
        }
        self.leaving.insert(key);
        if self.memory.is_none() {
            self.pass(key, page);
        }
        self.arriving.push_back((key, Arc::clone(page)));
    }

    /// Moves pages that have arrived into the queue. Drops pages that never will arrive, and the
    /// oldest ones that exceed the buffer.
    fn queue_arrived(&mut self) {
        for _ in 0..self.arriving.len() {
            let Some((key, page)) = self.arriving.pop_front() else { break };
            if page.is_filled() {
                self.queue.push_back((key, page));
            } else if Arc::strong_count(&page) == 1 && !page.has_contents() {
                // Its step failed: no one is left who could fill it.
                self.leaving.remove(&key);
            } else {
                self.arriving.push_back((key, page));
            }
        }
        while self.queue.len() + self.arriving.len() > self.buffered() {
            let Some((key, _)) = self.queue.pop_front().or_else(|| self.arriving.pop_front()) else { break };
            self.leaving.remove(&key);
            self.usage.dropped += 1;
        }
    }

    fn feed_writer(&mut self) {
        while let Some(slot) = self.slots.next_to_erase() {
            self.io.start(Job::Erase { slot });
            self.at_writer += 1;
        }
        let at = self.io.now();
        while self.at_writer < WRITES
            && let Some((key, page)) = self.queue.pop_front()
        {
            let Some((slot, turn)) = self.slots.begin_write(key, *page.namespace(), at) else {
                self.queue.push_front((key, page));
                break;
            };
            self.io.start(Job::Write { slot, turn, at, key, page });
            self.at_writer += 1;
        }
    }

    fn take_done(&mut self) {
        while let Some(done) = self.io.done() {
            match done {
                Done::Written { slot, key, result } => {
                    self.at_writer -= 1;
                    self.leaving.remove(&key);
                    self.slots.end_write(slot, result.is_ok());
                    match result {
                        Ok(()) => self.usage.writes += 1,
                        Err(error) => self.fail(&error),
                    }
                }
                Done::Erased { slot, result } => {
                    self.at_writer -= 1;
                    self.slots.erased(slot);
                    if let Err(error) = result {
                        self.fail(&error);
                    }
                }
                Done::Read { slot, key, page, result, took } => {
                    self.reading.remove(&key);
                    self.observe(took);
                    self.take_read(slot, key, page, result);
                }
            }
        }
    }

    fn take_read(
        &mut self,
        slot: u32,
        key: HostKey,
        page: Arc<HostPage>,
        result: Result<Box<[u8]>, ReadError>,
    ) {
        let intact = !matches!(result, Err(ReadError::Damaged));
        let wanted = self.slots.end_read(slot, intact);
        match result {
            Ok(contents) if wanted => {
                self.usage.hits += 1;
                page.keep(Box::new(contents));
                if let Some(memory) = &mut self.memory {
                    memory.put(key, page);
                }
                return;
            }
            // The page was forgotten meanwhile, or the slot holds another page with the same key.
            Ok(_) | Err(ReadError::Another) => self.usage.misses += 1,
            Err(ReadError::Damaged) => self.usage.damaged += 1,
            Err(ReadError::Io(error)) => self.fail(&error),
        }
        page.keep(Box::new(Nothing));
    }

    fn observe(&mut self, took: Duration) {
        self.read_time = Some(match self.read_time {
            None => took,
            Some(mean) => mean - mean / INERTIA + took / INERTIA,
        });
    }

    /// Counts an error of the disk and stops using it.
    fn fail(&mut self, error: &io::Error) {
        self.usage.errors += 1;
        if self.is_off() {
            return;
        }
        self.usage.working = 0;
        self.arriving.clear();
        self.queue.clear();
        self.leaving.clear();
        (self.config.on_failure)(error);
    }

    /// Whether there is room to read one more page.
    fn may_read(&self) -> bool {
        let held = Arc::strong_count(&self.held) - 1;
        self.reading.len().max(held) < self.buffered()
    }

    /// Keeps a page findable for as long as it is held.
    fn pass(&mut self, key: HostKey, page: &Arc<HostPage>) {
        if self.passing.len() >= self.most_passing {
            self.passing.retain(|_, page| page.strong_count() > 0);
            self.most_passing = (2 * self.passing.len()).max(LEAST_PASSING);
        }
        self.passing.insert(key, Arc::downgrade(page));
    }

    fn passing(&self, key: &HostKey) -> Option<Arc<HostPage>> {
        self.passing.get(key)?.upgrade()
    }

    /// Waits until everything that has arrived is written, for at most `patience`.
    fn flush(&mut self, patience: Duration) {
        let start = Instant::now();
        self.settle();
        while !self.is_off() && self.at_writer + self.queue.len() > 0 {
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            self.io.wait(left);
            self.settle();
        }
    }
}

impl HostTier for DiskTier {
    fn put(&mut self, key: HostKey, page: Arc<HostPage>) {
        self.write_soon(key, &page);
        if let Some(memory) = &mut self.memory {
            memory.put(key, page);
        }
    }

    fn get(&mut self, key: &HostKey) -> Option<Arc<HostPage>> {
        let kept = self.memory.as_mut().and_then(|memory| memory.get(key));
        kept.or_else(|| self.passing(key))
    }

    fn renew(&mut self, key: &HostKey, ns: &Namespace, words: &[u32]) -> bool {
        if let Some(memory) = &mut self.memory {
            let kept = memory.get(key).filter(|page| page.is_filled() && page.is_of(ns, words));
            let Some(page) = kept else { return false };
            self.put(*key, page);
            return true;
        }
        if self.passing(key).is_some_and(|page| page.is_filled() && page.is_of(ns, words)) {
            return true;
        }
        let now = self.io.now();
        let found = if self.is_off() { None } else { self.slots.find(key, now) };
        let fresh = found.is_some_and(|slot| !self.slots.is_ageing(slot, now));
        if fresh {
            self.slots.touch(key);
        }
        fresh
    }

    fn fetch(&mut self, key: &HostKey, ns: &Namespace, words: &[u32]) -> Option<Arc<HostPage>> {
        if let Some(page) = self.get(key).filter(|page| page.is_filled()) {
            return Some(page);
        }
        if let Some(page) = self.reading.get(key) {
            return Some(Arc::clone(page));
        }
        if self.is_off() {
            return None;
        }
        let Some(slot) = self.slots.find(key, self.io.now()) else {
            self.usage.misses += 1;
            return None;
        };
        if !self.may_read() {
            return None;
        }
        self.slots.begin_read(slot);
        let page = HostPage::new(*ns, words.into(), self.page_bytes);
        self.pass(*key, &page);
        self.reading.insert(*key, Arc::clone(&page));
        self.io.start(Job::Read { slot, key: *key, page: Arc::clone(&page) });
        Some(page)
    }

    fn hold(&self) -> Option<Arc<()>> {
        Some(Arc::clone(&self.held))
    }

    fn is_saved(&mut self, key: &HostKey) -> bool {
        self.is_off() || self.leaving.contains(key) || self.slots.find(key, self.io.now()).is_some()
    }

    fn may_save(&self) -> bool {
        // The other half of the buffer is for pages that have no other place.
        !self.is_off() && 2 * (self.queue.len() + self.arriving.len()) < self.buffered()
    }

    fn save(&mut self, key: HostKey, page: Arc<HostPage>) {
        self.write_soon(key, &page);
    }

    fn touch(&mut self, keys: &[HostKey]) {
        if let Some(memory) = &mut self.memory {
            memory.touch(keys);
        }
        keys.iter().for_each(|key| self.slots.touch(key));
    }

    fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool) {
        if let Some(memory) = &mut self.memory {
            memory.retain(keep);
        }
        let Self { arriving, queue, leaving, .. } = self;
        for list in [arriving, queue] {
            list.retain(|(key, page)| keep(page.namespace()) || !leaving.remove(key));
        }
        self.passing.retain(|_, page| page.upgrade().is_some_and(|page| keep(page.namespace())));
        if self.is_off() {
            // After a failure, single pages can no longer be erased: discard everything.
            self.io.start(Job::Discard);
        } else {
            self.slots.retain(keep);
            self.feed_writer();
        }
    }

    fn expire(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.expire();
        }
        self.settle();
    }

    fn settle(&mut self) {
        self.take_done();
        if !self.is_off() {
            let now = self.io.now();
            if now != self.aged_at {
                self.aged_at = now;
                self.slots.expire(now);
            }
            self.queue_arrived();
            self.feed_writer();
        }
    }

    fn usage(&self) -> HostUsage {
        self.memory.as_ref().map(|memory| memory.usage()).unwrap_or_default()
    }

    fn disk(&self) -> Option<DiskUsage> {
        let (slots, pages) = self.slots.counts();
        let pages = if self.is_off() { 0 } else { pages as u64 };
        Some(DiskUsage {
            pages,
            bytes: pages * self.slot_bytes,
            capacity: slots as u64 * self.slot_bytes,
            reading: self.reading.len() as u64,
            waiting: (self.arriving.len() + self.queue.len()) as u64,
            evictions: self.slots.evictions,
            expirations: self.slots.expirations,
            ..self.usage
        })
    }

    fn reading_takes(&self) -> Duration {
        let rounds = self.reading.len().div_ceil(self.io.readers().max(1));
        self.read_time.unwrap_or_default().saturating_mul(u32::try_from(rounds).unwrap_or(u32::MAX))
    }

    fn patience(&self) -> Option<Duration> {
        self.config.patience
    }

    fn set_waker(&mut self, waker: Waker) {
        self.io.set_waker(waker);
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        self.flush(PATIENCE);
    }
}
