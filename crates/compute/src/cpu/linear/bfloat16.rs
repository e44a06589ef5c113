//! Weights and activations in bfloat16, sums in single precision.
//!
//! The order of operations is that of the instruction `vdpbf16ps` (Intel's manual). For each pair of
//! inputs, the odd one comes first, then the even one, each a fused multiply-add in single precision. A
//! kernel that widens to single precision and does the same two multiply-adds gives the same bits, on
//! any machine. (The instruction also flushes sums below 2^-126 to zero; inputs that small are flushed
//! when they are packed, for both kernels.)
//!
//! ```text
//! panel  [pair][PANEL]               two weights a word, the even input in the low half
//! tile   [pair][height]              the same                   for `Bf16Kernel::Dot`
//!        as in `single`              in single precision        for `Bf16Kernel::Widened`
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::rows::{as_floats, as_floats_mut};
use super::{MAX_HEIGHT, single};
use crate::cpu::fused::add_scaled;
use crate::cpu::isa::{Isa, Level, per_isa};
use crate::cpu::stored::nearest;
use crate::cpu::tile::PANEL;

/// How products of bfloat16 are computed. The bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bf16Kernel {
    /// Dot products of pairs, in hardware. Only for instruction sets that have them.
    Dot,
    /// Widened to single precision.
    Widened,
}

impl Bf16Kernel {
    /// The faster kernel of this machine, found once by trying both. Some processors run `vdpbf16ps` at
    /// the full rate of their multiply-adds. On others it is slower than widening (measured on Sapphire
    /// Rapids: about half as fast).
    pub(crate) fn fastest(isa: Isa) -> Self {
        static FASTEST: OnceLock<Bf16Kernel> = OnceLock::new();
        if isa.level() < Level::Avx512Bf16 {
            return Self::Widened;
        }
        *FASTEST.get_or_init(|| {
            let time = |kernel| (0..20).map(|_| Self::time(kernel, isa)).min().unwrap_or(Duration::MAX);
            if time(Self::Dot) < time(Self::Widened) { Self::Dot } else { Self::Widened }
        })
    }

    fn time(kernel: Self, isa: Isa) -> Duration {
        const INPUTS: usize = 512;
        let words = vec![0; MAX_HEIGHT * words_per_row(kernel, INPUTS)];
        let panel = vec![0; PANEL * INPUTS / 2];
        let mut sums = [[0.0; PANEL]; MAX_HEIGHT];
        let start = Instant::now();
        multiply(kernel, isa, &words, &panel, &mut sums);
        std::hint::black_box(&sums);
        start.elapsed()
    }
}

/// A packed matrix.
#[derive(Debug)]
pub(super) struct Panels {
    /// Words of a panel.
    size: usize,
    words: Vec<u32>,
}

impl Panels {
    pub(super) fn pack(rows: &[Option<&[f32]>], inputs: usize) -> Self {
        let size = single::words_per_row(inputs) / 2 * PANEL;
        let mut words = vec![0; rows.len() / PANEL * size];
        for (panel, rows) in words.chunks_exact_mut(size).zip(rows.chunks_exact(PANEL)) {
            for (column, row) in rows.iter().enumerate() {
                let pairs = row.unwrap_or_default().chunks(2);
                for (place, pair) in panel[column..].iter_mut().step_by(PANEL).zip(pairs) {
                    *place = pair_of(pair);
                }
            }
        }
        Self { size, words }
    }

    pub(super) fn count(&self) -> usize {
        self.words.len() / self.size
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.words.len()
    }

    pub(super) fn panel(&self, index: usize) -> &[u32] {
        &self.words[index * self.size..][..self.size]
    }
}

/// Bits of the nearest bfloat16 in the upper half of a word, ties to even. Numbers below the normal
/// range become zero. NaN stays NaN.
#[inline(always)]
fn round(x: f32) -> u32 {
    let rounded = nearest(x);
    // The exponent field is zero.
    if rounded & 0x7F80_0000 == 0 { 0 } else { rounded }
}

fn pair_of(pair: &[f32]) -> u32 {
    round(pair[0]) >> 16 | pair.get(1).map_or(0, |&odd| round(odd))
}

#[inline(always)]
fn odd(word: u32) -> f32 {
    f32::from_bits(word & 0xFFFF_0000)
}

#[inline(always)]
fn even(word: u32) -> f32 {
    f32::from_bits(word << 16)
}

/// Words that a row of a tile takes.
pub(super) fn words_per_row(kernel: Bf16Kernel, inputs: usize) -> usize {
    match kernel {
        Bf16Kernel::Dot => single::words_per_row(inputs) / 2,
        Bf16Kernel::Widened => single::words_per_row(inputs),
    }
}

/// Writes rows `[height, inputs]` as a tile.
pub(super) fn pack_tile(kernel: Bf16Kernel, isa: Isa, x: &[f32], inputs: usize, words: &mut [u32]) {
    match kernel {
        Bf16Kernel::Dot => pack_pairs(isa, x, inputs, words),
        Bf16Kernel::Widened => pack_widened(isa, x, inputs, words),
    }
}

per_isa! {
    fn pack_widened(x: &[f32], inputs: usize, words: &mut [u32]) = pack_widened_body
}

#[inline(always)]
fn pack_widened_body<const R: usize>(x: &[f32], inputs: usize, words: &mut [u32]) {
    single::pack_tile(x, inputs, as_floats_mut(words), |value| f32::from_bits(round(value)));
}

per_isa! {
    fn pack_pairs(x: &[f32], inputs: usize, words: &mut [u32]) = pack_pairs_body
}

#[inline(always)]
fn pack_pairs_body<const R: usize>(x: &[f32], inputs: usize, words: &mut [u32]) {
    let height = x.len() / inputs;
    words.fill(0);
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        for (place, pair) in words[row..].iter_mut().step_by(height).zip(x.chunks(2)) {
            *place = pair_of(pair);
        }
    }
}

/// Products of a tile and a panel.
pub(super) fn multiply(kernel: Bf16Kernel, isa: Isa, tile: &[u32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    match kernel {
        Bf16Kernel::Widened => multiply_widened(isa, as_floats(tile), panel, sums),
        #[cfg(target_arch = "x86_64")]
        Bf16Kernel::Dot => {
            assert!(isa.level() >= Level::Avx512Bf16, "an instruction set with bfloat16");
            // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
            unsafe { avx512::multiply_pairs(tile, panel, sums) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Bf16Kernel::Dot => unreachable!("no machine of this kind has the instruction"),
    }
}

fn multiply_widened(isa: Isa, tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Portable => {}
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        Level::Avx2 => return unsafe { avx2::multiply(tile, panel, sums) },
        // SAFETY: as above.
        _ => return unsafe { avx512::multiply_widened(tile, panel, sums) },
    }
    let _ = isa;
    multiply_portable(tile, panel, sums);
}

fn multiply_portable(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => run_widened::<1>(tile, panel, sums),
        2 => run_widened::<2>(tile, panel, sums),
        height => unreachable!("a tile of {height} rows"),
    }
}

fn run_widened<const H: usize>(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    let mut registers = [[0.0f32; PANEL]; H];
    let tile = tile.as_chunks::<4>().0.as_chunks::<H>().0;
    for (x, words) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<2>().0) {
        for pair in 0..2 {
            let (odd, even) = (words[pair].map(odd), words[pair].map(even));
            for row in 0..H {
                add_scaled(x[row][2 * pair + 1], &odd, &mut registers[row]);
                add_scaled(x[row][2 * pair], &even, &mut registers[row]);
            }
        }
    }
    sums[..H].copy_from_slice(&registers);
}
