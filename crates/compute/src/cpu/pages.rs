//! The contents of KV pages: keys and values of every layer, addressed by page id.
//!
//! Which page holds what is decided elsewhere (`beamline-kv-cache` and the scheduler); this is only the
//! memory. All of it is allocated at start-up.
//!
//! ```text
//! one (layer, head):   page 0              page 1
//! keys    context page [key_dim][32]       transposed: a page of keys is a panel of the register tile
//!         branch page  [32][key_dim]       a row is read alone, through parent indices
//! values  both         [32][value_width]   value_width = value_dim rounded up to 16, padding stays zero
//! ```
//!
//! Keys and values are equally wide in a decoder; in HSTU they need not be. Their numbers are in single
//! precision, or rounded to bfloat16 as they are written (`KvFormat`); all pages of a store have the
//! same format.

use beamline_kv_cache::PageId;
use bytemuck::{cast_slice, cast_slice_mut};

use super::Bf16;
use super::destinations::Destinations;
use super::isa::Isa;
use super::kv_format::KvFormat;
use super::memory::Memory;
use super::page_writes::{HeadWriter, PageWrites, Writer};
use super::stored::Stored;
use super::tile::{PANEL, SharedMatrix};
use crate::error::ComputeError;

/// Context positions in a page.
pub const PAGE_SIZE: usize = PANEL;

/// Values are padded to this many columns, a vector register of the widest instruction set.
pub(crate) const VALUE_BLOCK: usize = 16;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageShape {
    /// How numbers are kept.
    pub format: KvFormat,
    /// Number of layers.
    pub layers: usize,
    /// Key-value heads of a layer.
    pub heads: usize,
    /// Width of a key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

impl PageShape {
    /// Bytes that one page takes over all layers.
    pub fn page_bytes(self) -> usize {
        self.format.bytes() * self.layers * self.heads * PAGE_SIZE * (self.key_dim + self.value_width())
    }

    fn value_width(self) -> usize {
        self.value_dim.next_multiple_of(VALUE_BLOCK)
    }
}

/// Keys and values of all pages.
#[derive(Debug)]
pub struct PageStore {
    shape: PageShape,
    pages: usize,
    layers: Layers,
}

/// Pages of every `[layer][head]`, in one format.
#[derive(Debug)]
enum Layers {
    F32(Vec<Vec<HeadPages<f32>>>),
    Bf16(Vec<Vec<HeadPages<Bf16>>>),
}

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerPages<'a>(pub(crate) LayerHeads<'a>);

/// The heads of a layer, in either format.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LayerHeads<'a> {
    F32(&'a [HeadPages<f32>]),
    Bf16(&'a [HeadPages<Bf16>]),
}

/// Keys and values of one head in one layer.
#[derive(Debug)]
pub(crate) struct HeadPages<T> {
    key_dim: usize,
    value_dim: usize,
    value_width: usize,
    keys: Memory<T>,
    values: Memory<T>,
}

/// Where the key and value of a row are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Nowhere: the position is cached already.
    Cached,
    /// A context position.
    Context {
        /// Page of the context.
        page: PageId,
        /// Position within it.
        offset: usize,
    },
    /// A branch row.
    Branch {
        /// Page of the branch rows.
        page: PageId,
        /// Row within it.
        offset: usize,
    },
}

impl PageStore {
    /// Allocates `pages` pages.
    ///
    /// # Errors
    ///
    /// When the size overflows or the memory cannot be reserved.
    pub fn new(shape: PageShape, pages: usize) -> Result<Self, ComputeError> {
        let layers = match shape.format {
            KvFormat::F32 => Layers::F32(allocate(shape, pages)?),
            KvFormat::Bf16 => Layers::Bf16(allocate(shape, pages)?),
        };
        Ok(Self { shape, pages, layers })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// What a page holds.
    pub fn shape(&self) -> PageShape {
        self.shape
    }

    /// The heads of a layer.
    pub fn layer(&self, layer: usize) -> LayerPages<'_> {
        match &self.layers {
            Layers::F32(layers) => LayerPages(LayerHeads::F32(&layers[layer])),
            Layers::Bf16(layers) => LayerPages(LayerHeads::Bf16(&layers[layer])),
        }
    }

    /// A layer's pages, to be written by several threads: a row for every destination.
    pub fn writes<'a>(&'a mut self, layer: usize, destinations: &'a Destinations) -> PageWrites<'a> {
        let heads = match &mut self.layers {
            Layers::F32(layers) => {
                layers[layer].iter_mut().map(|head| HeadWriter::F32(head.writer())).collect()
            }
            Layers::Bf16(layers) => {
                layers[layer].iter_mut().map(|head| HeadWriter::Bf16(head.writer())).collect()
            }
        };
        PageWrites::new(heads, destinations)
    }

    /// Writes one key and value of a head, `key_dim` and `value_dim` wide.
    pub fn write(&mut self, layer: usize, head: usize, destination: Destination, key: &[f32], value: &[f32]) {
        match &mut self.layers {
            Layers::F32(layers) => layers[layer][head].write(destination, key, value),
            Layers::Bf16(layers) => layers[layer][head].write(destination, key, value),
        }
    }

    /// Key and value of a context position, for people and tests to look at.
    pub fn context_row(&self, layer: usize, head: usize, page: PageId, offset: usize) -> [Vec<f32>; 2] {
        match &self.layers {
            Layers::F32(layers) => layers[layer][head].context_row(page, offset),
            Layers::Bf16(layers) => layers[layer][head].context_row(page, offset),
        }
    }

