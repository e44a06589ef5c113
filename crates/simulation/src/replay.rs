//! Replays a log through the bookkeeping of the cache, to find which part of each visit's context
//! an earlier visit left there.
//!
//! The real [`KvCache`] decides what is found, evicted, sent to host memory and brought back. It is
//! called as the scheduler calls it: one request at a time, each with the pages of its branch rows.
//! Pages have no contents, because nothing is computed from them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Result, ensure};
use beamline_kv_cache::{
    CacheConfig, HostContents, HostMemory, HostPage, KvCache, LruTier, Namespace, PageId, Publish,
    SessionKey, Transfer,
};

use crate::logs::{Log, Visit};

/// Context positions per page.
pub const PAGE_SIZE: usize = 32;
/// Tokens of an item: begin, three codes, end.
const TOKENS_PER_ITEM: usize = 5;
/// Pages of the branch rows of a request: two steps of 32 beams.
const BRANCH_PAGES: usize = 2;
/// Number of next evictions that are copied ahead.
const WINDOW: usize = 64;

/// The size of the memory, and how long histories are cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// Number of pages of the pool.
    pub pages: usize,
    /// Size of the host memory behind the pool, in bytes; `None` without one.
    pub host_bytes: Option<usize>,
    /// Size of a page's contents, in bytes.
    pub page_bytes: usize,
    /// Most items of a history.
    pub fit: usize,
    /// Number of items that are dropped at a time from a longer history.
    pub step: usize,
}

/// The cached part of a visit's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Number of tokens of the context.
    pub context: usize,
    /// Context tokens that were found in pages of the pool.
    pub cached: usize,
    /// Context tokens that came back from host memory.
    pub restored: usize,
}

/// Tokens of a history of `items` items: the items, and the token that asks for the next one.
#[must_use]
pub fn context_tokens(items: usize) -> usize {
    items * TOKENS_PER_ITEM + 1
}

/// Number of the oldest items that are dropped: as few steps as are needed, as in the server.
#[must_use]
pub fn dropped(items: usize, fit: usize, step: usize) -> usize {
    items.saturating_sub(fit).div_ceil(step) * step
}

/// Number of pages that hold every user's last context.
#[must_use]
pub fn pages_of_all(log: &Log, fit: usize) -> usize {
    log.users.iter().map(|events| context_tokens(events.len().min(fit)) / PAGE_SIZE).sum()
}

/// Replays all visits in order and returns what each found.
///
/// # Errors
///
/// When the memory does not hold a single request.
pub fn replay(log: &Log, visits: &[Visit], setting: Setting) -> Result<Vec<Found>> {
    let mut replayed = Replay::new(log, setting)?;
    visits.iter().map(|visit| replayed.visit(visit)).collect()
}

struct Replay<'a> {
    log: &'a Log,
    setting: Setting,
    cache: KvCache,
    namespace: Namespace,
    words: Vec<u32>,
    table: Vec<PageId>,
    restored: Vec<Arc<HostPage>>,
    transfers: Vec<Transfer>,
}

/// Contents that have arrived and are empty.
struct Nothing;

impl HostContents for Nothing {
    fn bytes(&self) -> Option<&[u8]> {
        Some(&[])
    }
}

impl<'a> Replay<'a> {
    fn new(log: &'a Log, setting: Setting) -> Result<Self> {
        let least = context_tokens(setting.fit).div_ceil(PAGE_SIZE) + BRANCH_PAGES;
        ensure!(setting.pages >= least, "{} pages do not hold a request of {least}", setting.pages);
        ensure!(setting.step > 0, "histories are cut by at least one item");
        let mut cache = KvCache::new(CacheConfig {
            pages: u32::try_from(setting.pages)?,
            page_size: PAGE_SIZE as u32,
            words_per_position: 1,
            sessions: u32::try_from(log.users.len())?,
            hash_key: [1; 32],
        })?;
        if let Some(bytes) = setting.host_bytes {
            let tier = Box::new(LruTier::new(bytes, None, Arc::new(AtomicU64::new(0))));
            let (page_bytes, window) = (setting.page_bytes, WINDOW);
            cache = cache.with_host_memory(HostMemory { tier, page_bytes, window });
        }
        Ok(Self {
            log,
            setting,
            cache,
            namespace: Namespace::new(b"model", b""),
            words: Vec::new(),
            table: Vec::new(),
            restored: Vec::new(),
            transfers: Vec::new(),
        })
    }

