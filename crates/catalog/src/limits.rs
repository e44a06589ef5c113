//! Bounds on what a catalog may contain, checked while it is read and before memory is spent on it.

/// Limits of one catalog. [`CatalogLimits::default`] suits a serving machine; every field may be set freely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogLimits {
    /// Most items in a catalog. Default 100,000,000 (about 8 GB at depth 8, and half as much again
    /// while it is built).
    pub max_items: u32,
    /// Most levels of a SID. Default 32.
    pub max_depth: u8,
    /// Longest item id in bytes. Default 512.
    pub max_item_id_bytes: usize,
    /// Longest token string of a SID in bytes. Default 256.
    pub max_token_bytes: usize,
    /// Most tags on one item, repetitions included. Default 256.
    pub max_tags_per_item: usize,
    /// Longest tag in bytes. Default 256.
    pub max_tag_bytes: usize,
    /// Longest title in bytes. Default 16 KiB.
    pub max_title_bytes: usize,
    /// Longest line of a JSON-lines file in bytes, without its line end. Default 1 MiB.
    pub max_line_bytes: usize,
    /// How many bad records an error lists before it only counts them. Default 20.
    pub max_listed_problems: usize,
    /// Memory for remembered combinations of tag requirements, in bytes; see
    /// [`Catalog::filter`](crate::Catalog::filter). One combination takes about
    /// `(items + leaves) / 8` bytes. One that exceeds the whole limit is computed for every request.
    /// Default 64 MiB.
    pub tag_filter_cache_bytes: usize,
}

impl Default for CatalogLimits {
    fn default() -> Self {
        Self {
            max_items: 100_000_000,
            max_depth: 32,
            max_item_id_bytes: 512,
            max_token_bytes: 256,
            max_tags_per_item: 256,
            max_tag_bytes: 256,
            max_title_bytes: 16 << 10,
            max_line_bytes: 1 << 20,
            max_listed_problems: 20,
            tag_filter_cache_bytes: 64 << 20,
        }
    }
}
