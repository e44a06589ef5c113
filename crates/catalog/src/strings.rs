//! Many strings in one allocation, and a lookup from a string to its number.
//!
//! Twenty million `String`s would cost 24 bytes each before their text, and a map from them as much
//! again. Here a string costs its text, 8 bytes of offset and, if it can be searched for, about 8
//! bytes of hash table.

use std::hash::BuildHasher;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::narrow;

/// Strings numbered from 0 in the order they were added.
#[derive(Debug, Default)]
pub(crate) struct StringTable {
    text: String,
    ends: Vec<u64>,
}

impl StringTable {
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(self.text.len() as u64);
    }

    pub(crate) fn get(&self, i: u32) -> &str {
        let i = i as usize;
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.text[start..self.ends[i] as usize]
    }

    pub(crate) fn shrink_to_fit(&mut self) {
        self.text.shrink_to_fit();
        self.ends.shrink_to_fit();
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.text.capacity() + self.ends.capacity() * size_of::<u64>()
    }
}

/// A [`StringTable`] without repetitions that can be searched.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    strings: StringTable,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

/// The result of [`Interner::intern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interned {
    New(u32),
    Known(u32),
}

impl Interner {
    pub(crate) fn len(&self) -> usize {
        self.strings.len()
    }

    pub(crate) fn strings(&self) -> &StringTable {
        &self.strings
    }

    pub(crate) fn find(&self, string: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(string);
        self.numbers.find(hash, |&i| self.strings.get(i) == string).copied()
    }

    /// Returns the number of `string`, and adds the string if it is new.
    pub(crate) fn intern(&mut self, string: &str) -> Interned {
        let Self { strings, numbers, hasher } = self;
        let hash = hasher.hash_one(string);
        let same = |&i: &u32| strings.get(i) == string;
        match numbers.entry(hash, same, |&i| hasher.hash_one(strings.get(i))) {
            Entry::Occupied(entry) => Interned::Known(*entry.get()),
            Entry::Vacant(entry) => {
                let number = narrow(strings.len());
                entry.insert(number);
                strings.push(string);
                Interned::New(number)
            }
        }
    }

    pub(crate) fn shrink_to_fit(&mut self) {
        let Self { strings, numbers, hasher } = self;
        strings.shrink_to_fit();
        numbers.shrink_to_fit(|&i| hasher.hash_one(strings.get(i)));
    }

    /// Bytes of the hash table alone; the text is in [`Self::strings`].
    pub(crate) fn table_bytes(&self) -> usize {
        self.numbers.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_interned() {
        let mut interner = Interner::default();
        for i in 0..1000_u32 {
            assert_eq!(interner.intern(&format!("item {i}")), Interned::New(i));
        }
        assert_eq!(interner.intern("item 7"), Interned::Known(7));
        assert_eq!(interner.intern(""), Interned::New(1000));
        interner.shrink_to_fit();
        assert_eq!(interner.find("item 999"), Some(999));
        assert_eq!(interner.find("item 1000"), None);
        assert_eq!((interner.strings().get(0), interner.strings().get(1000)), ("item 0", ""));
    }
}
