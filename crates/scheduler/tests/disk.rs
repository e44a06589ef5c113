//! Pages on a slow disk, simulated: requests wait for pages or not, processes are killed, and bytes
//! are flipped. Nothing wrong is ever read.

// Helper functions are test code too.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use beamline_kv_cache::{
    CacheConfig, HostMemory, HostPage, HostTier, LruTier, Namespace, PageContents, PageId, ReuseClass,
    TransferError,
    disk::{DiskConfig, DiskIo, DiskTier, DiskUsage, Done, Job, SlotFiles, SlotLayout, Storage, Waker},
};
use beamline_model::step::{Chunk, ContextShape, Plan, Progress};
use beamline_scheduler::{
    Ending, Event, Lobby, Micros, Priority, Ready, Request, RequestId, Scheduler, SchedulerConfig,
};

const PAGE_SIZE: usize = 4;
const PAGE_BYTES: usize = PAGE_SIZE * 8;
const MOST_CONTEXT: usize = 64;
const USERS: u64 = 12;

/// The SplitMix64 random number generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A file that outlives its process.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Storage for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let from = bytes.get(at as usize..at as usize + to.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let (at, end) = (at as usize, at as usize + from.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(from);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
}

/// A disk whose jobs take virtual time.
struct SlowDisk {
    files: SlotFiles<Memory>,
    now: Arc<AtomicU64>,
    random: Random,
    /// Longest time of a job, in microseconds.
    most_micros: u64,
    /// Jobs with the time at which they are done.
    writes: VecDeque<(u64, Job)>,
    reads: Vec<(u64, Job)>,
}

impl SlowDisk {
    fn carry_out(&self, job: Job) -> Option<Done> {
        match job {
            Job::Write { slot, turn, at, key, page } => {
                Some(Done::Written { slot, key, result: self.files.write(slot, turn, at, key, &page) })
            }
            Job::Read { slot, key, page } => {
                let result = self.files.read(slot, key, &page);
                Some(Done::Read {
                    slot,
                    key,
                    page,
                    result,
                    took: Duration::from_micros(self.most_micros / 2),
                })
            }
            Job::Erase { slot } => Some(Done::Erased { slot, result: self.files.erase(slot) }),
            Job::Discard => self.files.discard().map(|()| None).unwrap(),
        }
    }
}

impl DiskIo for SlowDisk {
    fn start(&mut self, job: Job) {
        let at = self.now.load(Ordering::Relaxed) + 1 + self.random.below(self.most_micros);
        if let Job::Read { .. } = job {
            self.reads.push((at, job));
        } else {
            self.writes.push_back((at, job));
        }
    }

    fn done(&mut self) -> Option<Done> {
        let now = self.now.load(Ordering::Relaxed);
        if let Some(index) = self.reads.iter().position(|(at, _)| *at <= now) {
            let (_, job) = self.reads.swap_remove(index);
            return self.carry_out(job);
        }
        let (_, job) = self.writes.pop_front_if(|(at, _)| *at <= now)?;
        self.carry_out(job)
    }

    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed) / 1_000_000
    }

    fn readers(&self) -> usize {
        2
    }

    fn wait(&mut self, _most: Duration) {}

    fn set_waker(&mut self, _waker: Waker) {}
}

/// The device: a number for every position of every page.
struct Device(Vec<u64>);

impl PageContents for Device {
    fn page_bytes(&self) -> usize {
        PAGE_BYTES
    }

    fn export(&self, page: PageId, to: &mut [u8]) -> Result<(), TransferError> {
        let cells = &self.0[page.0 as usize * PAGE_SIZE..][..PAGE_SIZE];
        for (bytes, cell) in to.as_chunks_mut().0.iter_mut().zip(cells) {
            *bytes = cell.to_le_bytes();
        }
        Ok(())
    }

