//! The contents of KV pages: keys and values of every layer, addressed by page id.
//!
//! Which page holds what is decided elsewhere (`beamline-kv-cache` and the scheduler); this is only the memory.
//! All of it is allocated at start-up.
//!
//! ```text
//! one (layer, head):   page 0              page 1
//! keys    context page [key_dim][32]       transposed: a page of keys is a panel of the register tile
//!         branch page  [32][key_dim]       a row is read alone, through parent indices
//! values  both         [32][value_width]   value_width = value_dim rounded up to 16, padding stays zero
//! ```
//!
//! Keys and values are equally wide in a decoder; in HSTU they need not be.

use beamline_kv_cache::PageId;

use super::destinations::Destinations;
use super::memory::Memory;
use super::page_writes::{HeadWriter, PageWrites};
use super::tile::{PANEL, SharedMatrix};
use crate::error::ModelError;

/// Context positions in a page.
pub const PAGE_SIZE: usize = PANEL;

/// Values are padded to this many columns, a vector register of the widest instruction set.
pub(crate) const VALUE_BLOCK: usize = 16;

/// Keys and values of all pages.
#[derive(Debug)]
pub struct PageStore {
    key_dim: usize,
    value_dim: usize,
    pages: usize,
    layers: Vec<Vec<HeadPages>>,
}

/// Keys and values of one head in one layer.
#[derive(Debug)]
pub struct HeadPages {
    key_dim: usize,
    value_dim: usize,
    value_width: usize,
    keys: Memory,
    values: Memory,
}

/// Where the key and value of a row are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Nowhere: the position is cached already.
    Cached,
    /// A context position.
    Context {
        /// Page.
        page: PageId,
        /// Position within it.
        offset: usize,
    },
    /// A branch row.
    Branch {
        /// Page.
        page: PageId,
        /// Row within it.
        offset: usize,
    },
}

impl PageStore {
    /// Bytes that one page takes over all layers, with keys and values of one width.
    pub fn bytes_per_page(layers: usize, kv_heads: usize, head_dim: usize) -> usize {
        Self::bytes_per_page_of(layers, kv_heads, head_dim, head_dim)
    }

    /// Bytes that one page takes over all layers.
    pub fn bytes_per_page_of(layers: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> usize {
        4 * layers * kv_heads * PAGE_SIZE * (key_dim + value_dim.next_multiple_of(VALUE_BLOCK))
    }

    /// Allocates `pages` pages.
    ///
    /// # Errors
    ///
    /// When the size overflows or the memory cannot be reserved.
    pub fn new(
        layers: usize,
        kv_heads: usize,
        key_dim: usize,
        value_dim: usize,
        pages: usize,
    ) -> Result<Self, ModelError> {
        let value_width = value_dim.next_multiple_of(VALUE_BLOCK);
        let allocate = |width: usize| -> Result<Memory, ModelError> {
            let refuse = || ModelError::Limit(format!("cannot allocate {pages} KV pages"));
            let len = pages.checked_mul(PAGE_SIZE).and_then(|n| n.checked_mul(width)).ok_or_else(refuse)?;
            Memory::zeroed(len).map_err(|_| refuse())
        };
        let head = || -> Result<HeadPages, ModelError> {
            let (keys, values) = (allocate(key_dim)?, allocate(value_width)?);
            Ok(HeadPages { key_dim, value_dim, value_width, keys, values })
        };
        let layers =
            (0..layers).map(|_| (0..kv_heads).map(|_| head()).collect()).collect::<Result<_, _>>()?;
        Ok(Self { key_dim, value_dim, pages, layers })
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Width of a key.
    pub fn key_dim(&self) -> usize {
        self.key_dim
    }

    /// Width of a value.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The heads of a layer.
    pub fn layer(&self, layer: usize) -> &[HeadPages] {
        &self.layers[layer]
    }

    /// A layer's pages, to be written by several threads: a row for every destination.
    pub(crate) fn writes<'a>(&'a mut self, layer: usize, destinations: &'a Destinations) -> PageWrites<'a> {
        PageWrites::new(self.layers[layer].iter_mut().map(HeadPages::writer).collect(), destinations)
    }

    /// The heads of a layer, to be written one by one.
    pub fn layer_mut(&mut self, layer: usize) -> &mut [HeadPages] {
        &mut self.layers[layer]
    }
}

impl HeadPages {
    /// Writes a key and a value, `key_dim` and `value_dim` wide.
    pub fn write(&mut self, destination: Destination, key: &[f32], value: &[f32]) {
        let (page, offset) = match destination {
            Destination::Cached => return,
            Destination::Context { page, offset } => {
                let keys =
                    &mut self.keys[page.0 as usize * PAGE_SIZE * self.key_dim..][..PAGE_SIZE * self.key_dim];
                for (keys, key) in keys.chunks_exact_mut(PAGE_SIZE).zip(key) {
                    keys[offset] = *key;
                }
                (page, offset)
            }
            Destination::Branch { page, offset } => {
                let start = (page.0 as usize * PAGE_SIZE + offset) * self.key_dim;
                self.keys[start..start + self.key_dim].copy_from_slice(key);
                (page, offset)
            }
        };
        let start = (page.0 as usize * PAGE_SIZE + offset) * self.value_width;
        self.values[start..start + self.value_dim].copy_from_slice(value);
    }

    fn writer(&mut self) -> HeadWriter<'_> {
        let Self { key_dim, value_dim, value_width, keys, values } = self;
        HeadWriter {
            key_dim: *key_dim,
            value_dim: *value_dim,
            keys: SharedMatrix::new(keys, PAGE_SIZE),
            values: SharedMatrix::new(values, *value_width),
        }
    }

    /// Keys of a context page, `[key_dim][PAGE_SIZE]`.
    #[inline(always)]
    pub(crate) fn context_keys(&self, page: PageId) -> &[f32] {
        &self.keys[page.0 as usize * PAGE_SIZE * self.key_dim..][..PAGE_SIZE * self.key_dim]
    }

    /// Key and value of a context position, for people and tests to look at.
    pub fn context_row(&self, page: PageId, offset: usize) -> (Vec<f32>, &[f32]) {
        let key = self.context_keys(page).iter().skip(offset).step_by(PAGE_SIZE).copied().collect();
        (key, &self.values(page)[offset * self.value_width..][..self.value_dim])
    }

    /// Values of a page, `[PAGE_SIZE][value_width]`.
    #[inline(always)]
    pub(crate) fn values(&self, page: PageId) -> &[f32] {
        &self.values[page.0 as usize * PAGE_SIZE * self.value_width..][..PAGE_SIZE * self.value_width]
    }

    /// Keys and values of a page, to be overwritten as a whole.
    pub(crate) fn page_mut(&mut self, page: PageId) -> [&mut [f32]; 2] {
        let (keys, values) = (PAGE_SIZE * self.key_dim, PAGE_SIZE * self.value_width);
        let page = page.0 as usize;
        [&mut self.keys[page * keys..][..keys], &mut self.values[page * values..][..values]]
    }

    /// Key and value of one branch row.
    #[inline(always)]
    pub(crate) fn branch_row(&self, page: PageId, offset: usize) -> (&[f32], &[f32]) {
        let row = page.0 as usize * PAGE_SIZE + offset;
        (
            &self.keys[row * self.key_dim..][..self.key_dim],
            &self.values[row * self.value_width..][..self.value_width],
        )
    }

    /// Width of a value.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Width of a row of values, padding included.
    pub(crate) fn value_width(&self) -> usize {
        self.value_width
    }
}
