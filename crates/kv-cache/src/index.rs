//! A hash index over slots `0..capacity`: from a hash to the slots filed under it.
//!
//! Buckets are chained, with the chain links in one array: an insertion or a removal touches one
//! bucket and nothing else. An open-addressing table (hashbrown) was rejected: its deletions leave
//! tombstones, so even a table within its capacity rehashes now and then. This one never allocates,
//! moves or rehashes.
//!
//! It compares nothing: the caller decides which of the candidates it meant.

use crate::config::{ConfigError, table};

/// End of a bucket's chain.
const NIL: u32 = u32::MAX;

/// From a hash to the slots filed under it.
pub(crate) struct SlotIndex {
    /// First slot of each bucket; the number of buckets is a power of two.
    heads: Vec<u32>,
    /// Next slot in the same bucket.
    next: Vec<u32>,
}

impl SlotIndex {
    pub(crate) fn new(capacity: u32, name: &'static str) -> Result<Self, ConfigError> {
        // At least two buckets per entry: a full table still has mostly chains of one.
        let buckets = (capacity as usize).next_power_of_two() * 2;
        Ok(Self { heads: table(buckets, NIL, name)?, next: table(capacity as usize, NIL, name)? })
    }

    /// Slots that may be filed under `hash`; includes other slots of the same bucket.
    pub(crate) fn candidates(&self, hash: u64) -> impl Iterator<Item = u32> + '_ {
        let in_bucket = |slot: u32| (slot != NIL).then_some(slot);
        std::iter::successors(in_bucket(self.heads[self.bucket(hash)]), move |&slot| {
            in_bucket(self.next[slot as usize])
        })
    }

    /// Files a slot that is not yet in the index.
    pub(crate) fn insert(&mut self, hash: u64, slot: u32) {
        let bucket = self.bucket(hash);
        self.next[slot as usize] = self.heads[bucket];
        self.heads[bucket] = slot;
    }

    /// Removes a slot filed under `hash`.
    pub(crate) fn remove(&mut self, hash: u64, slot: u32) {
        let bucket = self.bucket(hash);
        let after = self.next[slot as usize];
        if self.heads[bucket] == slot {
            self.heads[bucket] = after;
        } else {
            let Some(before) = self.candidates(hash).find(|&other| self.next[other as usize] == slot) else {
                panic!("slot {slot} is not filed under this hash");
            };
            self.next[before as usize] = after;
        }
        self.next[slot as usize] = NIL;
    }

    fn bucket(&self, hash: u64) -> usize {
        (hash & (self.heads.len() as u64 - 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::SlotIndex;

    fn sorted(index: &SlotIndex, hash: u64) -> Vec<u32> {
        let mut slots: Vec<u32> = index.candidates(hash).collect();
        slots.sort_unstable();
        slots
    }

    #[test]
    fn slots_with_equal_hashes_stay_apart() {
        let mut index = SlotIndex::new(8, "index").unwrap();
        for slot in [0, 3, 5] {
            index.insert(7, slot);
        }
        index.insert(6, 1);
        assert_eq!(sorted(&index, 7), [0, 3, 5]);
        index.remove(7, 3);
        assert_eq!(sorted(&index, 7), [0, 5]);
        index.remove(7, 5);
        index.remove(7, 0);
        assert_eq!((sorted(&index, 7), sorted(&index, 6)), (vec![], vec![1]));
    }

    #[test]
    #[should_panic(expected = "not filed")]
    fn removing_what_is_not_there_is_a_bug() {
        SlotIndex::new(4, "index").unwrap().remove(1, 2);
    }
}
