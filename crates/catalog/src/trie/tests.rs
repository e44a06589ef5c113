//! The trie against a sorted set of tuples.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::ItemIndex;
use crate::order::SymbolPaths;

fn trie_over(paths: &[Vec<u32>]) -> (Trie, Vec<Vec<u32>>) {
    let mut flat = SymbolPaths::default();
    paths.iter().for_each(|path| flat.push(path));
    let sorted = flat.sorted_items();
    let (trie, leaf_items) = build(&flat, &sorted);
    let groups = (0..leaf_items.len())
        .map(|leaf| leaf_items.range(leaf).map(|position| sorted[position as usize].0).collect())
        .collect();
    (trie, groups)
}

/// Everything the trie says about a set of paths, compared with the set itself.
fn check(paths: &[Vec<u32>]) {
    let (trie, groups) = trie_over(paths);
    let distinct: Vec<&Vec<u32>> = paths.iter().collect::<BTreeSet<_>>().into_iter().collect();
    let depth = paths[0].len();
    assert_eq!((trie.depth(), trie.num_leaves()), (depth, distinct.len()));

    let mut items: BTreeMap<&Vec<u32>, Vec<u32>> = BTreeMap::new();
    for (item, path) in paths.iter().enumerate() {
        items.entry(path).or_default().push(ItemIndex(item as u32).0);
    }
    assert_eq!(groups, items.into_values().collect::<Vec<_>>(), "items of leaves, in catalog order");

    for level in 0..=depth {
        let prefixes: BTreeSet<&[u32]> = distinct.iter().map(|path| &path[..level]).collect();
        assert_eq!(trie.num_nodes(level), prefixes.len());
        for (index, prefix) in prefixes.into_iter().enumerate() {
            let node = Node { level: level as u8, index: index as u32 };
            assert_eq!(trie.walk(prefix), Some(node), "nodes are numbered in order of their paths");

            let below: Vec<u32> = (0..distinct.len() as u32)
                .filter(|&leaf| distinct[leaf as usize].starts_with(prefix))
                .collect();
            assert_eq!(trie.leaves(node).collect::<Vec<_>>(), below);

            let symbols: BTreeSet<u32> =
                below.iter().filter_map(|&leaf| distinct[leaf as usize].get(level).copied()).collect();
            let children = trie.children(node);
            assert!(children.symbols().iter().eq(&symbols));
            assert_eq!((children.len(), children.is_empty()), (symbols.len(), level == depth));
            for (i, (symbol, child)) in children.iter().enumerate() {
                assert_eq!(trie.child(node, symbol), Some(child));
                assert_eq!(children.node(i), child);
                let absent = symbol.wrapping_add(1);
                assert_eq!(trie.child(node, absent).is_some(), symbols.contains(&absent));
            }
            assert_eq!(trie.leaf(node), (level == depth).then_some(Leaf(index as u32)));
        }
    }
    assert_eq!(trie.num_nodes(depth + 1), 0);

    let mut path = vec![99];
    for (leaf, expected) in distinct.into_iter().enumerate() {
        trie.path(Leaf(leaf as u32), &mut path);
        assert_eq!(&path, expected);
    }
}

/// Paths of one depth, from very crowded (collisions, full branches) to sparse.
fn paths() -> impl Strategy<Value = Vec<Vec<u32>>> {
    (1_usize..7, prop_oneof![Just(2_u32), Just(4), Just(50), Just(u32::MAX)]).prop_flat_map(
        |(depth, codes)| proptest::collection::vec(proptest::collection::vec(0..codes, depth), 1..60),
    )
}

proptest! {
    #[test]
    fn agrees_with_a_set_of_tuples(paths in paths()) {
        check(&paths);
    }

    /// One prefix holds nearly everything: the shape that wastes memory in padded layouts.
    #[test]
    fn skewed_branches(hot in 1_u32..200, cold in proptest::collection::vec(1_u32..50, 1..20)) {
        let mut paths: Vec<Vec<u32>> = (0..hot).map(|i| vec![7, 7, i]).collect();
        paths.extend(cold.into_iter().map(|symbol| vec![symbol + 7, symbol, symbol]));
        check(&paths);
    }

    #[test]
    fn random_sids_of_published_shapes(
        wide in proptest::collection::vec(proptest::collection::vec(0_u32..100, 5), 50),
        deep in proptest::collection::vec(proptest::collection::vec(0_u32..50, 8), 20),
    ) {
        check(&wide);
        check(&deep);
    }
}

#[test]
fn a_small_trie_by_hand() {
    let paths =
        [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [2, 3, 4, 5, 6], [1, 2, 8, 9, 0]].map(|path| path.to_vec());
    check(&paths);
    let (trie, _) = trie_over(&paths);
    assert_eq!((0..=5).map(|level| trie.num_nodes(level)).collect::<Vec<_>>(), [1, 2, 2, 3, 4, 4]);
    assert_eq!(trie.children(trie.root()).symbols(), [1, 2]);
    let shared = trie.walk(&[1, 2]).unwrap();
    assert_eq!((trie.children(shared).symbols(), trie.leaves(shared)), (&[3, 8][..], 0..3));
    for path in &paths {
        assert!(trie.is_leaf(trie.walk(path).unwrap()));
    }
    assert_eq!(trie.walk(&[1, 2, 8, 9, 1]), None);
    assert_eq!(trie.walk(&[1, 2, 8, 9, 0, 0]), None);
}

#[test]
fn depth_one_and_a_single_item() {
    check(&[vec![3], vec![0], vec![3], vec![u32::MAX]]);
    check(&[vec![5]]);
    check(&[vec![5, 5, 5]]);
}

#[test]
fn levels_of_single_leaves_store_no_offsets() {
    let paths: Vec<Vec<u32>> = (0..100).map(|i| vec![i / 10, i, 0, 1, 2, 3]).collect();
    check(&paths);
    let (trie, _) = trie_over(&paths);
    // The root's two offsets and those of the first level's ten nodes; everything below is one node per leaf.
    assert_eq!(trie.offset_bytes(), size_of::<u32>() * (2 + 11 + 2));
}
