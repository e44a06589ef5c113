//! Bookkeeping of the paged KV cache.

/// Names a page of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);
