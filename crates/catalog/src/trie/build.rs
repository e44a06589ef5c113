//! Builds a trie in one pass over paths in lexicographic order.
//!
//! Compared with its predecessor, a path shares a prefix and opens a new node at every level after
//! it. Since paths come in order, appending those nodes numbers them as [`Trie`] promises.

use super::{Level, Trie};
use crate::order::SymbolPaths;
use crate::partition::{Partition, PartitionBuilder};
use crate::{ItemIndex, narrow};

/// The trie over `paths`, and the positions of `sorted` that belong to each leaf. `sorted` is not
/// empty and is in the order of [`SymbolPaths::sorted_items`].
pub(crate) fn build(paths: &SymbolPaths, sorted: &[ItemIndex]) -> (Trie, Partition) {
    let depth = paths.depth();
    let mut levels: Vec<LevelBuilder> =
        std::iter::repeat_with(LevelBuilder::default).take(depth + 1).collect();
    levels[0].children.begin(0);
    levels[0].leaves.begin(0);
    let mut leaf_items = PartitionBuilder::default();

    let mut previous: Option<&[u32]> = None;
    for (position, &item) in sorted.iter().enumerate() {
        let path = paths.path(item);
        let shared = previous.map_or(0, |previous| shared_prefix(previous, path));
        if previous.is_some() && shared == depth {
            continue;
        }
        let leaf = leaf_items.len();
        for level in shared + 1..=depth {
            let first_child = levels.get(level + 1).map_or(0, |below| below.leaves.len());
            let node = &mut levels[level];
            node.symbols.push(path[level - 1]);
            node.leaves.begin(leaf);
            if level < depth {
                node.children.begin(first_child);
            }
        }
        leaf_items.begin(narrow(position));
        previous = Some(path);
    }

    let num_leaves = leaf_items.len();
    let trie = Trie { levels: finish(levels, num_leaves), num_leaves };
    (trie, leaf_items.finish(narrow(sorted.len())))
}

#[derive(Default)]
struct LevelBuilder {
    symbols: Vec<u32>,
    children: PartitionBuilder,
    leaves: PartitionBuilder,
}

/// Closes the levels from the leaves up, because a level needs to know how the one below it is numbered.
fn finish(builders: Vec<LevelBuilder>, num_leaves: u32) -> Vec<Level> {
    let mut levels: Vec<Level> = Vec::with_capacity(builders.len());
    for LevelBuilder { mut symbols, children, leaves } in builders.into_iter().rev() {
        symbols.shrink_to_fit();
        let children = match levels.last() {
            Some(below) if !below.leaves.is_singletons() => Some(children.finish(below.leaves.len())),
            _ => None,
        };
        levels.push(Level { symbols, children, leaves: leaves.finish(num_leaves) });
    }
    levels.reverse();
    levels
}

fn shared_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
