//! The trie over the SIDs of a catalog, as compressed sparse rows.
//!
//! Nodes of a level are numbered in lexicographic order of their paths, and so are the leaves.
//! Hence the children of a node are consecutive nodes, and the leaves below a node are one
//! interval. Whether a node still leads to an allowed item is a question about an interval, which a
//! [`Filter`](crate::Filter) answers without walking.
//!
//! Symbols are opaque here. Their numeric order is the order of everything, so a symbol table that
//! maps codes to token ids makes leaf order equal to token path order.

mod build;
#[cfg(test)]
mod tests;

use std::ops::Range;

use crate::narrow;
use crate::partition::Partition;

pub(crate) use build::build;

/// A leaf: one distinct SID. Its number is the rank of its symbol path among all paths of the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Leaf(pub u32);

/// A node: the partial SID of the first `level` symbols. Meaningful only for the trie it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Number of symbols of the partial SID; 0 for the root.
    pub level: u8,
    /// Rank of the node's path among the paths of its level.
    pub index: u32,
}

/// An immutable trie in which all leaves have the same depth.
#[derive(Debug)]
pub struct Trie {
    /// Levels 0 (the root) to `depth` (the leaves).
    levels: Vec<Level>,
    num_leaves: u32,
}

/// The raw arrays of the step from one level to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelArrays<'a> {
    /// The children of node n are the nodes `children[n]..children[n + 1]` of the next level.
    /// `None` where each node n has the one child n.
    pub children: Option<&'a [u32]>,
    /// Symbol of each node of the next level.
    pub symbols: &'a [u32],
    /// Node c of the next level owns the leaves `leaves[c]..leaves[c + 1]`; `None` where it owns
    /// the one leaf c.
    pub leaves: Option<&'a [u32]>,
}

/// The nodes of one level.
#[derive(Debug)]
struct Level {
    /// The last symbol of each node's path; the root has none.
    symbols: Vec<u32>,
    /// Maps a node to nodes of the next level. `None` where the next level has one node per leaf,
    /// numbered like the leaves: there `leaves` already says it.
    children: Option<Partition>,
    /// Maps a node to its interval of leaves.
    leaves: Partition,
}

impl Level {
    #[inline]
    fn children(&self, index: u32) -> Range<u32> {
        self.children.as_ref().unwrap_or(&self.leaves).range(index)
    }
}

impl Trie {
    /// The node of the empty path.
    pub fn root(&self) -> Node {
        Node { level: 0, index: 0 }
    }

    /// Number of symbols in a SID.
    pub fn depth(&self) -> usize {
        self.levels.len() - 1
    }

    /// Number of distinct SIDs.
    pub fn num_leaves(&self) -> usize {
        self.num_leaves as usize
    }

    /// Number of nodes of a level; 0 for levels below the leaves.
    pub fn num_nodes(&self, level: usize) -> usize {
        self.levels.get(level).map_or(0, |level| level.leaves.len() as usize)
    }

    /// The children of `node` in ascending order of symbol; none if it is a leaf.
    #[inline]
    pub fn children(&self, node: Node) -> Children<'_> {
        let level = usize::from(node.level);
        match self.levels.get(level + 1) {
            Some(below) => {
                let nodes = self.levels[level].children(node.index);
                let symbols = &below.symbols[nodes.start as usize..nodes.end as usize];
                Children { symbols, level: node.level + 1, first: nodes.start }
            }
            None => Children { symbols: &[], level: node.level, first: 0 },
        }
    }

    /// The child that `symbol` leads to.
    #[inline]
    pub fn child(&self, node: Node, symbol: u32) -> Option<Node> {
        let children = self.children(node);
        children.symbols.binary_search(&symbol).ok().map(|i| children.node(i))
    }

    /// The node that `symbols` lead to from the root.
    pub fn walk(&self, symbols: &[u32]) -> Option<Node> {
        symbols.iter().try_fold(self.root(), |node, &symbol| self.child(node, symbol))
    }

    /// The interval of leaf numbers below `node`; never empty.
    #[inline]
    pub fn leaves(&self, node: Node) -> Range<u32> {
        self.levels[usize::from(node.level)].leaves.range(node.index)
    }

    /// The leaf that `node` stands for, if it is at the last level.
    #[inline]
    pub fn leaf(&self, node: Node) -> Option<Leaf> {
        self.is_leaf(node).then_some(Leaf(node.index))
    }

    /// Whether `node` is a leaf.
    #[inline]
    pub fn is_leaf(&self, node: Node) -> bool {
        usize::from(node.level) == self.depth()
    }

    /// The raw arrays of a level above the leaves, for the GPU. `None` for the leaves and below.
    pub fn arrays_below(&self, level: usize) -> Option<LevelArrays<'_>> {
        let (level, below) = (self.levels.get(level)?, self.levels.get(level + 1)?);
        Some(LevelArrays {
            children: level.children.as_ref().unwrap_or(&level.leaves).offsets(),
            symbols: &below.symbols,
            leaves: below.leaves.offsets(),
        })
    }

    /// Replaces the contents of `path` by the symbols of `leaf`.
    pub fn path(&self, leaf: Leaf, path: &mut Vec<u32>) {
        path.clear();
        path.extend(self.levels[1..].iter().map(|level| level.symbols[level.leaves.find(leaf.0) as usize]));
    }

    /// Bytes of all edge symbols.
    pub(crate) fn symbol_bytes(&self) -> usize {
        self.levels.iter().map(|level| level.symbols.capacity() * size_of::<u32>()).sum()
    }

    /// Bytes of all offsets.
    pub(crate) fn offset_bytes(&self) -> usize {
        self.levels
            .iter()
            .map(|level| {
                level.leaves.memory_bytes() + level.children.as_ref().map_or(0, Partition::memory_bytes)
            })
            .sum()
    }
}

/// The children of a node: their symbols, strictly ascending, and the nodes that these lead to.
#[derive(Clone, Copy, Debug)]
pub struct Children<'a> {
    symbols: &'a [u32],
    level: u8,
    first: u32,
}

impl<'a> Children<'a> {
    /// Number of children.
    pub fn len(&self) -> usize {
        self.symbols.len()
    }

    /// Whether the node has no children, as a leaf does.
    pub fn is_empty(&self) -> bool {
        self.symbols.is_empty()
    }

    /// The symbols of the children, strictly ascending.
    #[inline]
    pub fn symbols(&self) -> &'a [u32] {
        self.symbols
    }

    /// The node that symbol `i` of [`Self::symbols`] leads to.
    ///
    /// # Panics
    ///
    /// If `i` is not less than [`Self::len`].
    #[inline]
    pub fn node(&self, i: usize) -> Node {
        assert!(i < self.symbols.len(), "child {i} of {}", self.symbols.len());
        Node { level: self.level, index: self.first + narrow(i) }
    }

    /// Each symbol with the node it leads to.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u32, Node)> + use<'a> {
        let Self { symbols, level, first } = *self;
        symbols.iter().enumerate().map(move |(i, &symbol)| (symbol, Node { level, index: first + i as u32 }))
    }
}
