//! Kernels for AVX-512, with dot products of bytes and without.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_madd_epi16, _mm512_mul_ps, _mm512_set1_epi16,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_srli_epi16,
};

use super::{Codes, Factor, PANEL, Panel, QUADS, Tile};
use crate::cpu::linear::for_height;
use crate::cpu::linear::prefetch::Prefetch;
use crate::cpu::linear::registers::avx512::{Pair, load, store, zero};

/// With `vpdpbusd`: four products of bytes and their sum per lane.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn multiply_bytes(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    for_height!(sums.len(), run_bytes, tile, panel, ahead, sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn run_bytes<const H: usize>(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    let mut totals = [zero(); H];
    let codes = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
    let words = tile.words.as_chunks::<QUADS>().0.as_chunks::<H>().0;
    let rows = words.iter().zip(tile.factors.as_chunks::<H>().0);
    let mut ahead = Prefetch::evenly(ahead, panel.scales.len());
    for ((codes, scales), (words, factors)) in codes.zip(rows) {
        ahead.step();
        let mut products = offsets(factors);
        for (quad, codes) in codes.iter().enumerate() {
            let weights = load_codes(codes);
            for row in 0..H {
                let x = _mm512_set1_epi32(words[row][quad].cast_signed());
                for half in 0..2 {
                    products[row][half] = _mm512_dpbusd_epi32(products[row][half], weights[half], x);
                }
            }
        }
        add_block(&mut totals, &products, factors, load(scales));
    }
    store(&totals, sums);
}

/// Without: products of numbers of 16 bits, and sums of two per lane.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) fn multiply_pairs(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    for_height!(sums.len(), run_pairs, tile, panel, ahead, sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
fn run_pairs<const H: usize>(tile: Tile<'_>, panel: Panel<'_>, ahead: &[Codes], sums: &mut [[f32; PANEL]]) {
    let mut totals = [zero(); H];
    let low = _mm512_set1_epi16(0xFF);
    let codes = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
    let words = tile.words.as_chunks::<QUADS>().0.as_chunks::<2>().0.as_chunks::<H>().0;
    let rows = words.iter().zip(tile.factors.as_chunks::<H>().0);
    let mut ahead = Prefetch::evenly(ahead, panel.scales.len());
    for ((codes, scales), (words, factors)) in codes.zip(rows) {
        ahead.step();
        let mut products = offsets(factors);
        for (quad, codes) in codes.iter().enumerate() {
            let codes = load_codes(codes);
            let even = codes.map(|codes| _mm512_and_si512(codes, low));
            let odd = codes.map(|codes| _mm512_srli_epi16::<8>(codes));
            for (weights, place) in [(even, 0), (odd, 1)] {
                for row in 0..H {
                    let x = _mm512_set1_epi32(words[row][place][quad].cast_signed());
                    for half in 0..2 {
                        let product = _mm512_madd_epi16(x, weights[half]);
                        products[row][half] = _mm512_add_epi32(products[row][half], product);
                    }
                }
            }
        }
        add_block(&mut totals, &products, factors, load(scales));
    }
    store(&totals, sums);
}

#[target_feature(enable = "avx512f")]
#[inline]
fn offsets<const H: usize>(factors: &[Factor; H]) -> [[__m512i; 2]; H] {
    let mut products = [[_mm512_setzero_si512(); 2]; H];
    for row in 0..H {
        products[row] = [_mm512_set1_epi32(factors[row].offset); 2];
    }
    products
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add_block<const H: usize>(
    totals: &mut [Pair; H],
    products: &[[__m512i; 2]; H],
    factors: &[Factor; H],
    scales: [__m512; 2],
) {
    for row in 0..H {
        let scale = _mm512_set1_ps(factors[row].scale);
        for half in 0..2 {
            let product = _mm512_cvtepi32_ps(products[row][half]);
            let scale = _mm512_mul_ps(scale, scales[half]);
            totals[row][half] = _mm512_fmadd_ps(product, scale, totals[row][half]);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_codes(codes: &Codes) -> [__m512i; 2] {
    let halves = codes.as_chunks::<16>().0;
    // SAFETY: each half is 16 * 4 bytes long, what a register holds; no alignment is asked for.
    [0, 1].map(|half| unsafe { _mm512_loadu_si512(halves[half].as_ptr().cast()) })
}
