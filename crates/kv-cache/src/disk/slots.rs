//! Which slot holds what, and which goes next: a pure state machine.
//!
//! ```text
//!           begin_write          end_write             begin_read
//!   Free ───────────────► Writing ────────► Ready ◄──────────────► Ready, read by some
//!    ▲                       │                │ forgotten, damaged, too old
//!    └────── erased ─── Erasing ◄─────────────┘ once no reader is left
//! ```
//!
//! Invariants:
//!
//! - A slot that is being read or written is not given away, so a page that fails its checksum was
//!   damaged.
//! - A forgotten page is erased, and is not found after a restart.
//! - The slot used longest ago goes first. After a restart, the one written longest ago does.

use crate::{
    config::ConfigError, disk::entry::Entry, host::HostKey, index::SlotIndex, list::SlotList,
    namespace::Namespace,
};

/// How many slots one call of [`Slots::expire`] checks for their age.
const AGED: u32 = 256;

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum State {
    Free,
    /// The page counts once it is written, unless `wanted` was cleared because it was forgotten.
    Writing {
        wanted: bool,
    },
    /// The page can be found by its key.
    Ready {
        reads: u32,
    },
    /// The page can no longer be found; the slot is erased when its last reader is done.
    Doomed {
        reads: u32,
    },
    Erasing,
}

#[derive(Clone, Debug)]
struct Slot {
    state: State,
    key: HostKey,
    ns: Namespace,
    written_at: u64,
}

/// The slots of one pool.
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Ready slots, by the key of their page.
    index: SlotIndex,
    /// Ready slots without readers, oldest use first.
    order: SlotList,
    free: Vec<u32>,
    /// Slots that are still to be erased.
    to_erase: Vec<u32>,
    ready: usize,
    time_to_live: Option<u64>,
    /// Number of the last write.
    turn: u64,
    /// The slot at which the search for old pages continues.
    hand: u32,
    pub(crate) evictions: u64,
    pub(crate) expirations: u64,
}

impl Slots {
    /// Bytes of memory that the tables of `slots` slots take.
    pub(crate) fn bytes_of(slots: u32) -> usize {
        let slots = slots as usize;
        // Free list and the two arrays of the order; chains and buckets of the index.
        let tables = size_of::<Slot>() + 3 * size_of::<u32>() + size_of::<u32>();
        slots * tables + slots.next_power_of_two() * 2 * size_of::<u32>()
    }

    /// Builds the table from what the entries say. Where two entries name the same page, the newer
    /// wins.
    ///
    /// # Errors
    ///
    /// When the tables do not fit in memory.
    pub(crate) fn new(
        slots: u32,
        time_to_live: Option<u64>,
        mut entries: Vec<(u32, Entry)>,
    ) -> Result<Self, ConfigError> {
        let vacant = Slot {
            state: State::Free,
            key: HostKey([0; 32]),
            ns: Namespace::from_bytes([0; 32]),
            written_at: 0,
        };
        let mut all = Self {
            slots: crate::config::table(slots as usize, vacant, "slots of the disk")?,
            index: SlotIndex::new(slots, "slots of the disk")?,
            order: SlotList::new(slots, "slots of the disk")?,
            free: Vec::new(),
            to_erase: Vec::new(),
            ready: 0,
            time_to_live,
            turn: entries.iter().map(|(_, entry)| entry.turn).max().unwrap_or(0),
            hand: 0,
            evictions: 0,
            expirations: 0,
        };
        entries.sort_unstable_by_key(|(slot, entry)| (entry.turn, *slot));
        for (slot, entry) in entries {
            if let Some(older) = all.position(&entry.key) {
                all.doom(older);
            }
            let Entry { ns, key, written_at, .. } = entry;
            all.slots[slot as usize] = Slot { state: State::Writing { wanted: true }, key, ns, written_at };
            all.make_ready(slot);
        }
        let is_free = |slot: &u32| all.slots[*slot as usize].state == State::Free;
        // The last free slot is taken first, so the files grow from their beginning.
        all.free = (0..slots).rev().filter(is_free).collect();
        Ok(all)
    }

