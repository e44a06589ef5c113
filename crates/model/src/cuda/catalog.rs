//! A catalog's trie and a request's filter in device memory.
//!
//! Place in the flow: the trie is copied once per catalog snapshot, the filter once per request;
//! `expand.cu` reads both. The arrays are those of the catalog crate, unchanged.
//!
//! What this must not know: beams, models.

use std::ops::Range;
use std::sync::Arc;

use beamline_catalog::{Filter, SetArrays, Trie};
use bytemuck::{Pod, Zeroable};

use beamline_compute::cuda::device::{Device, DeviceError, Memory};

/// The trie of a catalog.
#[derive(Debug)]
pub struct DeviceTrie {
    levels: Vec<DeviceLevel>,
}

/// The step from one level to the next.
#[derive(Debug)]
pub struct DeviceLevel {
    children: Option<Memory>,
    symbols: Memory,
    leaves: Option<Memory>,
    /// Nodes of the next level.
    pub nodes: usize,
    /// All symbols of the next level lie in here.
    pub tokens: Range<u32>,
    /// Most children of a node.
    widest: usize,
}

impl DeviceTrie {
    /// Copies a trie.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn new(device: &Arc<dyn Device>, trie: &Trie) -> Result<Self, DeviceError> {
        let copy = |array: Option<&[u32]>| array.map(|array| Memory::of(device, array)).transpose();
        let level = |level: usize| -> Option<Result<DeviceLevel, DeviceError>> {
            let arrays = trie.arrays_below(level)?;
            let make = || {
                let first = arrays.symbols.iter().copied().min().unwrap_or(0);
                let end = arrays.symbols.iter().copied().max().map_or(0, |last| last + 1);
                let counts = arrays.children.map(|starts| starts.windows(2).map(|pair| pair[1] - pair[0]));
                Ok(DeviceLevel {
                    widest: counts.map_or(1, |counts| counts.max().unwrap_or(0) as usize),
                    children: copy(arrays.children)?,
                    symbols: Memory::of(device, arrays.symbols)?,
                    leaves: copy(arrays.leaves)?,
                    nodes: arrays.symbols.len(),
                    tokens: first..end,
                })
            };
            Some(make())
        };
        Ok(Self { levels: (0..trie.depth()).map_while(level).collect::<Result<_, _>>()? })
    }

    /// From the nodes of a level to those of the next.
    pub fn below(&self, level: usize) -> Option<&DeviceLevel> {
        self.levels.get(level)
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let of = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::bytes);
        self.levels.iter().map(|l| of(&l.children) + l.symbols.bytes() + of(&l.leaves)).sum()
    }
}

impl DeviceLevel {
    /// Most children that this number of nodes can have.
    pub fn most_children(&self, nodes: usize) -> usize {
        self.nodes.min(nodes.saturating_mul(self.widest))
    }

    /// Addresses of children, symbols and leaves, null where there are none.
    pub(super) fn addresses(&self) -> [u64; 3] {
        let of = |memory: &Option<Memory>| memory.as_ref().map_or(0, Memory::address);
        [of(&self.children), self.symbols.address(), of(&self.leaves)]
    }
}

/// `Filter` of kernels/catalog.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct FilterAddresses {
    words: u64,
    ranks: u64,
    list: u64,
    list_length: u32,
    kind: u32,
}

const ALL: u32 = 0;
const BITS: u32 = 1;
const LIST: u32 = 2;

/// Which leaves a request allows.
#[derive(Debug)]
pub struct DeviceFilter {
    addresses: FilterAddresses,
    _memory: Vec<Memory>,
}

impl DeviceFilter {
    /// Copies the filter of a request.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn new(device: &Arc<dyn Device>, filter: &Filter) -> Result<Self, DeviceError> {
        let mut memory = Vec::new();
        let mut addresses = FilterAddresses::default();
        let list = match filter.leaf_arrays() {
            SetArrays::All { removed } => {
                addresses.kind = ALL;
                removed
            }
            SetArrays::Bits { words, ranks, removed } => {
                addresses.kind = BITS;
                memory.push(Memory::of(device, words)?);
                addresses.words = memory[0].address();
                memory.push(Memory::of(device, ranks)?);
                addresses.ranks = memory[1].address();
                removed
            }
            SetArrays::Listed { list } => {
                addresses.kind = LIST;
                list
            }
        };
        if !list.is_empty() {
            let copied = Memory::of(device, list)?;
            (addresses.list, addresses.list_length) = (copied.address(), list.len() as u32);
            memory.push(copied);
        }
        Ok(Self { addresses, _memory: memory })
    }

    pub(super) fn addresses(&self) -> FilterAddresses {
        self.addresses
    }
}
