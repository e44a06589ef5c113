//! Items and leaves that meet a combination of tag requirements, remembered between requests.
//!
//! A combination is computed by one pass over the items (tens of milliseconds for 20 million), and a deployment uses
//! few: "in stock in this country". The results are kept in a list ordered by last use, bounded by memory, and handed
//! out by reference count, so that dropping one never disturbs a request.

use std::sync::{Arc, Mutex, PoisonError};

use crate::rank_bits::{BitsBuilder, RankBits};
use crate::tags::TagTable;
use crate::trie::Leaf;

/// A combination of tag requirements: tag numbers, sorted, without repetitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TagRule {
    require: Vec<u32>,
    forbid: Vec<u32>,
}

impl TagRule {
    pub(crate) fn new(mut require: Vec<u32>, mut forbid: Vec<u32>) -> Self {
        for tags in [&mut require, &mut forbid] {
            tags.sort_unstable();
            tags.dedup();
        }
        Self { require, forbid }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.require.is_empty() && self.forbid.is_empty()
    }
}

/// What meets a [`TagRule`].
#[derive(Debug)]
pub(crate) struct TagSelection {
    pub(crate) items: Arc<RankBits>,
    /// Leaves that hold at least one of the items.
    pub(crate) leaves: Arc<RankBits>,
}

impl TagSelection {
    fn compute(rule: &TagRule, tags: &TagTable, leaf_of: &[Leaf], num_leaves: u32) -> Self {
        let num_items = crate::narrow(leaf_of.len());
        let mut items = BitsBuilder::zeros(num_items);
        let mut leaves = BitsBuilder::zeros(num_leaves);
        tags.for_each_match(num_items, &rule.require, &rule.forbid, |item| {
            items.set(item);
            leaves.set(leaf_of[item as usize].0);
        });
        Self { items: Arc::new(items.finish()), leaves: Arc::new(leaves.finish()) }
    }

    fn memory_bytes(&self) -> usize {
        self.items.memory_bytes() + self.leaves.memory_bytes()
    }
}

/// Selections by rule, the most recently used first.
#[derive(Debug)]
pub(crate) struct TagFilterCache {
    entries: Mutex<Vec<(TagRule, Arc<TagSelection>)>>,
    capacity_bytes: usize,
}

/// Keeps a search of the cache short even when selections are tiny.
const MAX_ENTRIES: usize = 64;

impl TagFilterCache {
    pub(crate) fn new(capacity_bytes: usize) -> Self {
        Self { entries: Mutex::new(Vec::new()), capacity_bytes }
    }

    /// What meets `rule`, computed unless remembered. Nothing waits for the computation: two requests that bring the
    /// same new rule at once may both compute it.
    pub(crate) fn get(
        &self,
        rule: TagRule,
        tags: &TagTable,
        leaf_of: &[Leaf],
        num_leaves: u32,
    ) -> Arc<TagSelection> {
        if let Some(known) = self.recall(&rule) {
            return known;
        }
        let selection = Arc::new(TagSelection::compute(&rule, tags, leaf_of, num_leaves));
        self.remember(rule, Arc::clone(&selection));
        selection
    }

    fn recall(&self, rule: &TagRule) -> Option<Arc<TagSelection>> {
        let mut entries = self.lock();
        let position = entries.iter().position(|(known, _)| known == rule)?;
        entries[..=position].rotate_right(1);
        Some(Arc::clone(&entries[0].1))
    }

    fn remember(&self, rule: TagRule, selection: Arc<TagSelection>) {
        let mut entries = self.lock();
        entries.retain(|(known, _)| *known != rule);
        entries.insert(0, (rule, selection));
        let mut bytes = 0;
        let fitting = entries.iter().take_while(|(_, selection)| {
            bytes += selection.memory_bytes();
            bytes <= self.capacity_bytes
        });
        let keep = fitting.count().clamp(1, MAX_ENTRIES);
        entries.truncate(keep);
    }

    /// Bytes of the selections remembered now.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.lock().iter().map(|(_, selection)| selection.memory_bytes()).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(TagRule, Arc<TagSelection>)>> {
        // No operation leaves the list half changed, so a panic elsewhere does not spoil it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tags::TagTableBuilder;

    #[test]
    fn remembers_the_recently_used_within_its_memory() {
        let names: Vec<String> = (0..6).map(|i| format!("tag {i}")).collect();
        let mut builder = TagTableBuilder::default();
        names.iter().for_each(|name| builder.push(&[name]));
        let tags = builder.finish();
        let leaf_of: Vec<Leaf> = (0..6).map(|i| Leaf(i / 2)).collect();
        let rule = |tag| TagRule::new(vec![tag, tag], vec![]);

        let cache = TagFilterCache::new(usize::MAX);
        let get = |cache: &TagFilterCache, tag| cache.get(rule(tag), &tags, &leaf_of, 3);
        let first = get(&cache, 3);
        assert!(first.items.iter().eq([3]) && first.leaves.iter().eq([1]));
        assert!(Arc::ptr_eq(&first, &get(&cache, 3)));

        let two = TagFilterCache::new(first.memory_bytes() * 2);
        let a = get(&two, 0);
        get(&two, 1);
        assert!(Arc::ptr_eq(&a, &get(&two, 0)), "used again, so the other goes first");
        get(&two, 2);
        assert!(Arc::ptr_eq(&a, &get(&two, 0)));
        assert_eq!(two.lock().len(), 2);

        let none = TagFilterCache::new(0);
        get(&none, 0);
        get(&none, 1);
        assert_eq!(none.lock().len(), 1, "the newest is always kept");
    }
}
