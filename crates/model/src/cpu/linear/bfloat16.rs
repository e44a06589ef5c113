//! Weights and activations in bfloat16, sums in single precision.
//!
//! The order of operations is that of the instruction `vdpbf16ps` (Intel's manual): for each pair of inputs, first the odd
//! one, then the even one, each a fused multiply-add in single precision. A kernel that widens to single precision and
//! does the same two multiply-adds gives the same bits, on any machine. (The instruction also flushes sums below 2^-126 to
//! zero; inputs that small are flushed when they are packed, for both kernels.)
//!
//! ```text
//! panel  [pair][PANEL]               two weights a word, the even input in the low half
//! tile   [pair][height]              the same                   for `Bf16Kernel::Dot`
//!        as in `single`              in single precision        for `Bf16Kernel::Widened`
//! ```

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::rows::{as_floats, as_floats_mut, for_height};
use super::{MAX_HEIGHT, single};
use crate::cpu::isa::{Isa, Level, per_isa};
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
    /// The faster kernel of this machine, found by trying both, once. Some processors run `vdpbf16ps` at the full rate of
    /// their multiply-adds; on others it is slower than widening (measured on Sapphire Rapids: about half as fast).
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

/// Bits of the nearest bfloat16 in the upper half of a word, ties to even; zero for what is below the normal range. What is
/// not a number stays none.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
    let quiet = (bits | 0x0040_0000) & 0xFFFF_0000;
    let rounded = if bits & 0x7FFF_FFFF > 0x7F80_0000 { quiet } else { nearest };
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
            unsafe { dot::multiply(tile, panel, sums) }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Bf16Kernel::Dot => unreachable!("no machine of this kind has the instruction"),
    }
}

per_isa! {
    fn multiply_widened(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) = multiply_widened_body
}

#[inline(always)]
fn multiply_widened_body<const R: usize>(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    for_height!(R, sums.len(), run_widened, tile, panel, sums)
}

/// Adds the products of a pair of inputs, given as (odd, even) for each row.
#[inline(always)]
fn add_pair<const H: usize>(
    registers: &mut [[f32; PANEL]; H],
    words: &[u32; PANEL],
    x: impl Fn(usize) -> (f32, f32),
) {
    for row in 0..H {
        for column in 0..PANEL {
            registers[row][column] = x(row).0.mul_add(odd(words[column]), registers[row][column]);
        }
    }
    for row in 0..H {
        for column in 0..PANEL {
            registers[row][column] = x(row).1.mul_add(even(words[column]), registers[row][column]);
        }
    }
}

#[inline(always)]
fn run_widened<const H: usize>(tile: &[f32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
    let mut registers = [[0.0f32; PANEL]; H];
    let tile = tile.as_chunks::<4>().0.as_chunks::<H>().0;
    for (x, words) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<2>().0) {
        add_pair(&mut registers, &words[0], |row| (x[row][1], x[row][0]));
        add_pair(&mut registers, &words[1], |row| (x[row][3], x[row][2]));
    }
    sums[..H].copy_from_slice(&registers);
}

#[cfg(target_arch = "x86_64")]
mod dot {
    //! The kernel for processors with `vdpbf16ps`.

    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };

    use super::{PANEL, for_height};

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) fn multiply(tile: &[u32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
        for_height!(12, sums.len(), run, tile, panel, sums)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    fn run<const H: usize>(tile: &[u32], panel: &[u32], sums: &mut [[f32; PANEL]]) {
        let mut registers = [[_mm512_setzero_ps(); 2]; H];
        for (x, words) in tile.as_chunks::<H>().0.iter().zip(panel.as_chunks::<PANEL>().0) {
            let (low, high) = words.split_at(16);
            let weights = [pairs(load(low)), pairs(load(high))];
            for row in 0..H {
                let x = pairs(_mm512_set1_epi32(x[row].cast_signed()));
                for half in 0..2 {
                    registers[row][half] = _mm512_dpbf16_ps(registers[row][half], weights[half], x);
                }
            }
        }
        for (sums, registers) in sums.iter_mut().zip(registers) {
            for (sums, register) in sums.as_chunks_mut::<16>().0.iter_mut().zip(registers) {
                // SAFETY: 16 values are written to 16 values; no alignment is asked for.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), register) };
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(words: &[u32]) -> __m512i {
        assert_eq!(words.len(), 16, "a register of words");
        // SAFETY: 16 words are read from 16 words; no alignment is asked for.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn pairs(words: __m512i) -> __m512bh {
        // SAFETY: both types are 64 bytes, and every bit pattern is a value of either.
        unsafe { std::mem::transmute(words) }
    }
}
