//! Slots: random operations, and the order in which slots are reused.

use std::collections::HashSet;

use super::*;
use crate::disk::{entry::Entry, slots::Slots};

/// The SplitMix64 random number generator.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

#[test]
fn slots_are_never_used_twice_and_the_oldest_use_goes_first() {
    let mut random = Random(7);
    for round in 0..200 {
        let mut slots = Slots::new(6, Some(50), Vec::new()).unwrap();
        let (mut writing, mut reading, mut erasing) = (Vec::new(), Vec::new(), Vec::new());
        let mut now = 0;
        for _ in 0..300 {
            now += random.below(3);
            let number = random.below(12) as u32;
            let name = if number.is_multiple_of(2) { "a" } else { "b" };
            match random.below(8) {
                0 | 1 => {
                    if !writing.iter().any(|(_, other)| *other == number)
                        && let Some((slot, _)) = slots.begin_write(key(number), ns(name), now)
                    {
                        assert!(!writing.iter().any(|(other, _)| *other == slot));
                        assert!(!reading.contains(&slot) && !erasing.contains(&slot), "round {round}");
                        writing.push((slot, number));
                    }
                }
                2 | 3 if !writing.is_empty() => {
                    let (slot, _) = writing.swap_remove(random.below(writing.len() as u64) as usize);
                    slots.end_write(slot, random.below(10) > 0);
                }
                4 => {
                    if let Some(slot) = slots.find(&key(number), now) {
                        slots.begin_read(slot);
                        reading.push(slot);
                    }
                }
                5 if !reading.is_empty() => {
                    let slot = reading.swap_remove(random.below(reading.len() as u64) as usize);
                    slots.end_read(slot, random.below(5) > 0);
                }
                6 => {
                    erasing.extend(std::iter::from_fn(|| slots.next_to_erase()));
                    if random.below(2) == 0 {
                        erasing.drain(..).for_each(|slot| slots.erased(slot));
                    }
                }
                _ => match random.below(20) {
                    0 => slots.retain(&|other| *other == ns("a")),
                    1 => slots.expire(now),
                    _ => slots.touch(&key(number)),
                },
            }
            slots.check_invariants();
        }
    }
    // With nothing else going on, the order is exact.
    let mut slots = Slots::new(3, None, Vec::new()).unwrap();
    let write = |slots: &mut Slots, number| {
        let (slot, _) = slots.begin_write(key(number), ns("a"), 0).unwrap();
        slots.end_write(slot, true);
    };
    (0..3).for_each(|number| write(&mut slots, number));
    slots.touch(&key(0));
    write(&mut slots, 3);
    let found: Vec<bool> = (0..4).map(|number| slots.find(&key(number), 0).is_some()).collect();
    assert_eq!(found, [true, false, true, true]);
}

#[test]
fn of_two_entries_of_one_page_the_newer_counts() {
    let entry = |turn| Entry { turn, written_at: 0, ns: ns("a"), key: key(1), words: 4, data: [0; 32] };
    let mut slots = Slots::new(4, None, vec![(2, entry(7)), (0, entry(9)), (3, entry(8))]).unwrap();
    slots.check_invariants();
    assert_eq!(slots.find(&key(1), 0), Some(0));
    assert_eq!(std::iter::from_fn(|| slots.next_to_erase()).collect::<HashSet<_>>(), HashSet::from([2, 3]));
    assert_eq!(slots.begin_write(key(2), ns("a"), 0), Some((1, 10)), "turns go on");
}
