//! A set of positions (leaves or items) that answers questions about intervals in the cheapest
//! form.
//!
//! A request usually excludes a few hundred items of millions, or names a few. Such sets are short
//! sorted lists, made without any work per leaf; larger ones are bit vectors. Bit vectors are
//! shared, so a request that adds its exclusions to a common tag filter copies nothing.

use std::ops::Range;
use std::sync::Arc;

use crate::narrow;
use crate::rank_bits::{BitsBuilder, RankBits};

/// An immutable subset of `0..universe`.
#[derive(Clone, Debug)]
pub(crate) struct IndexSet {
    base: Base,
    /// Positions of `base` that are not in the set: sorted, without repetitions.
    removed: Vec<u32>,
    universe: u32,
}

/// The raw arrays of a set, for the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetArrays<'a> {
    /// All positions except the removed ones.
    All {
        /// Positions that are not in the set: sorted, without repetitions.
        removed: &'a [u32],
    },
    /// The positions whose bit is set, except the removed ones.
    Bits {
        /// Words of 64 bits; bits past the last position are zero.
        words: &'a [u64],
        /// Number of set bits before each block of 512 bits, then the number of all set bits.
        ranks: &'a [u32],
        /// Positions whose bit is set and that are not in the set: sorted, without repetitions.
        removed: &'a [u32],
    },
    /// Exactly the listed positions.
    Listed {
        /// The positions of the set: sorted, without repetitions.
        list: &'a [u32],
    },
}

#[derive(Clone, Debug)]
enum Base {
    All,
    /// The positions of the set: sorted, without repetitions.
    Listed(Vec<u32>),
    Bits(Arc<RankBits>),
}

impl IndexSet {
    pub(crate) fn all(universe: u32) -> Self {
        Self { base: Base::All, removed: Vec::new(), universe }
    }

    pub(crate) fn empty(universe: u32) -> Self {
        Self { base: Base::Listed(Vec::new()), removed: Vec::new(), universe }
    }

    pub(crate) fn bits(bits: Arc<RankBits>) -> Self {
        Self { universe: bits.len(), base: Base::Bits(bits), removed: Vec::new() }
    }

    /// The positions in `list`, which is sorted and without repetitions.
    pub(crate) fn listed(list: Vec<u32>, universe: u32) -> Self {
        if !is_long(&list, universe) {
            return Self { base: Base::Listed(list), removed: Vec::new(), universe };
        }
        let mut bits = BitsBuilder::zeros(universe);
        list.iter().for_each(|&i| bits.set(i));
        Self::bits(Arc::new(bits.finish()))
    }

    /// Takes `removed` out of this set, which must have no removals yet. `removed` is sorted,
    /// without repetitions, and a subset of this set.
    pub(crate) fn without(mut self, removed: Vec<u32>) -> Self {
        debug_assert!(self.removed.is_empty() && removed.iter().all(|&i| self.contains(i)));
        let long = is_long(&removed, self.universe);
        match &mut self.base {
            Base::Listed(list) => list.retain(|i| removed.binary_search(i).is_err()),
            Base::All if long => {
                let mut bits = BitsBuilder::ones(self.universe);
                removed.iter().for_each(|&i| bits.clear(i));
                self.base = Base::Bits(Arc::new(bits.finish()));
            }
            Base::Bits(bits) if long => self.base = Base::Bits(Arc::new(bits.without(&removed))),
            Base::All | Base::Bits(_) => self.removed = removed,
        }
        self
    }

