//! A split of `0..n` into consecutive ranges: the children of the nodes of a level, the leaves of
//! the nodes of a level, the items of the leaves.
//!
//! Deep in a trie nearly every node owns exactly one leaf. A partition made of single elements only
//! is stored as its length, which is what keeps 20 million SIDs of depth 8 within 2 GB.

use std::ops::Range;

use crate::narrow;

/// Consecutive, non-empty ranges that cover `0..total`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Partition {
    /// Range `i` is `i..i + 1`; the number of ranges.
    Singletons(u32),
    /// Range `i` is `offsets[i]..offsets[i + 1]`.
    Offsets(Box<[u32]>),
}

impl Partition {
    /// Number of ranges.
    pub(crate) fn len(&self) -> u32 {
        match self {
            Self::Singletons(len) => *len,
            Self::Offsets(offsets) => narrow(offsets.len() - 1),
        }
    }

    pub(crate) fn is_singletons(&self) -> bool {
        matches!(self, Self::Singletons(_))
    }

    /// The starts of all ranges, and the end of the last. `None` where range `i` is `i..i + 1`.
    pub(crate) fn offsets(&self) -> Option<&[u32]> {
        match self {
            Self::Singletons(_) => None,
            Self::Offsets(offsets) => Some(offsets),
        }
    }

    /// The elements of range `i`.
    #[inline]
    pub(crate) fn range(&self, i: u32) -> Range<u32> {
        match self {
            Self::Singletons(_) => i..i + 1,
            Self::Offsets(offsets) => offsets[i as usize]..offsets[i as usize + 1],
        }
    }

    /// The range that holds `element`.
    pub(crate) fn find(&self, element: u32) -> u32 {
        match self {
            Self::Singletons(_) => element,
            // The first offset is 0, so at least one offset is not greater than the element.
            Self::Offsets(offsets) => narrow(offsets.partition_point(|&start| start <= element) - 1),
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        match self {
            Self::Singletons(_) => 0,
            Self::Offsets(offsets) => size_of_val::<[u32]>(offsets),
        }
    }
}

/// Builds a [`Partition`] from the starts of its ranges, in order.
#[derive(Debug, Default)]
pub(crate) struct PartitionBuilder {
    len: u32,
    /// Starts of the ranges so far; left empty for as long as range `i` starts at `i`.
    starts: Vec<u32>,
}

impl PartitionBuilder {
    /// Begins the next range at `start`, which is greater than the previous start (0 for the first).
    pub(crate) fn begin(&mut self, start: u32) {
        if !self.starts.is_empty() || start != self.len {
            self.write_out();
            self.starts.push(start);
        }
        self.len += 1;
    }

    /// Number of ranges begun.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Ends the last range at `total`.
    pub(crate) fn finish(mut self, total: u32) -> Partition {
        if self.starts.is_empty() && self.len == total {
            return Partition::Singletons(total);
        }
        self.write_out();
        self.starts.push(total);
        Partition::Offsets(self.starts.into_boxed_slice())
    }

    fn write_out(&mut self) {
        if self.starts.is_empty() {
            self.starts.extend(0..self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition(starts: &[u32], total: u32) -> Partition {
        let mut builder = PartitionBuilder::default();
        starts.iter().for_each(|&start| builder.begin(start));
        builder.finish(total)
    }

    #[test]
    fn single_elements_need_no_memory() {
        let identity = partition(&[0, 1, 2], 3);
        assert_eq!(identity, Partition::Singletons(3));
        assert_eq!((identity.range(2), identity.find(2), identity.memory_bytes()), (2..3, 2, 0));
    }

    #[test]
    fn ranges_of_any_length() {
        for (starts, total) in
            [(vec![0], 5), (vec![0, 1, 2], 4), (vec![0, 1, 4, 5], 6), (vec![0, 3, 4], 5), (vec![0, 2], 3)]
        {
            let split = partition(&starts, total);
            assert_eq!(split.len() as usize, starts.len());
            let ends = starts.iter().skip(1).copied().chain([total]);
            for (i, (&start, end)) in starts.iter().zip(ends).enumerate() {
                assert_eq!(split.range(i as u32), start..end);
                assert!((start..end).all(|element| split.find(element) == i as u32));
            }
        }
    }
}
