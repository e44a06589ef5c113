//! Panels of 32 values in four AVX2 registers.
//!
//! A kernel takes `C` of them, from the register `FIRST` on.

use std::arch::x86_64::{
    __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
};

use crate::cpu::tile::PANEL;

/// Values of a register.
pub(in crate::cpu::linear) const LANES: usize = 8;
/// Registers of a panel.
pub(in crate::cpu::linear) const REGISTERS: usize = PANEL / LANES;

/// Reads columns of a panel.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu::linear) fn load<const C: usize, const FIRST: usize>(values: &[f32; PANEL]) -> [__m256; C] {
    let values = values.as_chunks::<LANES>().0;
    let mut columns = [_mm256_setzero_ps(); C];
    for (column, register) in columns.iter_mut().enumerate() {
        // SAFETY: 8 values are read from 8 values; no alignment is asked for.
        *register = unsafe { _mm256_loadu_ps(values[FIRST + column].as_ptr()) };
    }
    columns
}

/// Writes columns of the sums of a tile.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu::linear) fn store<const C: usize, const FIRST: usize>(
    registers: &[[__m256; C]],
    sums: &mut [[f32; PANEL]],
) {
    for (sums, registers) in sums.iter_mut().zip(registers) {
        let sums = sums.as_chunks_mut::<LANES>().0;
        for (column, register) in registers.iter().enumerate() {
            // SAFETY: 8 values are written to 8 values; no alignment is asked for.
            unsafe { _mm256_storeu_ps(sums[FIRST + column].as_mut_ptr(), *register) };
        }
    }
}

/// Adds the products of one input of each row and its weights.
///
/// Of inputs and weights, the fewer stay in registers while the others come one by one: so they and the
/// sums fit into 16.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(in crate::cpu::linear) fn add_products<const H: usize, const C: usize>(
    sums: &mut [[__m256; C]; H],
    x: impl Fn(usize) -> f32,
    weights: [__m256; C],
) {
    if H < C {
        let mut inputs = [_mm256_setzero_ps(); H];
        for (row, input) in inputs.iter_mut().enumerate() {
            *input = _mm256_set1_ps(x(row));
        }
        for column in 0..C {
            for row in 0..H {
                sums[row][column] = _mm256_fmadd_ps(inputs[row], weights[column], sums[row][column]);
            }
        }
    } else {
        for (row, sums) in sums.iter_mut().enumerate() {
            let input = _mm256_set1_ps(x(row));
            for column in 0..C {
                sums[column] = _mm256_fmadd_ps(input, weights[column], sums[column]);
            }
        }
    }
}
