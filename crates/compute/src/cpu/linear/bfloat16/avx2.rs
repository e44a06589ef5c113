//! The kernel for AVX2: words are widened in registers, once for all rows of a tile.
//!
//! As in single precision, except that packed words and their widened halves need registers too. So one
//! or two rows meet a whole panel, and at most five rows meet half of it.

use std::arch::x86_64::{
    __m256i, _mm256_and_si256, _mm256_castsi256_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_slli_epi32,
};

use super::PANEL;
use crate::cpu::linear::registers::avx2::{LANES, REGISTERS, add_products, store};

#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => run::<1, REGISTERS, 0>(tile, panel, sums),
        2 => run::<2, REGISTERS, 0>(tile, panel, sums),
        3 => halves::<3>(tile, panel, sums),
        4 => halves::<4>(tile, panel, sums),
        5 => halves::<5>(tile, panel, sums),
        height => unreachable!("a tile of {height} rows"),
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn halves<const H: usize>(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    run::<H, { REGISTERS / 2 }, 0>(tile, panel, sums);
    run::<H, { REGISTERS / 2 }, { REGISTERS / 2 }>(tile, panel, sums);
}

/// `H` rows and `C` registers of a panel from the register `FIRST` on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn run<const H: usize, const C: usize, const FIRST: usize>(
    tile: &[f32],
    panel: &[u32],
    sums: &mut [[f32; PANEL]],
) {
    let mut registers = [[_mm256_setzero_ps(); C]; H];
    let upper = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let tile = tile.as_chunks::<4>().0.as_chunks::<H>().0;
    for (x, words) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<2>().0) {
        for pair in 0..2 {
            let words = load::<C, FIRST>(&words[pair]);
            let (mut odd, mut even) = ([_mm256_setzero_ps(); C], [_mm256_setzero_ps(); C]);
            for column in 0..C {
                odd[column] = _mm256_castsi256_ps(_mm256_and_si256(words[column], upper));
                even[column] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words[column]));
            }
            add_products(&mut registers, |row| x[row][2 * pair + 1], odd);
            add_products(&mut registers, |row| x[row][2 * pair], even);
        }
    }
    store::<C, FIRST>(&registers, sums);
}

#[target_feature(enable = "avx2")]
#[inline]
fn load<const C: usize, const FIRST: usize>(words: &[u32; PANEL]) -> [__m256i; C] {
    let words = words.as_chunks::<LANES>().0;
    let mut columns = [_mm256_setzero_si256(); C];
    for (column, register) in columns.iter_mut().enumerate() {
        // SAFETY: 8 words are read from 8 words; no alignment is asked for.
        *register = unsafe { _mm256_loadu_si256(words[FIRST + column].as_ptr().cast()) };
    }
    columns
}
