//! Keys and values of all pages in device memory.
//!
//! ```text
//! one layer:  keys    [page][kv_head][32][head_dim rounded up]   bf16
//!             values  the same
//! ```
//!
//! Context pages and branch pages look alike here. Which page holds what is decided elsewhere; this is only the memory, all of
//! it allocated at start-up. In host memory a page is its parts one after the other: keys and values of the first layer, of the second, ..

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
    /// Bytes of the keys of one page in one layer.
    part_bytes: usize,
}

impl DevicePages {
    /// Bytes that one page takes over all layers.
    pub fn bytes_per_page(layers: usize, kv_heads: usize, padded_dim: usize) -> usize {
        2 * layers * kv_heads * PAGE_SIZE * padded_dim * VALUE_BYTES
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
        padded_dim: usize,
        pages: usize,
    ) -> Result<Self, DeviceError> {
        let bytes = Self::bytes_per_page(layers, kv_heads, padded_dim);
        let all = bytes
            .checked_mul(pages)
            .ok_or_else(|| DeviceError::new(format!("allocating {pages} KV pages"), "too many"))?;
        let memory = Memory::zeroed(device, all)?;
        Ok(Self { memory, layers, pages, part_bytes: kv_heads * PAGE_SIZE * padded_dim * VALUE_BYTES })
    }

    /// Pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Bytes of the contents of one page.
    pub fn page_bytes(&self) -> usize {
        2 * self.layers * self.part_bytes
    }

    /// Where the keys and the values of a layer begin.
    pub fn layer(&self, layer: usize) -> [u64; 2] {
        let part = (self.pages * self.part_bytes) as u64;
        let keys = self.memory.address() + 2 * layer as u64 * part;
        [keys, keys + part]
    }

    /// The parts of a page, each its address and bytes, in the order of its contents.
    pub fn parts(&self, page: PageId) -> Vec<(u64, usize)> {
        let within = u64::from(page.0) * self.part_bytes as u64;
        let addresses = (0..self.layers).flat_map(|layer| self.layer(layer)).map(|part| part + within);
        addresses.map(|address| (address, self.part_bytes)).collect()
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