    fn visit(&mut self, visit: &Visit) -> Result<Found> {
        let Setting { fit, step, .. } = self.setting;
        let first = dropped(visit.items, fit, step);
        self.words.clear();
        for &(_, item) in &self.log.users[visit.user][first..visit.items] {
            // A begin token, three codes that spell the item, an end token.
            self.words.extend([0, item & 0xff | 0x100, item >> 8 & 0xff | 0x200, item >> 16 | 0x300, 1]);
        }
        self.words.push(0);
        let context = self.words.len();
        let shared = context / PAGE_SIZE;
        let session = SessionKey(visit.user as u128);
        self.table.clear();
        self.restored.clear();
        let wanted = shared * PAGE_SIZE;
        let cached =
            self.cache.match_prefix(&self.namespace, Some(session), &self.words, wanted, &mut self.table);
        let restored =
            self.cache.match_host(&self.namespace, &self.words, wanted, &self.table, &mut self.restored);
        let pages = context.div_ceil(PAGE_SIZE);
        self.cache.allocate(pages - self.table.len() + BRANCH_PAGES, &mut self.table)?;
        self.move_pages();
        // After the computation, whole pages are published and the others are given back.
        for index in cached / PAGE_SIZE..shared {
            let published = self.cache.publish(&self.namespace, &self.table, index, &self.words);
            if let Publish::Duplicate(existing) = published {
                self.table[index] = existing;
            }
        }
        self.cache.release_chain(&self.table[shared..]);
        self.cache.remember(session, &self.namespace, &self.table[..shared]);
        self.cache.release_chain(&self.table[..shared]);
        self.cache.copy_ahead(2 * pages);
        self.move_pages();
        Ok(Found { context, cached, restored })
    }

    /// Carries out all transfers: the copies have arrived at once.
    fn move_pages(&mut self) {
        self.cache.take_transfers(&mut self.transfers);
        for transfer in self.transfers.drain(..) {
            if let Some((_, to)) = transfer.leaving() {
                to.keep(Box::new(Nothing));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Users with 40 items each, who view them in turns.
    fn log(users: usize) -> Log {
        let events = |user: usize| {
            (0..40).map(|n| ((n * users + user) as f64, (1000 * user + n) as u32)).collect::<Vec<_>>()
        };
        Log { name: "l", users: (0..users).map(events).collect() }
    }

    fn share(found: &[Found]) -> f64 {
        let sum = |part: fn(&Found) -> usize| found.iter().map(part).sum::<usize>() as f64;
        sum(|f| f.cached + f.restored) / sum(|f| f.context)
    }

    const ROOMY: Setting = Setting { pages: 4096, host_bytes: None, page_bytes: 1000, fit: 64, step: 16 };

    #[test]
    fn with_room_for_all_every_whole_page_of_the_last_visit_is_found() {
        let log = log(10);
        let visits = log.visits(0.0);
        let found = replay(&log, &visits, ROOMY).unwrap();
        for (visit, found) in visits.iter().zip(&found) {
            assert_eq!(found.context, 5 * visit.items + 1);
            // Everything that the last visit had: the token that asks for an item is the one that
            // begins it.
            assert_eq!(found.cached, context_tokens(visit.items - 1) / PAGE_SIZE * PAGE_SIZE);
        }
    }

    #[test]
    fn with_room_for_one_only_who_comes_at_once_again_finds_anything() {
        let tight = Setting { pages: 13, ..ROOMY };
        let many = log(10);
        // The first contexts are short and all fit.
        let found = replay(&many, &many.visits(0.0), tight).unwrap();
        assert_eq!(share(&found[found.len() / 2..]), 0.0);
        let one = log(1);
        assert!(share(&replay(&one, &one.visits(0.0), tight).unwrap()) > 0.7);
    }

    #[test]
    fn host_memory_gives_back_what_the_pool_lost() {
        let tight = Setting { pages: 20, ..ROOMY };
        let log = log(10);
        let visits = log.visits(0.0);
        let with_host = Setting { host_bytes: Some(10 * 8 * 4000), ..tight };
        let found = replay(&log, &visits, with_host).unwrap();
        let roomy = replay(&log, &visits, ROOMY).unwrap();
        assert!(found.iter().any(|found| found.restored > 0));
        assert!((share(&found) - share(&roomy)).abs() < 1e-9, "{} {}", share(&found), share(&roomy));
    }

    #[test]
    fn cutting_one_item_at_a_time_loses_the_cache_and_coarse_cuts_keep_it() {
        let log = log(3);
        let visits = log.visits(0.0);
        let cut = |step| share(&replay(&log, &visits, Setting { fit: 16, step, ..ROOMY }).unwrap());
        assert!(cut(4) > cut(1) + 0.2, "{} {}", cut(4), cut(1));
        assert_eq!((dropped(16, 16, 4), dropped(17, 16, 4), dropped(21, 16, 4)), (0, 4, 8));
    }

    #[test]
    fn a_pool_for_less_than_a_request_is_refused() {
        assert!(replay(&log(1), &[], Setting { pages: 12, ..ROOMY }).is_err());
    }
}
