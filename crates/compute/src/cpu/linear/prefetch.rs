//! Weights that are needed soon, fetched into the cache while others are multiplied.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Fetches a part of the values with each step, so that the requests do not queue up.
pub(super) struct Prefetch<'a, T> {
    parts: std::slice::Chunks<'a, T>,
}

impl<'a, T> Prefetch<'a, T> {
    /// Cuts the values into parts, one for each of `steps` steps. A part is whole cache lines of values,
    /// or whole values that fill lines.
    #[inline(always)]
    pub(super) fn evenly(values: &'a [T], steps: usize) -> Self {
        let size = values.len().div_ceil(steps.max(1)).next_multiple_of(Self::PER_LINE).max(Self::PER_LINE);
        Self { parts: values.chunks(size) }
    }

    /// Values of a line.
    const PER_LINE: usize = if size_of::<T>() < LINE { LINE / size_of::<T>() } else { 1 };

    /// Fetches the next part.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        let part = self.parts.next().unwrap_or_default();
        for line in (0..size_of_val(part)).step_by(LINE) {
            // SAFETY: the address lies within the part; fetching has no effect but on time.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(part.as_ptr().cast::<i8>().add(line)) };
        }
    }
}
