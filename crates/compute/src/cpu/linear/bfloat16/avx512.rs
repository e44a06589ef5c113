//! The kernels for AVX-512.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
};

use super::PANEL;
use crate::cpu::linear::for_height;
use crate::cpu::linear::registers::avx512::{store, zero};

/// Products of a tile and a panel with `vdpbf16ps`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn multiply_pairs(tile: &[u32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    for_height!(sums.len(), run_pairs, tile, panel, sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
fn run_pairs<const H: usize>(tile: &[u32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    let mut registers = [zero(); H];
    for (x, words) in tile.as_chunks::<H>().0.iter().zip(panel.as_chunks::<PANEL>().0) {
        let weights = load(words);
        for row in 0..H {
            let x = pairs(_mm512_set1_epi32(x[row].cast_signed()));
            for half in 0..2 {
                registers[row][half] = _mm512_dpbf16_ps(registers[row][half], pairs(weights[half]), x);
            }
        }
    }
    store(&registers, sums);
}

/// With multiply-adds in single precision.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) fn multiply_widened(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    for_height!(sums.len(), run_widened, tile, panel, sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
fn run_widened<const H: usize>(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    let mut registers = [zero(); H];
    let upper = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
    let tile = tile.as_chunks::<4>().0.as_chunks::<H>().0;
    for (x, words) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<2>().0) {
        for pair in 0..2 {
            let words = load(&words[pair]);
            let odd = words.map(|words| _mm512_castsi512_ps(_mm512_and_si512(words, upper)));
            let even = words.map(|words| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)));
            for (weights, input) in [(odd, 2 * pair + 1), (even, 2 * pair)] {
                for row in 0..H {
                    let x = _mm512_set1_ps(x[row][input]);
                    for half in 0..2 {
                        registers[row][half] = _mm512_fmadd_ps(x, weights[half], registers[row][half]);
                    }
                }
            }
        }
    }
    store(&registers, sums);
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(words: &[u32; PANEL]) -> [__m512i; 2] {
    let halves = words.as_chunks::<16>().0;
    // SAFETY: 16 words are read from 16 words; no alignment is asked for.
    [0, 1].map(|half| unsafe { _mm512_loadu_si512(halves[half].as_ptr().cast()) })
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn pairs(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes, and every bit pattern is a value of either.
    unsafe { std::mem::transmute(words) }
}
