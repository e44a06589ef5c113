//! Which slot holds what, and which goes next: a pure state machine.
//!
//! ```text
//!           begin_write          end_write             begin_read
//!   Free ───────────────► Writing ────────► Ready ◄──────────────► Ready, read by some
//!    ▲                       │                │ forgotten, damaged, too old
//!    └────── erased ─── Erasing ◄─────────────┘ once nobody reads it
//! ```
//!
//! Invariants:
//!
//! - A slot that is read or written is not given to anybody else, so a page that fails its checksum was damaged.
//! - What was forgotten is erased: nobody finds it after a restart.
//! - The slot used longest ago goes first. After a restart, the one written longest ago does.

use crate::{
    config::ConfigError, disk::entry::Entry, host::HostKey, index::SlotIndex, list::SlotList,
    namespace::Namespace,
};

/// How many slots are looked at for their age at a time.
const AGED: u32 = 256;

#[derive(Copy, Clone, Debug, Eq, PartialEq)]
enum State {
    Free,
    /// `wanted` until it is forgotten.
    Writing {
        wanted: bool,
    },
    /// Found by its key.
    Ready {
        reads: u32,
    },
    /// Found no more; to be erased when nobody reads it.
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
    /// Ready slots by their key.
    index: SlotIndex,
    /// Ready slots that nobody reads, oldest use first.
    order: SlotList,
    free: Vec<u32>,
    /// Slots that are to be erased.
    to_erase: Vec<u32>,
    ready: usize,
    time_to_live: Option<u64>,
    /// Of the write before.
    turn: u64,
    /// Where the search for old pages goes on.
    hand: u32,
    pub(crate) evictions: u64,
    pub(crate) expirations: u64,
}

impl Slots {
    /// Bytes that the tables of so many slots take.
    pub(crate) fn bytes_of(slots: u32) -> usize {
        let slots = slots as usize;
        // Free list and the two arrays of the order; chains and buckets of the index.
        let tables = size_of::<Slot>() + 3 * size_of::<u32>() + size_of::<u32>();
        slots * tables + slots.next_power_of_two() * 2 * size_of::<u32>()
    }

    /// Slots that hold what their entries say. Of two that say the same, the newer one does.
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
        // The last one is taken first, so the files grow from their beginning.
        all.free = (0..slots).rev().filter(is_free).collect();
        Ok(all)
    }

    /// How many slots there are, and how many of them hold pages.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.slots.len(), self.ready)
    }

    /// The slot that holds the page of this key. One that is too old holds it no more.
    pub(crate) fn find(&mut self, key: &HostKey, now: u64) -> Option<u32> {
        let slot = self.position(key)?;
        if self.is_old(slot, now) {
            self.expirations += 1;
            self.doom(slot);
            return None;
        }
        Some(slot)
    }

    /// Whether so much of the time of a ready slot is over that it should be written anew.
    pub(crate) fn is_ageing(&self, slot: u32, now: u64) -> bool {
        let age = now.saturating_sub(self.slots[slot as usize].written_at);
        self.time_to_live.is_some_and(|most| age > most / 2)
    }

    /// A slot for a page that no slot holds, and its turn: a free one, or the one used longest ago. None when all are
    /// in use.
    pub(crate) fn begin_write(&mut self, key: HostKey, ns: Namespace, now: u64) -> Option<(u32, u64)> {
        if let Some(slot) = self.position(&key) {
            // It is written anew: the old page must not come back.
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

    /// The page is in its slot, or it is not known what is.
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

    /// Keeps a slot that [`Slots::find`] found as it is until it was read.
    pub(crate) fn begin_read(&mut self, slot: u32) {
        let State::Ready { reads } = &mut self.slots[slot as usize].state else {
            panic!("slot {slot} holds nothing to read")
        };
        *reads += 1;
        if *reads == 1 {
            self.order.remove(slot);
        }
    }

    /// The slot was read, and holds what it should, or not. Returns whether the page may be used.
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

    /// The page was used: it is the newest.
    pub(crate) fn touch(&mut self, key: &HostKey) {
        if let Some(slot) = self.position(key)
            && self.order.contains(slot)
        {
            self.order.remove(slot);
            self.order.push_newest(slot);
        }
    }

    /// Forgets the pages of namespaces that do not satisfy `keep`.
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

    /// Forgets some of the pages that are too old.
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

    /// A slot that is to be erased. It is given to nobody before [`Slots::erased`].
    pub(crate) fn next_to_erase(&mut self) -> Option<u32> {
        self.to_erase.pop()
    }

    /// The slot is empty.
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

    /// Takes a ready slot that nobody reads out of every table.
    fn take_out(&mut self, slot: u32) {
        self.order.remove(slot);
        self.index.remove(bucket(&self.slots[slot as usize].key), slot);
        self.ready -= 1;
    }

    /// What a ready slot holds is to be found by nobody any more.
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

    /// Panics where the tables contradict each other.
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
