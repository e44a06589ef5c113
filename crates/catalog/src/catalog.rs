//! The snapshot: items and trie together, built once and never changed.
//!
//! Items keep the order of the file. The trie orders their SIDs; two arrays connect the orders.

use std::path::Path;
use std::sync::Arc;

use crate::builder::{self, CatalogBuilder};
use crate::codebook::Codebook;
use crate::partition::Partition;
use crate::read;
use crate::strings::{Interner, StringTable};
use crate::tag_filter::{TagFilterCache, TagRule, TagSelection};
use crate::tags::TagTable;
use crate::trie::{Leaf, Trie};
use crate::{
    CatalogError, CatalogLimits, CatalogReport, Filter, FilterSpec, ItemRecord, MemoryPart, SidPart,
    SymbolTable, narrow,
};

/// The position of an item in catalog order. Meaningful only for the catalog it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemIndex(pub u32);

/// An immutable catalog; share it as `Arc<Catalog>`.
///
/// Methods that take an [`ItemIndex`] or a [`Leaf`] panic if it is not of this catalog.
#[derive(Debug)]
pub struct Catalog {
    parts: Parts,
    tag_filters: TagFilterCache,
}

/// The finished parts from which a builder makes a catalog.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) version: String,
    pub(crate) ids: Interner,
    /// One title per item, empty for items without one; `None` if no item has a title.
    pub(crate) titles: Option<StringTable>,
    pub(crate) tags: TagTable,
    pub(crate) codebook: Codebook,
    pub(crate) trie: Trie,
    pub(crate) leaf_of: Vec<Leaf>,
    /// Maps a leaf to positions of `items_by_leaf`.
    pub(crate) leaf_items: Partition,
    pub(crate) items_by_leaf: Vec<ItemIndex>,
    pub(crate) tag_filter_cache_bytes: usize,
}

impl Catalog {
    /// Reads a `.jsonl` or `.parquet` file record by record.
    ///
    /// # Errors
    ///
    /// See [`CatalogError`]. All bad records of the file are reported together.
    pub fn read_path(
        path: &Path,
        symbols: &dyn SymbolTable,
        limits: &CatalogLimits,
    ) -> Result<Self, CatalogError> {
        let mut builder = CatalogBuilder::new(symbols, limits);
        read::for_each_record(path, limits, &mut |place, record| builder.push(place, record))?;
        builder.finish()
    }

    /// Reads the lines of a `.jsonl` file from memory.
    ///
    /// # Errors
    ///
    /// See [`CatalogError`]. All bad lines are reported together.
    pub fn read_json_lines(
        text: &[u8],
        symbols: &dyn SymbolTable,
        limits: &CatalogLimits,
    ) -> Result<Self, CatalogError> {
        let mut builder = CatalogBuilder::new(symbols, limits);
        read::for_each_line(text, limits, &mut |place, record| builder.push(place, record))?;
        builder.finish()
    }

    /// Builds a catalog from records in memory, which are consumed one by one.
    ///
    /// # Errors
    ///
    /// See [`CatalogError`]. All bad records are reported together, numbered from 1.
    pub fn from_records(
        records: impl IntoIterator<Item = ItemRecord>,
        symbols: &dyn SymbolTable,
        limits: &CatalogLimits,
    ) -> Result<Self, CatalogError> {
        builder::from_records(records, symbols, limits)
    }

    pub(crate) fn from_parts(parts: Parts) -> Self {
        let tag_filters = TagFilterCache::new(parts.tag_filter_cache_bytes);
        Self { parts, tag_filters }
    }

    /// The content version: 16 hexadecimal digits. They depend only on the items in their order,
    /// their symbols and their tags.
    pub fn version(&self) -> &str {
        &self.parts.version
    }

    /// Number of items; at least 1.
    pub fn num_items(&self) -> usize {
        self.parts.leaf_of.len()
    }

    /// Number of distinct SIDs.
    pub fn num_leaves(&self) -> usize {
        self.trie().num_leaves()
    }

    /// Number of levels of every SID; at least 1.
    pub fn depth(&self) -> usize {
        self.trie().depth()
    }

    /// The trie over the SIDs.
    pub fn trie(&self) -> &Trie {
        &self.parts.trie
    }

