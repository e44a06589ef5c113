//! The kernel for AVX-512, with explicit instructions. On its own, the compiler vectorises some heights
//! along the rows, with gathers, thirty times slower.

use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};

use super::{PANEL, QUAD};
use crate::cpu::linear::for_height;
use crate::cpu::linear::prefetch::Prefetch;
use crate::cpu::linear::registers::avx512::{load, store, zero};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
pub(super) fn multiply(tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    for_height!(sums.len(), run, tile, panel, ahead, sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
#[inline]
fn run<const H: usize>(tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    let mut registers = [zero(); H];
    let tile = tile.as_chunks::<QUAD>().0.as_chunks::<H>().0;
    let mut ahead = Prefetch::evenly(ahead, tile.len());
    for (x, weights) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<QUAD>().0) {
        ahead.step();
        for input in 0..QUAD {
            let weights = load(&weights[input]);
            for row in 0..H {
                let x = _mm512_set1_ps(x[row][input]);
                for half in 0..2 {
                    registers[row][half] = _mm512_fmadd_ps(x, weights[half], registers[row][half]);
                }
            }
        }
    }
    store(&registers, sums);
}