    fn import(&mut self, from: &[u8], page: PageId) -> Result<(), TransferError> {
        let cells = &mut self.0[page.0 as usize * PAGE_SIZE..][..PAGE_SIZE];
        for (cell, bytes) in cells.iter_mut().zip(from.as_chunks().0) {
            *cell = u64::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

/// The number that stands for keys and values of a position: it depends on the tenant and all words
/// up to it.
fn contents(tenant: u64, words: &[u32]) -> Vec<u64> {
    let mut digest = mix(tenant);
    words
        .iter()
        .map(|word| {
            digest = mix(digest ^ u64::from(*word));
            digest
        })
        .collect()
}

/// One process that uses a disk.
struct Process {
    scheduler: Scheduler<Vec<u64>>,
    lobby: Lobby<Vec<u64>>,
    device: Device,
    now: Arc<AtomicU64>,
    plan: Plan,
    events: Vec<Event<Vec<u64>, u64>>,
    /// The words over which each slot computes.
    open: Vec<Option<Arc<Vec<u64>>>>,
    /// Fetches of requests that are not admitted yet.
    fetched: Vec<Ready<Vec<u64>>>,
    asked: u64,
    ended: u64,
    cached: usize,
}

/// The settings of a process.
#[derive(Clone, Copy)]
struct Setting {
    host_pages: usize,
    slots: u32,
    most_micros: u64,
    patience: Option<Duration>,
}

impl Process {
    fn start(index: &Memory, pages: &Memory, setting: Setting, seed: u64, now: &Arc<AtomicU64>) -> Self {
        let cache = CacheConfig {
            pages: 40,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: 8,
            hash_key: [5; 32],
        };
        let config = SchedulerConfig {
            max_context: MOST_CONTEXT,
            max_beam_width: 1,
            max_running: 4,
            max_step_tokens: 40,
            ..SchedulerConfig::default()
        };
        let layout = SlotLayout { page_bytes: PAGE_BYTES, most_words: MOST_CONTEXT };
        let (files, _) = SlotFiles::open(index.clone(), pages.clone(), layout, &[5; 32], b"model").unwrap();
        let memory = LruTier::new(
            setting.host_pages * HostPage::bytes_of(PAGE_BYTES, MOST_CONTEXT),
            None,
            Arc::default(),
        );
        let memory = (setting.host_pages > 0).then(|| Box::new(memory) as Box<dyn HostTier>);
        let disk = DiskConfig {
            buffer_bytes: 64 * PAGE_BYTES,
            time_to_live: None,
            patience: setting.patience,
            on_failure: Box::new(|error| panic!("{error}")),
        };
        let io = |files| {
            Ok(SlowDisk {
                files,
                now: Arc::clone(now),
                random: Random(seed),
                most_micros: setting.most_micros,
                writes: VecDeque::new(),
                reads: Vec::new(),
            })
        };
        let tier = DiskTier::new(memory, files, setting.slots, disk, io).unwrap();
        let host = HostMemory { tier: Box::new(tier), page_bytes: PAGE_BYTES, window: 8 };
        Self {
            scheduler: Scheduler::new(config, cache).unwrap().with_host_memory(host),
            lobby: Lobby::default(),
            device: Device(vec![0; 40 * PAGE_SIZE]),
            now: Arc::clone(now),
            plan: Plan::default(),
            events: Vec::new(),
            open: vec![None; 4],
            fetched: Vec::new(),
            asked: 0,
            ended: 0,
            cached: 0,
        }
    }

    fn now(&self) -> Micros {
        Micros(self.now.load(Ordering::Relaxed))
    }

    fn ask(&mut self, tenant: u64, words: &[u32], deadline: Option<Micros>) {
        self.asked += 1;
        let request = Request {
            id: RequestId(self.asked),
            namespace: Namespace::new(b"model", &tenant.to_le_bytes()),
            session: None,
            words: words.into(),
            context_len: words.len(),
            reuse: ReuseClass::CrossRequest,
            shape: ContextShape::Causal,
            beam_width: 1,
            beam_widths: None,
            min_beam_width: 1,
            priority: Priority::Interactive,
            keeps_branches: true,
            generated_steps: 1,
            deadline,
            payload: Arc::new(contents(tenant, words)),
        };
        let now = self.now();
        if let Some(ready) = self.lobby.enter(now, now, request, &mut self.scheduler) {
            self.submit(ready);
        }
    }

    fn submit(&mut self, ready: Ready<Vec<u64>>) {
        match self.scheduler.submit(ready.submitted_at, ready.request.clone()) {
            Ok(()) => self.fetched.push(ready),
            Err(_) => self.ended += 1,
        }
    }

    /// Runs one round of the process.
    fn turn(&mut self, random: &mut Random) {
        self.now.fetch_add(1 + random.below(60), Ordering::Relaxed);
        self.scheduler.settle();
        let now = self.now();
        assert!(
            self.lobby.next_end().is_none_or(|end| end.since(now).0 <= 1_000_000),
            "nobody waits for ever"
        );
        while let Some(ready) = self.lobby.leave(now) {
            self.submit(ready);
        }
        if self.scheduler.is_idle() {
            self.scheduler.idle();
            return;
        }
        self.scheduler.plan(now, &mut self.plan, &mut self.events);
        self.carry_out();
        if self.plan.is_empty() {
            return;
        }
        for transfer in &self.plan.transfers {
            transfer.carry_out(&mut self.device).unwrap();
        }
        let chunks = std::mem::take(&mut self.plan.chunks);
        let mut outcomes = chunks.iter().map(|chunk| (chunk.slot, self.compute(chunk))).collect();
        self.plan.transfers.clear();
        let rows: usize = chunks.iter().map(|chunk| chunk.positions.len()).sum();
        let took = Micros(10 + 3 * rows as u64);
        self.now.fetch_add(took.0, Ordering::Relaxed);
        self.scheduler.commit(self.now(), took, &mut outcomes, &mut self.events);
        self.scheduler.check_invariants();
        self.carry_out();
    }

    /// Reads the cached positions and checks them; writes the others.
    fn compute(&mut self, chunk: &Chunk) -> Progress<u64> {
        let expected = self.open[chunk.slot.0 as usize].clone().unwrap();
        let table = &self.plan.pages[chunk.context_pages.clone()];
        let cell =
            |position: usize| table[position / PAGE_SIZE].0 as usize * PAGE_SIZE + position % PAGE_SIZE;
        for position in 0..chunk.cached {
            assert_eq!(self.device.0[cell(position)], expected[position], "position {position} is wrong");
        }
        for position in chunk.cached..chunk.positions.end {
            self.device.0[cell(position)] = expected[position];
        }
        match chunk.expand {
            Some(_) => Progress::Finished(expected[chunk.positions.end - 1]),
            None => Progress::Prefilled,
        }
    }

    fn carry_out(&mut self) {
        for event in std::mem::take(&mut self.events) {
            match event {
                Event::Opened { id, slot, payload } => {
                    self.open[slot.0 as usize] = Some(payload);
                    self.fetched.retain(|ready| ready.request.id != id);
                }
                Event::Closed(slot) => self.open[slot.0 as usize] = None,
                Event::Ended(ended) => {
                    let ready = self.fetched.iter().position(|ready| ready.request.id == ended.id);
                    ready.map(|index| self.fetched.swap_remove(index));
                    if let Ending::Failed(why) = ended.ending {
                        panic!("{why}");
                    }
                    self.ended += 1;
                    self.cached += ended.usage.cached_tokens;
                }
            }
        }
    }

    fn finish(&mut self, random: &mut Random) {
        let mut turns = 0;
        while !self.scheduler.is_idle() || !self.lobby.is_empty() {
            self.turn(random);
            turns += 1;
            assert!(turns < 1_000_000, "somebody is never served");
        }
        assert_eq!(self.asked, self.ended);
    }

    fn disk(&self) -> DiskUsage {
        self.scheduler.cache().stats().disk
    }
}

/// The next history of a user: mostly the last one with more at its end.
fn visit(histories: &mut [Vec<u32>], random: &mut Random) -> (u64, Vec<u32>) {
    let user = random.below(USERS);
    let history = &mut histories[user as usize];
    if random.below(20) == 0 {
        history.truncate(random.below(MOST_CONTEXT as u64) as usize);
    }
    let more = 1 + random.below(6);
    history.extend((0..more).map(|_| random.below(50) as u32));
    if history.len() > MOST_CONTEXT {
        *history = history[history.len() - MOST_CONTEXT / 2..].to_vec();
    }
    // Users share tenants, but never pages.
    (user % 3, [vec![user as u32 + 1000], history[1..].to_vec()].concat())
}

/// Totals over the lives of several processes on one disk.
#[derive(Default, Debug)]
struct Total {
    hits: u64,
    damaged: u64,
    writes: u64,
    cached_first: usize,
}

fn lives(seed: u64, setting: Setting, total: &mut Total) {
    let mut random = Random(seed);
    let (index, pages) = (Memory::default(), Memory::default());
    let now = Arc::new(AtomicU64::new(0));
    let mut histories: Vec<Vec<u32>> = (0..USERS).map(|user| vec![user as u32; 20]).collect();
    for life in 0..4 {
        let mut process = Process::start(&index, &pages, setting, seed ^ life, &now);
        for number in 0..120 {
            let (tenant, words) = visit(&mut histories, &mut random);
            let deadline = (random.below(4) == 0).then(|| process.now().after(Duration::from_millis(2)));
            process.ask(tenant, &words, deadline);
            if random.below(25) == 0 && process.lobby.cancel(RequestId(process.asked)) {
                process.ended += 1;
            }
            for _ in 0..random.below(8) {
                process.turn(&mut random);
            }
            if number == 30 && life > 0 {
                total.cached_first += process.cached;
            }
        }
        if random.below(2) == 0 {
            process.finish(&mut random);
        }
        let usage = process.disk();
        total.hits += usage.hits;
        total.damaged += usage.damaged;
        total.writes += usage.writes;
        // The process is killed: transfers on their way are lost.
        std::mem::forget(process);
        for file in [&index, &pages] {
            let mut bytes = file.0.lock().unwrap();
            for _ in 0..random.below(3) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
            if random.below(4) == 0 {
                let len = bytes.len() as u64;
                bytes.truncate((len - random.below(len / 4)) as usize);
            }
        }
    }
}

#[test]
fn nothing_wrong_is_ever_read_and_returning_users_hit() {
    let settings = [
        Setting { host_pages: 20, slots: 400, most_micros: 100, patience: None },
        Setting { host_pages: 0, slots: 400, most_micros: 100, patience: None },
        Setting { host_pages: 5, slots: 40, most_micros: 2000, patience: None },
        Setting { host_pages: 0, slots: 60, most_micros: 500, patience: Some(Duration::from_millis(1)) },
    ];
    let mut damaged = 0;
    for (number, setting) in settings.into_iter().enumerate() {
        let mut total = Total::default();
        for seed in 0..10 {
            lives(seed * 7 + number as u64, setting, &mut total);
        }
        println!("{total:?}");
        assert!(total.hits > 20 && total.writes > 1000, "{number}: {total:?}");
        assert!(total.cached_first > 1000, "{number}: {total:?}");
        damaged += total.damaged;
    }
    assert!(damaged > 50, "{damaged}");
}

/// A process that was restarted, so that a user's context is only on disk.
fn restarted(setting: Setting) -> (Process, Vec<u32>) {
    let (index, pages, now) = (Memory::default(), Memory::default(), Arc::new(AtomicU64::new(0)));
    let words: Vec<u32> = (0..41).collect();
    let mut process = Process::start(&index, &pages, setting, 1, &now);
    process.ask(1, &words, None);
    process.finish(&mut Random(1));
    // Other contexts displace it.
    for other in 1..5 {
        process.ask(1, &words.iter().map(|word| word + 100 * other).collect::<Vec<_>>(), None);
        process.finish(&mut Random(1));
    }
    for _ in 0..200 {
        process.turn(&mut Random(1));
    }
    std::mem::forget(process);
    (Process::start(&index, &pages, setting, 1, &now), words)
}

#[test]
fn a_request_waits_for_its_pages_and_computes_only_the_rest() {
    for host_pages in [0, 100] {
        let setting = Setting { host_pages, slots: 100, most_micros: 100, patience: None };
        let (mut process, words) = restarted(setting);
        process.ask(1, &words, None);
        assert!(!process.lobby.is_empty() && process.scheduler.is_idle(), "it waits outside");
        assert_eq!(process.disk().reading, 10);
        // A request that needs nothing from disk does not wait.
        process.ask(2, &words, None);
        assert!(!process.scheduler.is_idle());
        process.finish(&mut Random(1));
        assert_eq!((process.cached, process.disk().hits), (40, 10));
        assert_eq!(process.scheduler.stats().restored_tokens, 40);
    }
}

#[test]
fn a_disk_that_hangs_costs_a_wait_and_no_answer() {
    let setting = Setting { host_pages: 100, slots: 100, most_micros: 100, patience: None };
    let (mut process, words) = restarted(setting);
    let hangs = u64::MAX / 4;
    // The time of the device does not advance.
    let device_time = Arc::new(AtomicU64::new(process.now().0));
    process.now = device_time;
    process.ask(1, &words, None);
    let end = process.lobby.next_end().unwrap();
    assert!(end.since(process.now()).0 <= 1_000_000 && end.0 < hangs);
    process.now.store(end.0, Ordering::Relaxed);
    process.finish(&mut Random(1));
    assert_eq!((process.cached, process.ended), (0, 1), "it was computed");
    // Half of the time left to a deadline is reserved for computing.
    process.ask(
        1,
        &words.iter().map(|word| word + 100).collect::<Vec<_>>(),
        Some(process.now().after(Duration::from_micros(500))),
    );
    assert!(process.lobby.next_end().is_none_or(|end| end.since(process.now()).0 <= 250));
}

#[test]
fn where_reading_is_slower_than_computing_nobody_waits() {
    let setting = Setting { host_pages: 100, slots: 100, most_micros: 5_000, patience: None };
    let (mut process, words) = restarted(setting);
    // The first request shows how slow the disk is and how fast the model.
    process.ask(1, &words, None);
    process.finish(&mut Random(1));
    for number in 10..20 {
        process.ask(1, &(0..60).map(|word| word + 1000 * number).collect::<Vec<_>>(), None);
        process.finish(&mut Random(1));
    }
    for _ in 0..1000 {
        process.turn(&mut Random(1));
    }
    process.ask(1, &words.iter().map(|word| word + 200).collect::<Vec<_>>(), None);
    assert!(process.lobby.is_empty(), "10 pages take 25 ms to read and 120 us to compute");
    process.finish(&mut Random(1));
}
