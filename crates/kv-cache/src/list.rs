//! A list over slots `0..capacity`, for recency: O(1) push, remove and oldest, and no allocation after `new`.
//!
//! The links are two plain arrays, circular through one extra slot. A slot that links to itself is
//! in no list. It knows numbers only: pages and sessions both keep their recency in one of these.

use crate::config::{ConfigError, table};

/// Slots from the oldest to the newest, each at most once.
pub(crate) struct SlotList {
    older: Vec<u32>,
    newer: Vec<u32>,
    len: usize,
}

impl SlotList {
    pub(crate) fn new(capacity: u32, name: &'static str) -> Result<Self, ConfigError> {
        let mut older = table(capacity as usize + 1, 0, name)?;
        for (slot, link) in (0..).zip(&mut older) {
            *link = slot;
        }
        let mut newer = table(capacity as usize + 1, 0, name)?;
        newer.copy_from_slice(&older);
        Ok(Self { older, newer, len: 0 })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, slot: u32) -> bool {
        debug_assert!(slot != self.ends());
        self.newer[slot as usize] != slot
    }

    /// The slot that was pushed longest ago.
    pub(crate) fn oldest(&self) -> Option<u32> {
        let oldest = self.newer[self.ends() as usize];
        (oldest != self.ends()).then_some(oldest)
    }

    pub(crate) fn push_newest(&mut self, slot: u32) {
        assert!(!self.contains(slot), "slot {slot} is already in the list");
        let ends = self.ends();
        let before = self.older[ends as usize];
        self.link(before, slot);
        self.link(slot, ends);
        self.len += 1;
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        assert!(self.contains(slot), "slot {slot} is not in the list");
        self.link(self.older[slot as usize], self.newer[slot as usize]);
        self.link(slot, slot);
        self.len -= 1;
    }

    /// Every slot, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.oldest(), |&slot| {
            let next = self.newer[slot as usize];
            (next != self.ends()).then_some(next)
        })
    }

    /// The extra slot: newer than the newest and older than the oldest.
    fn ends(&self) -> u32 {
        (self.newer.len() - 1) as u32
    }

    fn link(&mut self, older: u32, newer: u32) {
        self.newer[older as usize] = newer;
        self.older[newer as usize] = older;
    }
}

#[cfg(test)]
mod tests {
    use super::SlotList;

    #[test]
    fn keeps_the_order_of_pushes() {
        let mut list = SlotList::new(4, "list").unwrap();
        assert_eq!(list.oldest(), None);
        for slot in [2, 0, 3] {
            list.push_newest(slot);
        }
        list.remove(0);
        list.push_newest(0);
        assert_eq!(list.iter().collect::<Vec<_>>(), [2, 3, 0]);
        assert_eq!((list.len(), list.oldest()), (3, Some(2)));
        assert!(list.contains(3) && !list.contains(1));
        for slot in [3, 2, 0] {
            list.remove(slot);
        }
        assert_eq!((list.len(), list.oldest(), list.iter().count()), (0, None, 0));
    }

    #[test]
    fn a_list_without_slots_is_empty() {
        assert_eq!(SlotList::new(0, "list").unwrap().oldest(), None);
    }
}
