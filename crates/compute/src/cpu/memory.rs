//! Large zeroed memory, taken from the system at once and in large pages where it has them.
//!
//! Half a gigabyte of KV pages in system pages of 4 KiB is 131,072 page faults at start-up and a
//! translation miss at every other access; in pages of 2 MiB it is 256. The request is a hint: a system
//! without large pages gives small ones.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Distance at which memory is touched; no system page is smaller.
const TOUCH: usize = 4096;

/// Zeroed values in large pages.
#[derive(Debug)]
pub(crate) struct Memory<T> {
    /// None when there are no values: a mapping cannot be empty.
    map: Option<MmapMut>,
    _values: PhantomData<T>,
}

impl<T> Memory<T> {
    /// Takes memory for `len` values and touches all of it, so that it is there when it is needed.
    ///
    /// # Errors
    ///
    /// When the size overflows or the system does not give it.
    pub(crate) fn zeroed(len: usize) -> std::io::Result<Self> {
        if len == 0 {
            return Ok(Self { map: None, _values: PhantomData });
        }
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| std::io::Error::other("too large"))?;
        let mut map = MmapMut::map_anon(bytes)?;
        #[cfg(target_os = "linux")]
        {
            // A hint: what happens without it is right, too.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        map.iter_mut().step_by(TOUCH).for_each(|byte| {
            // The write changes nothing, so it has to be hidden from the optimiser.
            *std::hint::black_box(byte) = 0;
        });
        Ok(Self { map: Some(map), _values: PhantomData })
    }
}

impl<T: Pod> Deref for Memory<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        self.map.as_deref().map_or(&[], bytemuck::cast_slice)
    }
}

impl<T: Pod> DerefMut for Memory<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        self.map.as_deref_mut().map_or(&mut [], bytemuck::cast_slice_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_and_as_large_as_asked() {
        for len in [0, 1, 3 << 20] {
            let mut memory = Memory::<f32>::zeroed(len).unwrap();
            assert_eq!(memory.len(), len);
            assert!(memory.iter().all(|&value| value == 0.0));
            memory.fill(1.0);
            let halves = Memory::<u16>::zeroed(len).unwrap();
            assert_eq!((halves.len(), size_of_val(&*halves)), (len, 2 * len));
        }
        assert!(Memory::<f32>::zeroed(usize::MAX).is_err());
    }
}
