//! The kernel for AVX2, spelled out: left to itself, the compiler shuffles rows into registers and spills.
//!
//! There are 16 registers of 8 values. Two multiply-adds begin in each cycle, and each takes four or
//! five cycles: so ten or more sums must be in progress. Up to three rows meet a whole panel at once.
//! More rows meet one half of it after the other, which leaves registers for six rows.

use std::arch::x86_64::_mm256_setzero_ps;

use super::{PANEL, QUAD};
use crate::cpu::linear::prefetch::Prefetch;
use crate::cpu::linear::registers::avx2::{REGISTERS, add_products, load, store};

#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply(tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => whole::<1>(tile, panel, ahead, sums),
        2 => whole::<2>(tile, panel, ahead, sums),
        3 => whole::<3>(tile, panel, ahead, sums),
        4 => halves::<4>(tile, panel, ahead, sums),
        5 => halves::<5>(tile, panel, ahead, sums),
        6 => halves::<6>(tile, panel, ahead, sums),
        height => unreachable!("a tile of {height} rows"),
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn whole<const H: usize>(tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    run::<H, REGISTERS, 0>(tile, panel, ahead, sums);
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn halves<const H: usize>(tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    let (first, second) = ahead.split_at(ahead.len() / 2);
    run::<H, { REGISTERS / 2 }, 0>(tile, panel, first, sums);
    run::<H, { REGISTERS / 2 }, { REGISTERS / 2 }>(tile, panel, second, sums);
}

/// `H` rows and `C` registers of a panel from the register `FIRST` on.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn run<const H: usize, const C: usize, const FIRST: usize>(
    tile: &[f32],
    panel: &[f32],
    ahead: &[f32],
    sums: &mut [[f32; PANEL]],
) {
    let mut registers = [[_mm256_setzero_ps(); C]; H];
    let tile = tile.as_chunks::<QUAD>().0.as_chunks::<H>().0;
    let mut ahead = Prefetch::evenly(ahead, tile.len());
    for (x, weights) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<QUAD>().0) {
        ahead.step();
        for input in 0..QUAD {
            add_products(&mut registers, |row| x[row][input], load::<C, FIRST>(&weights[input]));
        }
    }
    store::<C, FIRST>(&registers, sums);
}
