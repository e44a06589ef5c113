//! A tier whose results are reproducible: the same calls give the same pages. For simulations and
//! tests.
//!
//! It drops exactly the page put or touched longest ago. Its time is a number that its owner sets.
//! It is plain, and slow.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{HostKey, HostPage, HostTier, HostUsage};
use crate::namespace::Namespace;

struct Entry {
    page: Arc<HostPage>,
    /// Position in the order of use; larger is newer.
    turn: u64,
    /// Time at which the page was put, in the units of `now`.
    put_at: u64,
}

/// An exact least-recently-used tier, with a clock that its owner sets.
pub struct LruTier {
    capacity: u64,
    time_to_live: Option<u64>,
    now: Arc<AtomicU64>,
    entries: HashMap<HostKey, Entry>,
    /// Keys by their turn: oldest use first.
    order: BTreeMap<u64, HostKey>,
    turns: u64,
    usage: HostUsage,
}

impl LruTier {
    /// A tier of `capacity` bytes. `time_to_live` is in the units of `now`; `None` keeps pages
    /// until room is needed.
    pub fn new(capacity: usize, time_to_live: Option<u64>, now: Arc<AtomicU64>) -> Self {
        let capacity = capacity as u64;
        Self {
            capacity,
            time_to_live,
            now,
            entries: HashMap::new(),
            order: BTreeMap::new(),
            turns: 0,
            usage: HostUsage { capacity, ..HostUsage::default() },
        }
    }

    /// Every page with its key, oldest use first.
    pub fn iter(&self) -> impl Iterator<Item = (&HostKey, &Arc<HostPage>)> {
        self.order.values().map(|key| (key, &self.entries[key].page))
    }

    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn next_turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    fn take_out(&mut self, key: &HostKey) {
        let Some(entry) = self.entries.remove(key) else { return };
        self.order.remove(&entry.turn);
        self.usage.pages -= 1;
        self.usage.bytes -= entry.page.bytes() as u64;
    }

    fn drop_expired(&mut self) {
        let Some(time_to_live) = self.time_to_live else { return };
        let now = self.now();
        let old = |entry: &Entry| now.saturating_sub(entry.put_at) >= time_to_live;
        let expired: Vec<HostKey> =
            self.entries.iter().filter(|(_, entry)| old(entry)).map(|(key, _)| *key).collect();
        for key in expired {
            self.take_out(&key);
            self.usage.expirations += 1;
        }
    }
}

impl HostTier for LruTier {
    fn put(&mut self, key: HostKey, page: Arc<HostPage>) {
        self.drop_expired();
        self.take_out(&key);
        let bytes = page.bytes() as u64;
        let entry = Entry { page, turn: self.next_turn(), put_at: self.now() };
        self.order.insert(entry.turn, key);
        self.entries.insert(key, entry);
        self.usage.pages += 1;
        self.usage.bytes += bytes;
        while self.usage.bytes > self.capacity
            && let Some((_, &oldest)) = self.order.first_key_value()
        {
            self.take_out(&oldest);
            self.usage.evictions += 1;
        }
    }

    fn get(&mut self, key: &HostKey) -> Option<Arc<HostPage>> {
        self.drop_expired();
        self.entries.get(key).map(|entry| Arc::clone(&entry.page))
    }

    fn touch(&mut self, keys: &[HostKey]) {
        for key in keys {
            let turn = self.next_turn();
            if let Some(entry) = self.entries.get_mut(key) {
                self.order.remove(&entry.turn);
                entry.turn = turn;
                self.order.insert(turn, *key);
            }
        }
    }

    fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool) {
        let is_kept = |entry: &Entry| keep(entry.page.namespace());
        let dropped: Vec<HostKey> =
            self.entries.iter().filter(|(_, entry)| !is_kept(entry)).map(|(key, _)| *key).collect();
        for key in dropped {
            self.take_out(&key);
        }
    }

    fn expire(&mut self) {
        self.drop_expired();
    }

    fn usage(&self) -> HostUsage {
        self.usage
    }
}
