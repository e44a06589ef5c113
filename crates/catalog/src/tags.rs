//! Which item has which tags.
//!
//! Items share combinations of tags (in stock, a shop, a category), so a distinct combination is
//! stored once and an item refers to it. A tag requirement is then decided once per combination
//! instead of once per item.

use std::hash::BuildHasher;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::narrow;
use crate::strings::{Interned, Interner};

/// The tags of all items.
#[derive(Debug, Default)]
pub(crate) struct TagTable {
    names: Interner,
    combinations: Combinations,
    /// Combination of each item; empty if no item has a tag.
    combination_of: Vec<u32>,
}

/// Distinct sets of tags, each sorted. Number 0 is the empty set.
#[derive(Debug)]
struct Combinations {
    members: Vec<u32>,
    ends: Vec<u64>,
}

impl Default for Combinations {
    fn default() -> Self {
        Self { members: Vec::new(), ends: vec![0] }
    }
}

impl Combinations {
    fn get(&self, i: u32) -> &[u32] {
        let i = i as usize;
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.members[start..self.ends[i] as usize]
    }

    fn push(&mut self, tags: &[u32]) {
        self.members.extend_from_slice(tags);
        self.ends.push(self.members.len() as u64);
    }
}

impl TagTable {
    /// The number of a tag that some item has.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        self.names.find(name)
    }

    /// The names of all tags.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        (0..narrow(self.len())).map(|tag| self.names.strings().get(tag))
    }

    /// Number of distinct tags.
    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// The names of an item's tags.
    pub(crate) fn of_item(&self, item: u32) -> impl ExactSizeIterator<Item = &str> {
        let combination = self.combination_of.get(item as usize).copied().unwrap_or(0);
        self.combinations.get(combination).iter().map(|&tag| self.names.strings().get(tag))
    }

    /// Calls `keep` with every item that has all of `require` and none of `forbid`.
    pub(crate) fn for_each_match(
        &self,
        num_items: u32,
        require: &[u32],
        forbid: &[u32],
        mut keep: impl FnMut(u32),
    ) {
        let matches = |tags: &[u32]| {
            let has = |tag: &u32| tags.binary_search(tag).is_ok();
            require.iter().all(has) && !forbid.iter().any(has)
        };
        if self.combination_of.is_empty() {
            if matches(&[]) {
                (0..num_items).for_each(keep);
            }
            return;
        }
        let num_combinations = narrow(self.combinations.ends.len());
        let wanted: Vec<bool> = (0..num_combinations).map(|i| matches(self.combinations.get(i))).collect();
        for (item, &combination) in self.combination_of.iter().enumerate() {
            if wanted[combination as usize] {
                keep(narrow(item));
            }
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.names.strings().memory_bytes()
            + self.names.table_bytes()
            + self.combinations.members.capacity() * size_of::<u32>()
            + self.combinations.ends.capacity() * size_of::<u64>()
            + self.combination_of.capacity() * size_of::<u32>()
    }
}

/// Builds a [`TagTable`] item by item.
#[derive(Debug, Default)]
pub(crate) struct TagTableBuilder {
    table: TagTable,
    /// Finds combinations by their members.
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
    scratch: Vec<u32>,
}

impl TagTableBuilder {
    /// Adds the tags of the next item, without repetitions.
    pub(crate) fn push(&mut self, tags: &[&str]) {
        let combination = if tags.is_empty() { 0 } else { self.combination(tags) };
        self.table.combination_of.push(combination);
    }

    fn combination(&mut self, tags: &[&str]) -> u32 {
        let Self { table, numbers, hasher, scratch } = self;
        scratch.clear();
        scratch.extend(tags.iter().map(|tag| match table.names.intern(tag) {
            Interned::New(number) | Interned::Known(number) => number,
        }));
        scratch.sort_unstable();
        let combinations = &mut table.combinations;
        let hash = hasher.hash_one(&scratch[..]);
        let same = |&i: &u32| combinations.get(i) == &scratch[..];
        match numbers.entry(hash, same, |&i| hasher.hash_one(combinations.get(i))) {
            Entry::Occupied(entry) => *entry.get(),
            Entry::Vacant(entry) => {
                let number = narrow(combinations.ends.len());
                entry.insert(number);
                combinations.push(scratch);
                number
            }
        }
    }

    pub(crate) fn finish(self) -> TagTable {
        let mut table = self.table;
        if table.names.len() == 0 {
            table.combination_of = Vec::new();
        }
        table.names.shrink_to_fit();
        table.combinations.members.shrink_to_fit();
        table.combinations.ends.shrink_to_fit();
        table.combination_of.shrink_to_fit();
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching(table: &TagTable, num_items: u32, require: &[&str], forbid: &[&str]) -> Vec<u32> {
        let numbers = |names: &[&str]| names.iter().map(|name| table.find(name).unwrap()).collect::<Vec<_>>();
        let mut items = Vec::new();
        table.for_each_match(num_items, &numbers(require), &numbers(forbid), |item| items.push(item));
        items
    }

    #[test]
    fn combinations_are_shared_and_matched() {
        let mut builder = TagTableBuilder::default();
        for tags in [&["new", "toys"][..], &["toys"], &[], &["toys", "new"], &["toys"]] {
            builder.push(tags);
        }
        let table = builder.finish();
        assert_eq!((table.len(), table.combinations.ends.len()), (2, 3));
        assert!(table.of_item(3).eq(["new", "toys"]));
        assert_eq!(table.of_item(2).len(), 0);
        assert_eq!(matching(&table, 5, &["toys"], &[]), [0, 1, 3, 4]);
        assert_eq!(matching(&table, 5, &["toys", "new"], &[]), [0, 3]);
        assert_eq!(matching(&table, 5, &[], &["new"]), [1, 2, 4]);
        assert_eq!(matching(&table, 5, &["new"], &["new"]), [0_u32; 0]);
        assert_eq!(table.find("old"), None);
    }

    #[test]
    fn without_tags_nothing_is_stored_per_item() {
        let mut builder = TagTableBuilder::default();
        (0..100).for_each(|_| builder.push(&[]));
        let table = builder.finish();
        assert_eq!(table.combination_of.capacity(), 0);
        assert_eq!(table.of_item(99).len(), 0);
        assert_eq!(matching(&table, 3, &[], &[]), [0, 1, 2]);
    }
}
