//! Symbol paths of all items while a catalog is built, and their lexicographic order.
//!
//! Sorting compares packed keys: as many leading levels as fit into 64 bits, each with just the
//! bits its range of symbols needs. Eight levels of 2048 codes put five into the key, which
//! separates nearly all of 20 million paths without touching the paths themselves.

use crate::{ItemIndex, narrow};

/// The symbol path of every item, `depth` symbols each, in catalog order.
#[derive(Debug, Default)]
pub(crate) struct SymbolPaths {
    depth: usize,
    symbols: Vec<u32>,
}

impl SymbolPaths {
    /// Adds the path of the next item; all paths have the same, positive length.
    pub(crate) fn push(&mut self, path: &[u32]) {
        assert!(!path.is_empty() && (self.symbols.is_empty() || path.len() == self.depth));
        self.depth = path.len();
        self.symbols.extend_from_slice(path);
    }

    /// Number of levels; 0 when there are no paths.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    pub(crate) fn path(&self, item: ItemIndex) -> &[u32] {
        let start = item.0 as usize * self.depth;
        &self.symbols[start..start + self.depth]
    }

    /// Items by path; items with the same path in catalog order.
    pub(crate) fn sorted_items(&self) -> Vec<ItemIndex> {
        if self.symbols.is_empty() {
            return Vec::new();
        }
        let packing = Packing::new(self);
        let mut keyed: Vec<(u64, ItemIndex)> = self
            .symbols
            .chunks_exact(self.depth)
            .enumerate()
            .map(|(item, path)| (packing.key(path), ItemIndex(narrow(item))))
            .collect();
        let packed_levels = packing.levels.len();
        keyed.sort_unstable_by(|&(a_key, a), &(b_key, b)| {
            a_key
                .cmp(&b_key)
                .then_with(|| self.path(a)[packed_levels..].cmp(&self.path(b)[packed_levels..]))
                .then(a.cmp(&b))
        });
        let mut items: Vec<ItemIndex> = keyed.into_iter().map(|(_, item)| item).collect();
        items.shrink_to_fit();
        items
    }
}

/// How the leading levels of a path are packed into one integer that sorts like them.
struct Packing {
    /// Per level: (smallest symbol, bits that hold every symbol's distance from it).
    levels: Vec<(u32, u32)>,
}

impl Packing {
    fn new(paths: &SymbolPaths) -> Self {
        let mut ranges = vec![(u32::MAX, 0); paths.depth];
        for path in paths.symbols.chunks_exact(paths.depth) {
            for ((smallest, largest), &symbol) in ranges.iter_mut().zip(path) {
                *smallest = symbol.min(*smallest);
                *largest = symbol.max(*largest);
            }
        }
        let mut free = u64::BITS;
        let mut levels = Vec::new();
        for (smallest, largest) in ranges {
            let bits = u32::BITS - (largest - smallest).leading_zeros();
            let Some(rest) = free.checked_sub(bits) else { break };
            free = rest;
            levels.push((smallest, bits));
        }
        Self { levels }
    }

    fn key(&self, path: &[u32]) -> u64 {
        // A shift by 64 cannot happen: a level has at most 32 bits.
        self.levels
            .iter()
            .zip(path)
            .fold(0, |key, (&(smallest, bits), &symbol)| key << bits | u64::from(symbol - smallest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sorts_like_the_paths_themselves(
            depth in 1_usize..6,
            // Wide symbols force paths that do not fit into the key; narrow ones force equal paths.
            limit in prop_oneof![Just(1_u32), Just(3), Just(1 << 20), Just(u32::MAX)],
            numbers in proptest::collection::vec(any::<u32>(), 0..200),
        ) {
            let mut paths = SymbolPaths::default();
            let mut expected: Vec<(Vec<u32>, ItemIndex)> = Vec::new();
            for (item, path) in numbers.chunks_exact(depth).enumerate() {
                let path: Vec<u32> = path.iter().map(|n| n % limit).collect();
                paths.push(&path);
                expected.push((path, ItemIndex(item as u32)));
            }
            expected.sort();
            let expected: Vec<ItemIndex> = expected.into_iter().map(|(_, item)| item).collect();
            prop_assert_eq!(paths.sorted_items(), expected);
        }
    }
}
