//! The kernel for AVX2: products of numbers of 16 bits, and sums of two per lane.
//!
//! Even and odd codes are separated in registers, once for all rows. The sums of a block stay in
//! registers. Once in 32 inputs they are added to the floating-point sums, which stay in the nearest
//! cache.

use std::arch::x86_64::{
    __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi32_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_mul_ps, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_ps,
};

use super::{Codes, Factor, PANEL, Panel, QUADS, Tile};
use crate::cpu::linear::prefetch::Prefetch;
use crate::cpu::linear::registers::avx2::{LANES, REGISTERS, load};

#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => run::<1, REGISTERS, 0>(tile, panel, ahead, sums),
        2 => halves::<2>(tile, panel, ahead, sums),
        3 => halves::<3>(tile, panel, ahead, sums),
        4 => halves::<4>(tile, panel, ahead, sums),
        height => unreachable!("a tile of {height} rows"),
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn halves<const H: usize>(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    let (first, second) = ahead.split_at(ahead.len() / 2);
    run::<H, { REGISTERS / 2 }, 0>(tile, panel, first, sums);
    run::<H, { REGISTERS / 2 }, { REGISTERS / 2 }>(tile, panel, second, sums);
}

/// `H` rows and `C` registers of a panel from the register `FIRST` on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn run<const H: usize, const C: usize, const FIRST: usize>(
    tile: Tile<'_>,
    panel: Panel<'_>,
    ahead: &[Codes],
    sums: &mut [[f32; PANEL]],
) {
    let low = _mm256_set1_epi16(0xFF);
    let codes = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
    let words = tile.words.as_chunks::<QUADS>().0.as_chunks::<2>().0.as_chunks::<H>().0;
    let rows = words.iter().zip(tile.factors.as_chunks::<H>().0);
    let mut ahead = Prefetch::evenly(ahead, panel.scales.len());
    let sums = &mut sums.as_chunks_mut::<H>().0[0];
    for row in sums.iter_mut() {
        row.as_chunks_mut::<LANES>().0[FIRST..FIRST + C].fill([0.0; LANES]);
    }
    for ((codes, scales), (words, factors)) in codes.zip(rows) {
        ahead.step();
        let mut products = [[_mm256_setzero_si256(); C]; H];
        for row in 0..H {
            products[row] = [_mm256_set1_epi32(factors[row].offset); C];
        }
        for (quad, codes) in codes.iter().enumerate() {
            let codes = load_codes::<C, FIRST>(codes);
            let (mut even, mut odd) = (codes, codes);
            for column in 0..C {
                even[column] = _mm256_and_si256(codes[column], low);
                odd[column] = _mm256_srli_epi16::<8>(codes[column]);
            }
            for (weights, place) in [(even, 0), (odd, 1)] {
                for row in 0..H {
                    let x = _mm256_set1_epi32(words[row][place][quad].cast_signed());
                    for column in 0..C {
                        let product = _mm256_madd_epi16(x, weights[column]);
                        products[row][column] = _mm256_add_epi32(products[row][column], product);
                    }
                }
            }
        }
        add_block::<H, C, FIRST>(sums, &products, factors, scales);
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_block<const H: usize, const C: usize, const FIRST: usize>(
    sums: &mut [[f32; PANEL]; H],
    products: &[[__m256i; C]; H],
    factors: &[Factor; H],
    scales: &[f32; PANEL],
) {
    let scales = load::<C, FIRST>(scales);
    for row in 0..H {
        let scale = _mm256_set1_ps(factors[row].scale);
        let sums = sums[row].as_chunks_mut::<LANES>().0;
        for column in 0..C {
            let sums = sums[FIRST + column].as_mut_ptr();
            let product = _mm256_cvtepi32_ps(products[row][column]);
            let scale = _mm256_mul_ps(scale, scales[column]);
            // SAFETY: 8 values are read from 8 values, and written there; no alignment is asked for.
            unsafe { _mm256_storeu_ps(sums, _mm256_fmadd_ps(product, scale, _mm256_loadu_ps(sums))) };
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_codes<const C: usize, const FIRST: usize>(codes: &Codes) -> [__m256i; C] {
    let codes = codes.as_chunks::<LANES>().0;
    let mut columns = [_mm256_setzero_si256(); C];
    for (column, register) in columns.iter_mut().enumerate() {
        // SAFETY: 8 * 4 bytes are read from 8 * 4 bytes; no alignment is asked for.
        *register = unsafe { _mm256_loadu_si256(codes[FIRST + column].as_ptr().cast()) };
    }
    columns
}