    /// The item with this id.
    pub fn item(&self, item_id: &str) -> Option<ItemIndex> {
        self.parts.ids.find(item_id).map(ItemIndex)
    }

    /// All tags that items have, in order of first mention.
    pub fn tag_names(&self) -> impl Iterator<Item = &str> {
        self.parts.tags.names()
    }

    /// All items in catalog order.
    pub fn items(&self) -> impl ExactSizeIterator<Item = ItemIndex> + use<> {
        (0..narrow(self.num_items())).map(ItemIndex)
    }

    /// The client's id of an item.
    pub fn item_id(&self, item: ItemIndex) -> &str {
        self.parts.ids.strings().get(item.0)
    }

    /// The title of an item.
    pub fn title(&self, item: ItemIndex) -> Option<&str> {
        let title = self.parts.titles.as_ref()?.get(item.0);
        (!title.is_empty()).then_some(title)
    }

    /// The tags of an item, without repetitions, in the order in which they first appear in the catalog.
    pub fn tags(&self, item: ItemIndex) -> impl ExactSizeIterator<Item = &str> {
        self.parts.tags.of_item(item.0)
    }

    /// The leaf of an item's SID.
    pub fn leaf_of(&self, item: ItemIndex) -> Leaf {
        self.parts.leaf_of[item.0 as usize]
    }

    /// The items of a leaf in catalog order; at least one.
    pub fn items_of(&self, leaf: Leaf) -> &[ItemIndex] {
        let positions = self.parts.leaf_items.range(leaf.0);
        &self.parts.items_by_leaf[positions.start as usize..positions.end as usize]
    }

    /// The SID of a leaf as written in the file: codes as codes, token strings as token strings.
    pub fn sid_parts(&self, leaf: Leaf) -> Vec<SidPart> {
        let mut path = Vec::with_capacity(self.depth());
        self.trie().path(leaf, &mut path);
        path.into_iter().enumerate().map(|(level, symbol)| self.parts.codebook.part(level, symbol)).collect()
    }

    /// Composes the set of items that one request allows.
    ///
    /// The work is proportional to the length of the request's lists. A combination of tags that
    /// was not used lately also costs one pass over the items. Its result is remembered, see
    /// [`tag_filter_cache_bytes`](CatalogLimits::tag_filter_cache_bytes).
    pub fn filter(&self, spec: &FilterSpec<'_>) -> Filter {
        Filter::compose(self, spec)
    }

    /// Heap memory in use, in bytes, remembered tag filters included.
    pub fn memory_bytes(&self) -> usize {
        self.memory_parts().iter().map(|part| part.bytes).sum()
    }

    /// Sizes and shape, for people and for logs. Walks the whole trie once.
    pub fn report(&self) -> CatalogReport {
        CatalogReport::of(self)
    }

    pub(crate) fn memory_parts(&self) -> Vec<MemoryPart> {
        let parts = &self.parts;
        let between = parts.leaf_of.capacity() * size_of::<Leaf>()
            + parts.items_by_leaf.capacity() * size_of::<ItemIndex>()
            + parts.leaf_items.memory_bytes();
        [
            ("item ids", parts.ids.strings().memory_bytes()),
            ("item id lookup", parts.ids.table_bytes()),
            ("titles", parts.titles.as_ref().map_or(0, StringTable::memory_bytes)),
            ("tags", parts.tags.memory_bytes()),
            ("codes as written", parts.codebook.memory_bytes()),
            ("trie symbols", parts.trie.symbol_bytes()),
            ("trie offsets", parts.trie.offset_bytes()),
            ("items to leaves and back", between),
            ("tag filters remembered", self.tag_filters.memory_bytes()),
        ]
        .map(|(name, bytes)| MemoryPart { name, bytes })
        .to_vec()
    }

    pub(crate) fn num_codes(&self, level: usize) -> usize {
        self.parts.codebook.num_codes(level)
    }

    pub(crate) fn tag_table(&self) -> &TagTable {
        &self.parts.tags
    }

    pub(crate) fn tag_selection(&self, rule: TagRule) -> Arc<TagSelection> {
        self.tag_filters.get(rule, &self.parts.tags, &self.parts.leaf_of, narrow(self.num_leaves()))
    }
}
