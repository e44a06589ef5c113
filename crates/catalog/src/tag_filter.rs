//! The items and leaves that meet a combination of tag requirements, remembered between requests.
//!
//! A combination is computed by one pass over the items (tens of milliseconds for 20 million), and
//! a deployment uses few: "in stock in this country". The results are kept by last use, bounded by
//! memory, and handed out by reference count, so that dropping one never disturbs a request.

use std::sync::Arc;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::rank_bits::{BitsBuilder, RankBits};
use crate::tags::TagTable;
use crate::trie::Leaf;

/// A combination of tag requirements: tag numbers, sorted, without repetitions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

    fn memory_bytes(&self) -> usize {
        (self.require.len() + self.forbid.len()) * size_of::<u32>()
    }
}

/// The items and leaves that meet a [`TagRule`].
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

/// Selections by rule, bounded by their memory.
#[derive(Debug)]
pub(crate) struct TagFilterCache {
    selections: Cache<TagRule, Arc<TagSelection>>,
}

impl TagFilterCache {
    pub(crate) fn new(capacity_bytes: usize) -> Self {
        let bytes = |rule: &TagRule, selection: &Arc<TagSelection>| {
            u32::try_from(rule.memory_bytes() + selection.memory_bytes()).unwrap_or(u32::MAX)
        };
        let selections = Cache::builder()
            .max_capacity(capacity_bytes as u64)
            .weigher(bytes)
            // Plain LRU: a rule that is used for the first time is kept, however popular the others
            // are.
            .eviction_policy(EvictionPolicy::lru())
            .build();
        Self { selections }
    }

    /// The items and leaves that meet `rule`, computed unless remembered. Requests that bring the
    /// same new rule at once wait for one computation. Requests with other rules do not wait.
    pub(crate) fn get(
        &self,
        rule: TagRule,
        tags: &TagTable,
        leaf_of: &[Leaf],
        num_leaves: u32,
    ) -> Arc<TagSelection> {
        let compute = |rule: &TagRule| Arc::new(TagSelection::compute(rule, tags, leaf_of, num_leaves));
        if let Some(known) = self.selections.get(&rule) {
            return known;
        }
        self.selections.get_with_by_ref(&rule, || compute(&rule))
    }

    /// Bytes of the selections remembered now.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.selections.run_pending_tasks();
        usize::try_from(self.selections.weighted_size()).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::tags::TagTableBuilder;

    /// Six items, each with a tag of its own, on three leaves.
    struct World {
        tags: TagTable,
        leaf_of: Vec<Leaf>,
    }

    impl World {
        fn new() -> Self {
            let names: Vec<String> = (0..6).map(|i| format!("tag {i}")).collect();
            let mut builder = TagTableBuilder::default();
            names.iter().for_each(|name| builder.push(&[name]));
            Self { tags: builder.finish(), leaf_of: (0..6).map(|i| Leaf(i / 2)).collect() }
        }

        fn get(&self, cache: &TagFilterCache, tag: u32) -> Arc<TagSelection> {
            let selection = cache.get(TagRule::new(vec![tag, tag], vec![]), &self.tags, &self.leaf_of, 3);
            cache.selections.run_pending_tasks();
            selection
        }

        fn bytes_of_one(&self) -> usize {
            let cache = TagFilterCache::new(usize::MAX);
            self.get(&cache, 0);
            cache.memory_bytes()
        }
    }

    #[test]
    fn a_rule_is_computed_once_and_right() {
        let (world, cache) = (World::new(), TagFilterCache::new(usize::MAX));
        let first = world.get(&cache, 3);
        assert!(first.items.iter().eq([3]) && first.leaves.iter().eq([1]));
        assert!(Arc::ptr_eq(&first, &world.get(&cache, 3)));
    }

    #[test]
    fn memory_is_bounded_and_the_recently_used_stay() {
        let world = World::new();
        let two = TagFilterCache::new(world.bytes_of_one() * 2);
        let a = world.get(&two, 0);
        world.get(&two, 1);
        assert!(Arc::ptr_eq(&a, &world.get(&two, 0)), "used again, so the other goes first");
        world.get(&two, 2);
        assert!(Arc::ptr_eq(&a, &world.get(&two, 0)));
        assert_eq!(two.memory_bytes(), world.bytes_of_one() * 2);
    }

    #[test]
    fn what_does_not_fit_is_answered_and_not_kept() {
        let (world, none) = (World::new(), TagFilterCache::new(0));
        assert!(world.get(&none, 5).items.iter().eq([5]));
        assert!(world.get(&none, 5).items.iter().eq([5]));
        assert_eq!(none.memory_bytes(), 0);
    }

    #[test]
    fn a_selection_that_was_dropped_still_serves_its_request() {
        let world = World::new();
        let one = TagFilterCache::new(world.bytes_of_one());
        let held = world.get(&one, 0);
        world.get(&one, 1);
        assert!(!Arc::ptr_eq(&held, &world.get(&one, 0)), "it was dropped and computed again");
        assert!(held.items.iter().eq([0]));
    }

    #[test]
    fn requests_that_bring_the_same_new_rule_at_once_share_one_computation() {
        let (world, cache, together) = (World::new(), TagFilterCache::new(usize::MAX), Barrier::new(8));
        let ask = || {
            together.wait();
            cache.get(TagRule::new(vec![2], vec![4]), &world.tags, &world.leaf_of, 3)
        };
        let answers: Vec<_> = std::thread::scope(|scope| {
            let asked: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            asked.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(answers.iter().all(|answer| Arc::ptr_eq(answer, &answers[0])));
    }
}
