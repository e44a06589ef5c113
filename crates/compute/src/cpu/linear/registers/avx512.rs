//! Panels of 32 values in two AVX-512 registers.

use std::arch::x86_64::{__m512, _mm512_loadu_ps, _mm512_setzero_ps, _mm512_storeu_ps};

use crate::cpu::tile::PANEL;

/// A row of a panel.
pub(in crate::cpu::linear) type Pair = [__m512; 2];

/// Two registers of zeros.
#[target_feature(enable = "avx512f")]
#[inline]
pub(in crate::cpu::linear) fn zero() -> Pair {
    [_mm512_setzero_ps(); 2]
}

/// Reads a row of a panel.
#[target_feature(enable = "avx512f")]
#[inline]
pub(in crate::cpu::linear) fn load(values: &[f32; PANEL]) -> Pair {
    let halves = values.as_chunks::<16>().0;
    // SAFETY: 16 values are read from 16 values; no alignment is asked for.
    [0, 1].map(|half| unsafe { _mm512_loadu_ps(halves[half].as_ptr()) })
}

/// Writes the sums of a tile.
#[target_feature(enable = "avx512f")]
#[inline]
pub(in crate::cpu::linear) fn store(registers: &[Pair], sums: &mut [[f32; PANEL]]) {
    for (sums, registers) in sums.iter_mut().zip(registers) {
        for (sums, register) in sums.as_chunks_mut::<16>().0.iter_mut().zip(registers) {
            // SAFETY: 16 values are written to 16 values; no alignment is asked for.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *register) };
        }
    }
}
