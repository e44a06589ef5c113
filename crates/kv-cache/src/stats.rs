//! What the cache reports to the metrics: current gauges, and counters that only grow.

use crate::cache::KvCache;
use crate::disk::DiskUsage;
use crate::host::HostUsage;

/// A snapshot of the cache. `free + cached_unreferenced + referenced == pages` always holds.
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct CacheStats {
    /// Gauge: pages that exist.
    pub pages: u64,
    /// Gauge: pages that hold nothing.
    pub free: u64,
    /// Gauge: published pages without a holder. They are useful, and evictable.
    pub cached_unreferenced: u64,
    /// Gauge: pages with a holder, published or not.
    pub referenced: u64,
    /// Gauge: pages that can be found.
    pub published: u64,
    /// Gauge: remembered sessions, those whose chain was evicted since included.
    pub sessions: u64,
    /// Counter: calls of `match_prefix`.
    pub lookups: u64,
    /// Counter: positions that lookups found cached.
    pub hit_positions: u64,
    /// Counter: hit positions that a session led to.
    pub session_hit_positions: u64,
    /// Counter: positions that lookups asked for and did not find.
    pub missed_positions: u64,
    /// Counter: pages that had the right hash and the wrong content. Anything but 0 is worth an alarm.
    pub hash_collisions: u64,
    /// Counter: pages made findable.
    pub publications: u64,
    /// Counter: pages given up because another request had published the same content.
    pub duplicates: u64,
    /// Counter: published pages recycled to make room.
    pub evictions: u64,
    /// Counter: calls of `match_host` that had something to look for.
    pub host_lookups: u64,
    /// Counter: positions that these calls found.
    pub host_hit_positions: u64,
    /// Counter: pages that were ordered to be copied into the host tier.
    pub host_exports: u64,
    /// What the host tier holds and has dropped.
    pub host: HostUsage,
    /// What is on disk, and was done there.
    pub disk: DiskUsage,
}

/// The counters behind [`CacheStats`].
#[derive(Clone, Copy, Default)]
pub(crate) struct Counters {
    pub(crate) lookups: u64,
    pub(crate) hit_positions: u64,
    pub(crate) session_hit_positions: u64,
    pub(crate) missed_positions: u64,
    pub(crate) hash_collisions: u64,
    pub(crate) publications: u64,
    pub(crate) duplicates: u64,
    pub(crate) evictions: u64,
    pub(crate) host_lookups: u64,
    pub(crate) host_hit_positions: u64,
    pub(crate) host_exports: u64,
}

/// Counts of lookups, kept so that they can be put back when a lookup came to nothing.
#[derive(Clone, Copy, Debug)]
pub struct LookupCounts {
    lookups: u64,
    hit_positions: u64,
    session_hit_positions: u64,
    missed_positions: u64,
    host_lookups: u64,
    host_hit_positions: u64,
}

impl KvCache {
    /// The current counts of lookups.
    pub fn lookup_counts(&self) -> LookupCounts {
        let Counters {
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            host_lookups,
            host_hit_positions,
            ..
        } = self.counters;
        LookupCounts {
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            host_lookups,
            host_hit_positions,
        }
    }

    /// Undoes the counts of a lookup whose request could not be admitted: the request will be
    /// looked up and counted again. Collisions stay counted, because each of them is worth an
    /// alarm.
    pub fn put_back_lookups(&mut self, counts: LookupCounts) {
        let LookupCounts {
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            host_lookups,
            host_hit_positions,
        } = counts;
        self.counters = Counters {
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            host_lookups,
            host_hit_positions,
            ..self.counters
        };
    }

    /// The current gauges and counters, in O(1).
    pub fn stats(&self) -> CacheStats {
        let (pages, free) = (self.pages.len() as u64, self.free.len() as u64);
        let cached_unreferenced = self.unreferenced.len() as u64;
        let Counters {
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            hash_collisions,
            publications,
            duplicates,
            evictions,
            host_lookups,
            host_hit_positions,
            host_exports,
        } = self.counters;
        CacheStats {
            pages,
            free,
            cached_unreferenced,
            referenced: pages - free - cached_unreferenced,
            published: self.published as u64,
            sessions: self.sessions.len() as u64,
            lookups,
            hit_positions,
            session_hit_positions,
            missed_positions,
            hash_collisions,
            publications,
            duplicates,
            evictions,
            host_lookups,
            host_hit_positions,
            host_exports,
            host: self.host.as_ref().map(|host| host.memory.tier.usage()).unwrap_or_default(),
            disk: self.host.as_ref().and_then(|host| host.memory.tier.disk()).unwrap_or_default(),
        }
    }
}
