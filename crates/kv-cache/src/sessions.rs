//! Sessions: for each of the most recent users, the tail of the newest chain.
//!
//! A session is only a hint. It holds no reference, so its page may be evicted and recycled; the
//! generation tells. The page it leads to is verified like any other candidate. The table has a
//! fixed capacity and forgets the user who was remembered longest ago.

use crate::config::{ConfigError, table};
use crate::index::SlotIndex;
use crate::list::SlotList;
use crate::namespace::SessionKey;
use crate::page::{PageId, PageRef};

#[derive(Copy, Clone)]
struct Session {
    key: SessionKey,
    /// Hash of the key, by which the session is filed.
    bucket_hash: u64,
    tail: PageRef,
}

/// From a user to the tail of the newest chain.
pub(crate) struct SessionTable {
    /// The sessions of the slots in `by_age`; the other slots are vacant.
    slots: Vec<Session>,
    free: Vec<u32>,
    index: SlotIndex,
    by_age: SlotList,
}

impl SessionTable {
    pub(crate) fn new(capacity: u32) -> Result<Self, ConfigError> {
        let vacant = Session {
            key: SessionKey(0),
            bucket_hash: 0,
            tail: PageRef { page: PageId(u32::MAX), generation: 0 },
        };
        let mut free = table(capacity as usize, 0, "sessions")?;
        for (slot, entry) in (0..capacity).rev().zip(&mut free) {
            *entry = slot;
        }
        Ok(Self {
            slots: table(capacity as usize, vacant, "sessions")?,
            free,
            index: SlotIndex::new(capacity, "sessions")?,
            by_age: SlotList::new(capacity, "sessions")?,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.by_age.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn get(&self, key: SessionKey, bucket_hash: u64) -> Option<PageRef> {
        self.find(key, bucket_hash).map(|slot| self.slots[slot as usize].tail)
    }

    /// Sets the tail of `key`, which becomes the newest session.
    pub(crate) fn put(&mut self, key: SessionKey, bucket_hash: u64, tail: PageRef) {
        if self.capacity() == 0 {
            return;
        }
        if let Some(slot) = self.find(key, bucket_hash) {
            self.drop_slot(slot);
        } else if self.free.is_empty()
            && let Some(oldest) = self.by_age.oldest()
        {
            self.drop_slot(oldest);
        }
        let Some(slot) = self.free.pop() else { unreachable!("a session was dropped to make room") };
        self.slots[slot as usize] = Session { key, bucket_hash, tail };
        self.index.insert(bucket_hash, slot);
        self.by_age.push_newest(slot);
    }

    /// Drops the sessions whose tail does not satisfy `keep`. Looks at every slot.
    pub(crate) fn retain(&mut self, keep: impl Fn(PageRef) -> bool) {
        for slot in 0..self.slots.len() as u32 {
            if self.by_age.contains(slot) && !keep(self.slots[slot as usize].tail) {
                self.drop_slot(slot);
            }
        }
    }

    fn find(&self, key: SessionKey, bucket_hash: u64) -> Option<u32> {
        self.index.candidates(bucket_hash).find(|&slot| self.slots[slot as usize].key == key)
    }

    fn drop_slot(&mut self, slot: u32) {
        self.index.remove(self.slots[slot as usize].bucket_hash, slot);
        self.by_age.remove(slot);
        self.free.push(slot);
    }

    /// Panics if the table contradicts itself.
    pub(crate) fn check_invariants(&self) {
        assert_eq!(self.len() + self.free.len(), self.capacity(), "a session slot is lost");
        assert_eq!(self.by_age.iter().count(), self.len());
        for slot in self.by_age.iter() {
            let session = &self.slots[slot as usize];
            assert_eq!(self.find(session.key, session.bucket_hash), Some(slot), "a session cannot be found");
        }
        assert!(self.free.iter().all(|&slot| !self.by_age.contains(slot)), "a free session slot is in use");
    }
}

#[cfg(test)]
mod tests {
    use super::{PageId, PageRef, SessionKey, SessionTable};

    fn tail(page: u32) -> PageRef {
        PageRef { page: PageId(page), generation: 0 }
    }

    #[test]
    fn the_oldest_session_makes_room() {
        let mut table = SessionTable::new(2).unwrap();
        // One bucket for all, so that chains are walked too.
        for (key, page) in [(1, 10), (2, 20), (1, 11), (3, 30)] {
            table.put(SessionKey(key), 0, tail(page));
            table.check_invariants();
        }
        let pages = [1, 2, 3].map(|key| table.get(SessionKey(key), 0).map(|tail| tail.page.0));
        assert_eq!(pages, [Some(11), None, Some(30)]);
        table.retain(|tail| tail.page == PageId(30));
        table.check_invariants();
        assert_eq!((table.len(), table.get(SessionKey(1), 0)), (1, None));
    }

    #[test]
    fn no_capacity_remembers_nobody() {
        let mut table = SessionTable::new(0).unwrap();
        table.put(SessionKey(1), 0, tail(1));
        assert_eq!((table.len(), table.get(SessionKey(1), 0)), (0, None));
    }
}