    /// The parts of a page, in the order of its contents: keys and values of the first head in the first
    /// layer, of the second, ..
    pub fn for_each_part(&self, page: PageId, each: impl FnMut(&[u8])) {
        match &self.layers {
            Layers::F32(layers) => parts(layers, page).for_each(each),
            Layers::Bf16(layers) => parts(layers, page).for_each(each),
        }
    }

    /// The same, to be overwritten as a whole.
    pub fn for_each_part_mut(&mut self, page: PageId, each: impl FnMut(&mut [u8])) {
        match &mut self.layers {
            Layers::F32(layers) => parts_mut(layers, page).for_each(each),
            Layers::Bf16(layers) => parts_mut(layers, page).for_each(each),
        }
    }
}

fn allocate<T: Stored>(shape: PageShape, pages: usize) -> Result<Vec<Vec<HeadPages<T>>>, ComputeError> {
    let PageShape { key_dim, value_dim, .. } = shape;
    let value_width = shape.value_width();
    let memory = |width: usize| -> Result<Memory<T>, ComputeError> {
        let refuse = || ComputeError::Limit(format!("cannot allocate {pages} KV pages"));
        let len = pages.checked_mul(PAGE_SIZE).and_then(|n| n.checked_mul(width)).ok_or_else(refuse)?;
        Memory::zeroed(len).map_err(|_| refuse())
    };
    let head = || -> Result<HeadPages<T>, ComputeError> {
        let (keys, values) = (memory(key_dim)?, memory(value_width)?);
        Ok(HeadPages { key_dim, value_dim, value_width, keys, values })
    };
    (0..shape.layers).map(|_| (0..shape.heads).map(|_| head()).collect()).collect()
}

fn parts<T: Stored>(layers: &[Vec<HeadPages<T>>], page: PageId) -> impl Iterator<Item = &[u8]> {
    let parts = move |head| -> [&[u8]; 2] {
        let head: &HeadPages<T> = head;
        [cast_slice(head.context_keys(page)), cast_slice(head.values(page))]
    };
    layers.iter().flatten().flat_map(parts)
}

fn parts_mut<T: Stored>(layers: &mut [Vec<HeadPages<T>>], page: PageId) -> impl Iterator<Item = &mut [u8]> {
    layers.iter_mut().flatten().flat_map(move |head| {
        let (keys, values) = (PAGE_SIZE * head.key_dim, PAGE_SIZE * head.value_width);
        let page = page.0 as usize;
        let keys = &mut head.keys[page * keys..][..keys];
        let values = &mut head.values[page * values..][..values];
        [cast_slice_mut(keys), cast_slice_mut(values)]
    })
}

impl<T: Stored> HeadPages<T> {
    fn write(&mut self, destination: Destination, key: &[f32], value: &[f32]) {
        let isa = Isa::detect();
        let (page, offset) = match destination {
            Destination::Cached => return,
            Destination::Context { page, offset } => {
                let mut rounded = vec![T::zeroed(); self.key_dim];
                T::put(isa, key, &mut rounded);
                let keys =
                    &mut self.keys[page.0 as usize * PAGE_SIZE * self.key_dim..][..PAGE_SIZE * self.key_dim];
                for (keys, key) in keys.chunks_exact_mut(PAGE_SIZE).zip(rounded) {
                    keys[offset] = key;
                }
                (page, offset)
            }
            Destination::Branch { page, offset } => {
                let start = (page.0 as usize * PAGE_SIZE + offset) * self.key_dim;
                T::put(isa, key, &mut self.keys[start..start + self.key_dim]);
                (page, offset)
            }
        };
        let start = (page.0 as usize * PAGE_SIZE + offset) * self.value_width;
        T::put(isa, value, &mut self.values[start..start + self.value_dim]);
    }

    fn writer(&mut self) -> Writer<'_, T> {
        let Self { key_dim, value_dim, value_width, keys, values } = self;
        Writer {
            key_dim: *key_dim,
            value_dim: *value_dim,
            keys: SharedMatrix::new(keys, PAGE_SIZE),
            values: SharedMatrix::new(values, *value_width),
        }
    }

    /// Keys of a context page, `[key_dim][PAGE_SIZE]`.
    #[inline(always)]
    pub(crate) fn context_keys(&self, page: PageId) -> &[T] {
        &self.keys[page.0 as usize * PAGE_SIZE * self.key_dim..][..PAGE_SIZE * self.key_dim]
    }

    fn context_row(&self, page: PageId, offset: usize) -> [Vec<f32>; 2] {
        let keys = self.context_keys(page).iter().skip(offset).step_by(PAGE_SIZE);
        let values = &self.values(page)[offset * self.value_width..][..self.value_dim];
        [keys.map(|key| key.widen()).collect(), values.iter().map(|value| value.widen()).collect()]
    }

    /// Values of a page, `[PAGE_SIZE][value_width]`.
    #[inline(always)]
    pub(crate) fn values(&self, page: PageId) -> &[T] {
        &self.values[page.0 as usize * PAGE_SIZE * self.value_width..][..PAGE_SIZE * self.value_width]
    }

    /// Key and value of one branch row.
    #[inline(always)]
    pub(crate) fn branch_row(&self, page: PageId, offset: usize) -> (&[T], &[T]) {
        let row = page.0 as usize * PAGE_SIZE + offset;
        (
            &self.keys[row * self.key_dim..][..self.key_dim],
            &self.values[row * self.value_width..][..self.value_width],
        )
    }

    /// Width of a row of values, padding included.
    pub(crate) fn value_width(&self) -> usize {
        self.value_width
    }
}
