//! The size and shape of a catalog: the output of `beamline catalog check` and the log line of a
//! swap.

use std::fmt;

use beamline_wording::bytes;
use serde::Serialize;

use crate::trie::{Leaf, Node};
use crate::{Catalog, narrow};

/// Sizes and shape of a catalog.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CatalogReport {
    /// The content version, as [`Catalog::version`] gives it.
    pub version: String,
    /// Number of items.
    pub items: usize,
    /// Number of distinct SIDs.
    pub leaves: usize,
    /// Number of levels of a SID.
    pub depth: usize,
    /// Number of distinct tags.
    pub tags: usize,
    /// SIDs shared by several items.
    pub collisions: Collisions,
    /// One entry per level of a SID, from the first.
    pub levels: Vec<LevelReport>,
    /// Heap memory of each part.
    pub memory: Vec<MemoryPart>,
    /// Heap memory of all parts, in bytes.
    pub memory_bytes: usize,
}

/// SIDs shared by several items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collisions {
    /// Leaves that hold more than one item.
    pub leaves: usize,
    /// Items on those leaves.
    pub items: usize,
    /// Most items on one leaf.
    pub largest: usize,
}

/// One level of the trie.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LevelReport {
    /// The level, counted from 0 as positions of a SID are.
    pub level: usize,
    /// Distinct codes used at this level.
    pub codes: usize,
    /// Distinct partial SIDs that end at this level.
    pub nodes: usize,
    /// Number of codes of this level that may follow a partial SID that ends before it.
    pub branching: Branching,
}

/// Number of children per node.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Branching {
    /// Smallest number of children.
    pub min: usize,
    /// Mean number of children.
    pub mean: f64,
    /// Largest number of children.
    pub max: usize,
}

/// Heap memory of one part of a catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPart {
    /// Name of the part.
    pub name: &'static str,
    /// Heap memory of the part, in bytes.
    pub bytes: usize,
}

impl CatalogReport {
    pub(crate) fn of(catalog: &Catalog) -> Self {
        let memory = catalog.memory_parts();
        Self {
            version: catalog.version().to_owned(),
            items: catalog.num_items(),
            leaves: catalog.num_leaves(),
            depth: catalog.depth(),
            tags: catalog.tag_table().len(),
            collisions: collisions(catalog),
            levels: (0..catalog.depth()).map(|level| level_report(catalog, level)).collect(),
            memory_bytes: memory.iter().map(|part| part.bytes).sum(),
            memory,
        }
    }
}

fn collisions(catalog: &Catalog) -> Collisions {
    let mut collisions = Collisions { largest: 1, ..Collisions::default() };
    for leaf in 0..narrow(catalog.num_leaves()) {
        let items = catalog.items_of(Leaf(leaf)).len();
        if items > 1 {
            collisions.leaves += 1;
            collisions.items += items;
            collisions.largest = collisions.largest.max(items);
        }
    }
    collisions
}

fn level_report(catalog: &Catalog, level: usize) -> LevelReport {
    let trie = catalog.trie();
    let parents = trie.num_nodes(level);
    let nodes = trie.num_nodes(level + 1);
    let mut branching = Branching { min: usize::MAX, mean: nodes as f64 / parents as f64, max: 0 };
    for index in 0..narrow(parents) {
        // A level of a SID is below the depth limit, which is a u8.
        let children = trie.children(Node { level: level as u8, index }).len();
        branching.min = branching.min.min(children);
        branching.max = branching.max.max(children);
    }
    LevelReport { level, codes: catalog.num_codes(level), nodes, branching }
}

impl fmt::Display for CatalogReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "catalog {}", self.version)?;
        writeln!(
            f,
            "  {} items on {} SIDs of {} levels, {} distinct tags",
            self.items, self.leaves, self.depth, self.tags
        )?;
        let Collisions { leaves, items, largest } = self.collisions;
        if leaves == 0 {
            writeln!(f, "  no collisions")?;
        } else {
            writeln!(
                f,
                "  collisions: {leaves} SIDs are shared by {items} items, at most {largest} by one SID"
            )?;
        }
        writeln!(f, "  level     codes       nodes   branching min      mean       max")?;
        for LevelReport { level, codes, nodes, branching: Branching { min, mean, max } } in &self.levels {
            writeln!(f, "  {level:>5} {codes:>9} {nodes:>11} {min:>15} {mean:>9.2} {max:>9}")?;
        }
        writeln!(f, "  memory: {}", bytes(self.memory_bytes as u64))?;
        for part in self.memory.iter().filter(|part| part.bytes > 0) {
            writeln!(f, "    {:<26} {:>10}", part.name, bytes(part.bytes as u64))?;
        }
        Ok(())
    }
}
