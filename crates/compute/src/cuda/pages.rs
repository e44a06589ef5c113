//! Keys and values of all pages in device memory.
//!
//! ```text
//! one layer:  keys    [page][kv_head][32][width of a key, rounded up]   bf16
//!             values  [page][kv_head][32][width of a value, rounded up]
//! ```
//!
//! Both are equally wide in a decoder; in HSTU they need not be.
//!
//! Context pages and branch pages have the same layout here. Which page holds what is decided elsewhere;
//! this is only the memory, all of it allocated at start-up. In host memory a page is its parts one
//! after the other: keys and values of the first layer, of the second, ..

use std::ops::Range;
use std::sync::Arc;

use beamline_kv_cache::{PageId, TransferError};

use super::device::{Device, DeviceError, Memory};
use crate::cpu::pages::PAGE_SIZE;

/// Bytes of a value in bf16.
const VALUE_BYTES: usize = 2;

/// Keys and values of all pages.
#[derive(Debug)]
pub struct DevicePages {
    memory: Memory,
    layers: usize,
    pages: usize,
    /// Bytes of the keys, and of the values, of one page in one layer.
    part_bytes: [usize; 2],
}

impl DevicePages {
    /// Bytes that one page takes over all layers, with keys and values of these padded widths.
    pub fn bytes_per_page(layers: usize, kv_heads: usize, widths: [usize; 2]) -> usize {
        layers * Self::part_bytes(kv_heads, widths).iter().sum::<usize>()
    }

    fn part_bytes(kv_heads: usize, widths: [usize; 2]) -> [usize; 2] {
        widths.map(|width| kv_heads * PAGE_SIZE * width * VALUE_BYTES)
    }

    /// Allocates pages.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    pub fn new(
        device: &Arc<dyn Device>,
        layers: usize,
        kv_heads: usize,
        widths: [usize; 2],
        pages: usize,
    ) -> Result<Self, DeviceError> {
        let all = Self::bytes_per_page(layers, kv_heads, widths)
            .checked_mul(pages)
            .ok_or_else(|| DeviceError::new(format!("allocating {pages} KV pages"), "too many"))?;
        let memory = Memory::zeroed(device, all)?;
        Ok(Self { memory, layers, pages, part_bytes: Self::part_bytes(kv_heads, widths) })
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Bytes of the contents of one page.
    pub fn page_bytes(&self) -> usize {
        self.layers * self.part_bytes.iter().sum::<usize>()
    }

    /// Where the keys and the values of a layer begin.
    pub fn layer(&self, layer: usize) -> [u64; 2] {
        let [keys, values] = self.part_bytes.map(|bytes| (self.pages * bytes) as u64);
        let first = self.memory.address() + layer as u64 * (keys + values);
        [first, first + keys]
    }

    /// The parts of a page, each its address and bytes, in the order of its contents.
    pub fn parts(&self, page: PageId) -> Vec<(u64, usize)> {
        let part = |(address, bytes): (u64, usize)| (address + u64::from(page.0) * bytes as u64, bytes);
        let layers = (0..self.layers).flat_map(|layer| self.layer(layer).into_iter().zip(self.part_bytes));
        layers.map(part).collect()
    }

    /// Which of the parts are of a layer.
    pub fn parts_of(layer: usize) -> Range<usize> {
        2 * layer..2 * layer + 2
    }
}

impl From<DeviceError> for TransferError {
    fn from(error: DeviceError) -> Self {
        Self::Memory(error.to_string())
    }
}
