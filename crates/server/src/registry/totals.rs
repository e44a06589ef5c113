//! The sums of all engines' counters, so that counters keep their values when an engine ends.
//!
//! The code names every field, so a new field that is not added up does not compile.

use beamline_kv_cache::disk::DiskUsage;
use beamline_kv_cache::{CacheStats, HostUsage};
use beamline_scheduler::{EngineStats, SchedulerStats};

/// A sum over engines. Gauges of ended engines are zero, because an engine ends when it is empty;
/// its pages are freed with it.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    scheduler: SchedulerStats,
    cache: CacheStats,
}

impl Totals {
    /// Adds the statistics of a running engine.
    pub(super) fn add(&mut self, stats: &EngineStats) {
        self.scheduler = sum_scheduler(self.scheduler, stats.scheduler);
        self.cache = sum_cache(self.cache, stats.cache);
    }

    /// Adds the counters of an engine that has ended.
    pub(super) fn add_counters(&mut self, stats: &EngineStats) {
        let gone = EngineStats {
            scheduler: SchedulerStats { queued: 0, running: 0, failed_in_a_row: 0, ..stats.scheduler },
            cache: CacheStats {
                pages: 0,
                free: 0,
                cached_unreferenced: 0,
                referenced: 0,
                published: 0,
                sessions: 0,
                host: HostUsage { pages: 0, bytes: 0, capacity: 0, ..stats.cache.host },
                disk: DiskUsage {
                    working: 0,
                    pages: 0,
                    bytes: 0,
                    capacity: 0,
                    reading: 0,
                    waiting: 0,
                    ..stats.cache.disk
                },
                ..stats.cache
            },
        };
        self.add(&gone);
    }

    /// The sum of all engines.
    pub(super) fn stats(self) -> EngineStats {
        EngineStats { scheduler: self.scheduler, cache: self.cache }
    }
}

/// Adds every field of two values of a type, except fields that name another function.
macro_rules! sum {
    ($type:ident, $a:expr, $b:expr; $($field:ident),+; $($other:ident: $join:expr),*) => {{
        let $type { $($field,)+ $($other,)* } = $a;
        let b = $b;
        $type { $($field: $field + b.$field,)+ $($other: $join($other, b.$other),)* }
    }};
}

fn sum_scheduler(a: SchedulerStats, b: SchedulerStats) -> SchedulerStats {
    sum!(
        SchedulerStats, a, b;
        queued, running, accepted, refused, finished, failed, expired, cancelled, dropped, degraded, retried, hit_tokens,
        restored_tokens, restored_pages, missed_tokens, steps, failed_steps, context_rows, branch_rows, step_micros;
        // The value of the engine that is worst off: a sum would be meaningless.
        failed_in_a_row: u64::max
    )
}

fn sum_cache(a: CacheStats, b: CacheStats) -> CacheStats {
    sum!(
        CacheStats, a, b;
        pages, free, cached_unreferenced, referenced, published, sessions, lookups, hit_positions,
        session_hit_positions, missed_positions, hash_collisions, publications, duplicates, evictions, host_lookups,
        host_hit_positions, host_exports;
        host: sum_host, disk: sum_disk
    )
}

fn sum_host(a: HostUsage, b: HostUsage) -> HostUsage {
    sum!(HostUsage, a, b; pages, bytes, capacity, evictions, expirations;)
}

fn sum_disk(a: DiskUsage, b: DiskUsage) -> DiskUsage {
    sum!(
        DiskUsage, a, b;
        working, pages, bytes, capacity, reading, waiting, hits, misses, writes, dropped, evictions, expirations, damaged,
        errors;
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_engines_that_are_gone_stay_and_gauges_go() {
        let scheduler = SchedulerStats {
            queued: 1,
            running: 2,
            finished: 3,
            failed_in_a_row: 4,
            ..SchedulerStats::default()
        };
        let host = HostUsage { pages: 5, evictions: 6, ..HostUsage::default() };
        let cache = CacheStats { free: 7, lookups: 8, host, ..CacheStats::default() };
        let stats = EngineStats { scheduler, cache };
        let mut totals = Totals::default();
        totals.add_counters(&stats);
        totals.add(&stats);
        let EngineStats { scheduler, cache } = totals.stats();
        assert_eq!((scheduler.queued, scheduler.running, scheduler.finished), (1, 2, 6));
        assert_eq!(scheduler.failed_in_a_row, 4);
        assert_eq!((cache.free, cache.lookups, cache.host.pages, cache.host.evictions), (7, 16, 5, 12));
    }
}