    /// How many slots there are, and how many of them hold pages.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.slots.len(), self.ready)
    }

    /// Finds the slot that holds the page of this key. A page that is too old is forgotten, not
    /// found.
    pub(crate) fn find(&mut self, key: &HostKey, now: u64) -> Option<u32> {
        let slot = self.position(key)?;
        if self.is_old(slot, now) {
            self.expirations += 1;
            self.doom(slot);
            return None;
        }
        Some(slot)
    }

    /// Whether more than half of the slot's time to live is over, so that it should be written
    /// anew.
    pub(crate) fn is_ageing(&self, slot: u32, now: u64) -> bool {
        let age = now.saturating_sub(self.slots[slot as usize].written_at);
        self.time_to_live.is_some_and(|most| age > most / 2)
    }

    /// Takes a slot for a page that no slot holds: a free one, or the one used longest ago. Returns
    /// the slot and the number of the write, or `None` when all slots are in use.
    pub(crate) fn begin_write(&mut self, key: HostKey, ns: Namespace, now: u64) -> Option<(u32, u64)> {
        if let Some(slot) = self.position(&key) {
            // The page is written anew: the old copy must not come back.
            self.doom(slot);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.order.oldest()?;
                self.take_out(slot);
                self.evictions += 1;
                slot
            }
        };
        self.turn += 1;
        self.slots[slot as usize] = Slot { state: State::Writing { wanted: true }, key, ns, written_at: now };
        Some((slot, self.turn))
    }

    /// Ends a write. Without `written`, the contents of the slot are unknown and it is erased.
    pub(crate) fn end_write(&mut self, slot: u32, written: bool) {
        let State::Writing { wanted } = self.slots[slot as usize].state else {
            panic!("slot {slot} is not being written")
        };
        if written && wanted {
            self.make_ready(slot);
        } else {
            self.slots[slot as usize].state = State::Erasing;
            self.to_erase.push(slot);
        }
    }

    /// Protects a slot that [`Slots::find`] found until [`Slots::end_read`].
    pub(crate) fn begin_read(&mut self, slot: u32) {
        let State::Ready { reads } = &mut self.slots[slot as usize].state else {
            panic!("slot {slot} holds nothing to read")
        };
        *reads += 1;
        if *reads == 1 {
            self.order.remove(slot);
        }
    }

    /// Ends a read. A slot that is not `intact` is erased. Returns whether the page may be used.
    pub(crate) fn end_read(&mut self, slot: u32, intact: bool) -> bool {
        match self.slots[slot as usize].state {
            State::Ready { reads } => {
                self.slots[slot as usize].state = State::Ready { reads: reads - 1 };
                if reads == 1 {
                    self.order.push_newest(slot);
                }
                if !intact {
                    self.doom(slot);
                }
                intact
            }
            State::Doomed { reads: 1 } => {
                self.slots[slot as usize].state = State::Erasing;
                self.to_erase.push(slot);
                false
            }
            State::Doomed { reads } => {
                self.slots[slot as usize].state = State::Doomed { reads: reads - 1 };
                false
            }
            State::Free | State::Writing { .. } | State::Erasing => panic!("slot {slot} is not being read"),
        }
    }

    /// Marks the page as the one used last.
    pub(crate) fn touch(&mut self, key: &HostKey) {
        if let Some(slot) = self.position(key)
            && self.order.contains(slot)
        {
            self.order.remove(slot);
            self.order.push_newest(slot);
        }
    }

    /// Forgets the pages whose namespace does not satisfy `keep`.
    pub(crate) fn retain(&mut self, keep: &dyn Fn(&Namespace) -> bool) {
        for slot in 0..self.slots.len() as u32 {
            let Slot { state, ns, .. } = &mut self.slots[slot as usize];
            match state {
                State::Writing { wanted } => *wanted &= keep(ns),
                State::Ready { .. } if !keep(ns) => self.doom(slot),
                State::Free | State::Ready { .. } | State::Doomed { .. } | State::Erasing => {}
            }
        }
    }

    /// Forgets those pages that are too old among the next few slots.
    pub(crate) fn expire(&mut self, now: u64) {
        if self.time_to_live.is_none() {
            return;
        }
        for _ in 0..AGED.min(self.slots.len() as u32) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.slots.len() as u32;
            if matches!(self.slots[slot as usize].state, State::Ready { .. }) && self.is_old(slot, now) {
                self.expirations += 1;
                self.doom(slot);
            }
        }
    }

    /// The next slot to erase. It is not used again before [`Slots::erased`].
    pub(crate) fn next_to_erase(&mut self) -> Option<u32> {
        self.to_erase.pop()
    }

    /// Marks a slot as erased and free.
    pub(crate) fn erased(&mut self, slot: u32) {
        assert_eq!(self.slots[slot as usize].state, State::Erasing, "slot {slot} is not being erased");
        self.slots[slot as usize].state = State::Free;
        self.free.push(slot);
    }

    fn position(&self, key: &HostKey) -> Option<u32> {
        self.index.candidates(bucket(key)).find(|&slot| self.slots[slot as usize].key == *key)
    }

    fn is_old(&self, slot: u32, now: u64) -> bool {
        let age = now.saturating_sub(self.slots[slot as usize].written_at);
        self.time_to_live.is_some_and(|most| age >= most)
    }

    fn make_ready(&mut self, slot: u32) {
        let Slot { state, key, .. } = &mut self.slots[slot as usize];
        *state = State::Ready { reads: 0 };
        self.index.insert(bucket(key), slot);
        self.order.push_newest(slot);
        self.ready += 1;
    }

    /// Removes a ready slot without readers from every table.
    fn take_out(&mut self, slot: u32) {
        self.order.remove(slot);
        self.index.remove(bucket(&self.slots[slot as usize].key), slot);
        self.ready -= 1;
    }

    /// Makes the page of a ready slot unfindable, and has the slot erased once it has no readers.
    fn doom(&mut self, slot: u32) {
        let State::Ready { reads } = self.slots[slot as usize].state else {
            panic!("slot {slot} holds nothing to forget")
        };
        self.index.remove(bucket(&self.slots[slot as usize].key), slot);
        self.ready -= 1;
        self.slots[slot as usize].state = match reads {
            0 => {
                self.order.remove(slot);
                self.to_erase.push(slot);
                State::Erasing
            }
            reads => State::Doomed { reads },
        };
    }

    /// Panics if the tables contradict each other.
    #[cfg(test)]
    pub(crate) fn check_invariants(&self) {
        let mut ready = 0;
        for (slot, Slot { state, key, .. }) in (0..).zip(&self.slots) {
            let found = self.index.candidates(bucket(key)).any(|other| other == slot);
            assert_eq!(found, matches!(state, State::Ready { .. }), "slot {slot}: {state:?}");
            assert_eq!(self.order.contains(slot), *state == State::Ready { reads: 0 });
            assert_eq!(self.free.contains(&slot), *state == State::Free);
            ready += usize::from(found);
            if found {
                assert_eq!(self.position(key), Some(slot), "two slots hold one page");
            }
        }
        assert_eq!(ready, self.ready);
    }
}

/// Keys are pseudo-random, so any eight bytes do.
fn bucket(key: &HostKey) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = key.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
