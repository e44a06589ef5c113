//! What engines have counted, added up, so that counters go on when an engine goes.

use beamline_kv_cache::CacheStats;
use beamline_scheduler::{EngineStats, SchedulerStats};

/// A sum over engines. Gauges of engines that are gone are zero, because an engine ends when nothing is left in it; their
/// pages are gone with them.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    scheduler: SchedulerStats,
    cache: CacheStats,
}

impl Totals {
    /// Adds what an engine that runs has counted.
    pub(super) fn add(&mut self, stats: &EngineStats) {
        self.add_counters(stats);
        let (scheduler, cache) = (&stats.scheduler, &stats.cache);
        self.scheduler.queued += scheduler.queued;
        self.scheduler.running += scheduler.running;
        self.cache.pages += cache.pages;
        self.cache.free += cache.free;
        self.cache.cached_unreferenced += cache.cached_unreferenced;
        self.cache.referenced += cache.referenced;
        self.cache.published += cache.published;
        self.cache.sessions += cache.sessions;
        self.cache.host.pages += cache.host.pages;
        self.cache.host.bytes += cache.host.bytes;
        self.cache.host.capacity += cache.host.capacity;
    }

    /// Adds what an engine that is gone had counted.
    pub(super) fn add_counters(&mut self, stats: &EngineStats) {
        let (sum, other) = (&mut self.scheduler, &stats.scheduler);
        sum.accepted += other.accepted;
        sum.refused += other.refused;
        sum.finished += other.finished;
        sum.failed += other.failed;
        sum.expired += other.expired;
        sum.cancelled += other.cancelled;
        sum.degraded += other.degraded;
        sum.retried += other.retried;
        sum.hit_tokens += other.hit_tokens;
        sum.restored_tokens += other.restored_tokens;
        sum.restored_pages += other.restored_pages;
        sum.missed_tokens += other.missed_tokens;
        sum.steps += other.steps;
        sum.failed_steps += other.failed_steps;
        sum.context_rows += other.context_rows;
        sum.branch_rows += other.branch_rows;
        sum.step_micros += other.step_micros;
        let (sum, other) = (&mut self.cache, &stats.cache);
        sum.lookups += other.lookups;
        sum.hit_positions += other.hit_positions;
        sum.session_hit_positions += other.session_hit_positions;
        sum.missed_positions += other.missed_positions;
        sum.hash_collisions += other.hash_collisions;
        sum.publications += other.publications;
        sum.duplicates += other.duplicates;
        sum.evictions += other.evictions;
        sum.host_lookups += other.host_lookups;
        sum.host_hit_positions += other.host_hit_positions;
        sum.host_exports += other.host_exports;
        sum.host.evictions += other.host.evictions;
        sum.host.expirations += other.host.expirations;
    }

    /// The sum.
    pub(super) fn stats(self) -> EngineStats {
        EngineStats { scheduler: self.scheduler, cache: self.cache }
    }
}
