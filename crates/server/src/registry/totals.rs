//! What engines have counted, added up, so that counters go on when an engine goes.
//!
//! Every field is named on its way, so a new one does not compile before it is added up.

use beamline_kv_cache::disk::DiskUsage;
use beamline_kv_cache::{CacheStats, HostUsage};
use beamline_scheduler::{EngineStats, SchedulerStats};

/// A sum over engines. Gauges of engines that are gone are zero, because an engine ends when
/// nothing is left in it; their pages are gone with them.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    scheduler: SchedulerStats,
    cache: CacheStats,
}

impl Totals {
    /// Adds what an engine that runs has counted.
    pub(super) fn add(&mut self, stats: &EngineStats) {
        self.scheduler = sum_scheduler(self.scheduler, stats.scheduler);
        self.cache = sum_cache(self.cache, stats.cache);
    }

    /// Adds what an engine that is gone had counted.
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

    /// The sum.
    pub(super) fn stats(self) -> EngineStats {
        EngineStats { scheduler: self.scheduler, cache: self.cache }
    }
}

/// Adds every field of two values of a type, except those for which another function is named.
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
        // The engine that is worst off: a sum would say nothing.
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
