//! State that the thread and the handles share.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use beamline_kv_cache::CacheStats;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{limits::Limits, request::Refusal, scheduler::SchedulerStats, time::Micros};

/// Value of `drained_by` while the engine is not draining.
const NEVER: u64 = u64::MAX;

/// Statistics, all taken at the same moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    /// Requests, tokens, rows, steps and their time.
    pub scheduler: SchedulerStats,
    /// Pages that are free, referenced and cached; hits; evictions.
    pub cache: CacheStats,
}

pub(super) struct Shared {
    started: Instant,
    pub(super) limits: Limits,
    /// Free places in the queue.
    places: Arc<Semaphore>,
    next_id: AtomicU64,
    /// Requests that were refused before they reached the scheduler.
    refused: AtomicU64,
    heartbeat: AtomicU64,
    /// Whether the thread was woken and has not looked at the reason yet.
    woken: AtomicBool,
    /// When the remaining requests are dropped, once draining.
    drained_by: AtomicU64,
    /// Written once per step, read now and then: a lock is cheap here and keeps all numbers
    /// consistent.
    stats: Mutex<EngineStats>,
}

impl Shared {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            started: Instant::now(),
            limits,
            places: Arc::new(Semaphore::new(limits.config.max_queued.min(Semaphore::MAX_PERMITS))),
            next_id: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            heartbeat: AtomicU64::new(0),
            woken: AtomicBool::new(false),
            drained_by: AtomicU64::new(NEVER),
            stats: Mutex::new(EngineStats::default()),
        }
    }

    /// The current time, in the engine's time.
    pub(super) fn now(&self) -> Micros {
        Micros(0).after(self.started.elapsed())
    }

    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a place in the queue. Dropping the permit gives the place back.
    pub(super) fn take_place(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let limit = self.limits.config.max_queued;
        self.places.clone().try_acquire_owned().map_err(|_| Refusal::QueueFull { limit })
    }

    pub(super) fn count_refusal(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn beat(&self) {
        self.heartbeat.store(self.now().0, Ordering::Relaxed);
    }

    pub(super) fn heartbeat(&self) -> Micros {
        Micros(self.heartbeat.load(Ordering::Relaxed))
    }

    /// Notes that the thread is to be woken. Returns whether it was noted already.
    pub(super) fn set_woken(&self) -> bool {
        self.woken.swap(true, Ordering::SeqCst)
    }

    /// Clears the note: the thread looks at everything now.
    pub(super) fn clear_woken(&self) {
        self.woken.store(false, Ordering::SeqCst);
    }

    pub(super) fn start_drain(&self, patience: Duration) {
        let by = self.now().after(patience).0.min(NEVER - 1);
        self.drained_by.fetch_min(by, Ordering::Relaxed);
    }

    /// When the remaining requests are dropped, if the engine drains.
    pub(super) fn drained_by(&self) -> Option<Micros> {
        let by = self.drained_by.load(Ordering::Relaxed);
        (by != NEVER).then_some(Micros(by))
    }

    pub(super) fn publish(&self, stats: EngineStats) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    pub(super) fn stats(&self) -> EngineStats {
        let mut stats = *self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.scheduler.refused += self.refused.load(Ordering::Relaxed);
        let waiting = self.limits.config.max_queued.saturating_sub(self.places.available_permits());
        // Requests in the channel wait too.
        stats.scheduler.queued = waiting as u64;
        stats
    }
}
