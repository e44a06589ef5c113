//! Semantic-ID catalogs: the items that may be recommended, and which of them a request allows.
//!
//! # Its place in the flow
//!
//! A catalog file is read once ([`Catalog::read_path`]) into an immutable snapshot. The engine
//! walks the snapshot's [`Trie`] to learn which symbols may follow a partial semantic ID (SID),
//! asks the request's [`Filter`] which of them still lead to an allowed item, and finally turns
//! leaves back into items. A new catalog is a new snapshot; requests in flight keep theirs by
//! holding an `Arc<Catalog>`.
//!
//! # The pieces
//!
//! | type | idea |
//! | --- | --- |
//! | [`SidPart`], [`SymbolTable`] | a SID as written in the file, and the caller's map to `u32` symbols |
//! | [`Trie`] | compressed sparse rows; leaves in lexicographic order, so a node owns one interval |
//! | [`Filter`] | the allowed leaves and items of one request, answered per interval of leaves |
//! | [`Catalog`] | items, their ids, tags and titles, the trie, and a content version |
//!
//! # Invariants
//!
//! * All SIDs of a catalog have the same depth; item ids are unique; SIDs need not be (a *collision*).
//! * Leaf numbers follow the lexicographic order of symbol paths, and so do node numbers within a level.
//! * A child is allowed exactly when its interval holds an allowed leaf: no dead ends, at any level.
//! * The same file under the same symbol table gives the same version, on every run and machine.
//!
//! # What it must not know
//!
//! Tokenizers and models (symbols are opaque numbers), tensors, async, HTTP.

mod builder;
mod catalog;
mod codebook;
mod error;
mod filter;
mod index_set;
mod item_id;
mod limits;
mod line_map;
mod order;
mod partition;
mod rank_bits;
mod read;
mod record;
mod report;
mod sid;
mod strings;
mod symbols;
mod tag_filter;
mod tags;
pub mod text;
mod trie;
mod version;

pub use catalog::{Catalog, ItemIndex};
pub use error::{BadRecord, CatalogError, Place, RecordProblem, RecordUnit};
pub use filter::{Filter, FilterSpec};
pub use index_set::SetArrays;
pub use item_id::ItemId;
pub use limits::CatalogLimits;
pub use record::ItemRecord;
pub use report::{Branching, CatalogReport, Collisions, LevelReport, MemoryPart};
pub use sid::SidPart;
pub use symbols::{SymbolTable, WrittenSymbols};
pub use trie::{Children, Leaf, LevelArrays, Node, Trie};

/// Narrows a count or position that the builder has already bounded by `u32::MAX` items.
fn narrow(n: usize) -> u32 {
    assert!(n <= u32::MAX as usize, "the builder admits at most u32::MAX items");
    n as u32
}