    /// The raw arrays that hold the set.
    pub(crate) fn arrays(&self) -> SetArrays<'_> {
        match &self.base {
            Base::All => SetArrays::All { removed: &self.removed },
            Base::Listed(list) => SetArrays::Listed { list },
            Base::Bits(bits) => {
                SetArrays::Bits { words: bits.words(), ranks: bits.ranks(), removed: &self.removed }
            }
        }
    }

    /// Whether the set is known, without counting, to hold every position.
    pub(crate) fn is_all(&self) -> bool {
        matches!(self.base, Base::All) && self.removed.is_empty()
    }

    pub(crate) fn contains(&self, i: u32) -> bool {
        let in_base = match &self.base {
            Base::All => i < self.universe,
            Base::Listed(list) => list.binary_search(&i).is_ok(),
            Base::Bits(bits) => i < self.universe && bits.contains(i),
        };
        in_base && self.removed.binary_search(&i).is_err()
    }

    /// Whether the set holds any position of `range`. Costs a word or two ranks, and two binary
    /// searches for a list.
    #[inline]
    pub(crate) fn any(&self, range: Range<u32>) -> bool {
        let range = range.start..range.end.min(self.universe);
        if range.is_empty() {
            return false;
        }
        match &self.base {
            Base::Listed(list) => {
                list.get(list.partition_point(|&i| i < range.start)).is_some_and(|&i| i < range.end)
            }
            // With more positions than removals there is no need to look for them.
            Base::All => range.len() > self.removed.len() || narrow(range.len()) > self.removed_in(&range),
            // Usually the bits say no, or nothing was removed here. Only otherwise must both be
            // counted.
            Base::Bits(bits) => {
                bits.any(range.clone())
                    && match self.removed_in(&range) {
                        0 => true,
                        removed => bits.count(range) > removed,
                    }
            }
        }
    }

    /// How many positions of `range` are in the set.
    pub(crate) fn count(&self, range: Range<u32>) -> u32 {
        let range = range.start..range.end.min(self.universe);
        if range.is_empty() {
            return 0;
        }
        match &self.base {
            Base::All => narrow(range.len()) - self.removed_in(&range),
            Base::Listed(list) => count_in(list, &range),
            Base::Bits(bits) => bits.count(range.clone()) - self.removed_in(&range),
        }
    }

    /// How many positions are in the set.
    pub(crate) fn len(&self) -> u32 {
        let base = match &self.base {
            Base::All => self.universe,
            Base::Listed(list) => narrow(list.len()),
            Base::Bits(bits) => bits.ones(),
        };
        base - narrow(self.removed.len())
    }

    fn removed_in(&self, range: &Range<u32>) -> u32 {
        count_in(&self.removed, range)
    }
}

/// Whether a bit vector would be smaller than the list.
fn is_long(list: &[u32], universe: u32) -> bool {
    list.len() > universe as usize / u32::BITS as usize
}

fn count_in(sorted: &[u32], range: &Range<u32>) -> u32 {
    let from_start = &sorted[sorted.partition_point(|&i| i < range.start)..];
    match from_start.first() {
        // Lists are short and ranges narrow, so mostly there is nothing to count.
        Some(&first) if first < range.end => narrow(from_start.partition_point(|&i| i < range.end)),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn agrees(set: &IndexSet, expected: &BTreeSet<u32>, universe: u32) {
        assert_eq!(set.len() as usize, expected.len());
        for start in 0..=universe {
            assert_eq!(set.contains(start), expected.contains(&start));
            for end in start..=universe + 1 {
                let count = expected.range(start..end).count();
                assert_eq!((set.count(start..end) as usize, set.any(start..end)), (count, count > 0));
            }
        }
    }

    proptest! {
        #[test]
        fn every_form_agrees_with_a_set(
            universe in 1_u32..120,
            kept in proptest::collection::vec(any::<u32>(), 0..40),
            removed in proptest::collection::vec(any::<u32>(), 0..12),
        ) {
            let kept: BTreeSet<u32> = kept.iter().map(|n| n % universe).collect();
            let everything: BTreeSet<u32> = (0..universe).collect();
            let mut bits = BitsBuilder::zeros(universe);
            kept.iter().for_each(|&i| bits.set(i));
            let bases = [
                (IndexSet::all(universe), &everything),
                (IndexSet::empty(universe), &BTreeSet::new()),
                (IndexSet::listed(kept.iter().copied().collect(), universe), &kept),
                (IndexSet::bits(Arc::new(bits.finish())), &kept),
            ];
            for (base, expected) in bases {
                agrees(&base, expected, universe);
                let removed: BTreeSet<u32> =
                    removed.iter().map(|n| n % universe).filter(|i| expected.contains(i)).collect();
                let rest: BTreeSet<u32> = expected.difference(&removed).copied().collect();
                agrees(&base.without(removed.into_iter().collect()), &rest, universe);
            }
        }
    }

    #[test]
    fn short_lists_stay_lists() {
        let some = IndexSet::all(10_000).without(vec![3, 5000]);
        assert!(matches!(some.base, Base::All) && some.removed.len() == 2);
        let many = IndexSet::all(10_000).without((0..400).collect());
        assert!(matches!(many.base, Base::Bits(_)) && many.removed.is_empty());
        assert!(matches!(IndexSet::listed(vec![1, 2], 10_000).base, Base::Listed(_)));
        assert!(matches!(IndexSet::listed((0..400).collect(), 10_000).base, Base::Bits(_)));
    }
}
