//! Quantised activations, as the kernels read them.

use super::{BLOCK, Factor, QUAD, QUADS, quantise};
use crate::cpu::isa::{Isa, Level};

/// How a tile holds quantised activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Four of 8 bits a word.
    Bytes,
    /// Two of 16 bits a word: of each quad the even ones, and behind those of the block the odd ones.
    Pairs,
}

impl Layout {
    /// What the kernel of an instruction set reads.
    fn of(isa: Isa) -> Self {
        match isa.level() {
            Level::Avx2 | Level::Avx512 => Self::Pairs,
            Level::Portable | Level::Avx512Vnni | Level::Avx512Bf16 => Self::Bytes,
        }
    }

    fn words_per_block(self) -> usize {
        match self {
            Self::Bytes => QUADS,
            Self::Pairs => 2 * QUADS,
        }
    }
}

/// Words that a row of a tile takes.
pub(in crate::cpu::linear) fn words_per_row(isa: Isa, inputs: usize) -> usize {
    super::blocks(inputs) * Layout::of(isa).words_per_block()
}

/// Quantises rows `[height, inputs]` into a tile.
pub(in crate::cpu::linear) fn pack_tile(
    isa: Isa,
    x: &[f32],
    inputs: usize,
    words: &mut [u32],
    factors: &mut [Factor],
) {
    match Layout::of(isa) {
        Layout::Bytes => pack_blocks::<QUADS>(isa, x, inputs, words, factors),
        Layout::Pairs => pack_blocks::<{ 2 * QUADS }>(isa, x, inputs, words, factors),
    }
}

/// Blocks of `W` words.
fn pack_blocks<const W: usize>(
    isa: Isa,
    x: &[f32],
    inputs: usize,
    words: &mut [u32],
    factors: &mut [Factor],
) {
    let height = x.len() / inputs;
    let words = words.as_chunks_mut::<W>().0;
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        let (full, rest) = x.as_chunks::<BLOCK>();
        let places = || (row..).step_by(height);
        for (x, place) in full.iter().zip(places()) {
            factors[place] = pack_block(isa, x, &mut words[place]);
        }
        if !rest.is_empty() {
            let mut padded = [0.0; BLOCK];
            padded[..rest.len()].copy_from_slice(rest);
            let place = row + full.len() * height;
            factors[place] = pack_block(isa, &padded, &mut words[place]);
        }
    }
}

#[inline]
fn pack_block(isa: Isa, x: &[f32; BLOCK], words: &mut [u32]) -> Factor {
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx2 {
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        return unsafe { avx2::pack_block(x, words) };
    }
    let _ = isa;
    let mut quantised = [0i8; BLOCK];
    let scale = quantise(x, &mut quantised);
    for (word, quad) in words.iter_mut().zip(quantised.as_chunks::<QUAD>().0) {
        *word = u32::from_le_bytes(quad.map(i8::cast_unsigned));
    }
    Factor::new(scale, quantised.iter().map(|&value| i32::from(value)).sum())
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! A block in four registers; `super::quantise`, spelled out: the compiler goes value by value.

    use std::arch::x86_64::*;

    use super::{BLOCK, Factor, QUADS};
    use crate::cpu::linear::registers::avx2::LANES;

    /// Fills as many words as there are: `QUADS` of bytes, or twice as many of pairs.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn pack_block(x: &[f32; BLOCK], words: &mut [u32]) -> Factor {
        let mut values = [_mm256_setzero_ps(); BLOCK / LANES];
        for (value, x) in values.iter_mut().zip(x.as_chunks::<LANES>().0) {
            // SAFETY: 8 values are read from 8 values; no alignment is asked for.
            *value = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        }
        let (largest, poison) = largest_of(&values);
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let codes = codes_of(&values, inverse);
        let (whole, rest) = words.as_chunks_mut::<QUADS>();
        if let [first, second] = whole {
            // Of each quad the first and third, and the second and fourth, with their signs.
            write(first, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(codes)));
            write(second, _mm256_srai_epi16::<8>(codes));
        } else if let [only] = whole {
            write(only, codes);
        }
        debug_assert!(rest.is_empty());
        Factor::new(largest / 127.0 + poison, sum_of(codes))
    }

    /// The largest absolute value; and zero, or not a number if a value is not finite.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn largest_of(values: &[__m256; BLOCK / LANES]) -> (f32, f32) {
        let zero = _mm256_setzero_ps();
        let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
        let (mut largest, mut poison) = (zero, zero);
        for value in values {
            largest = _mm256_max_ps(_mm256_and_ps(*value, magnitude), largest);
            poison = _mm256_fmadd_ps(*value, zero, poison);
        }
        let halves = (_mm256_castps256_ps128(largest), _mm256_extractf128_ps::<1>(largest));
        let largest = _mm_max_ps(halves.0, halves.1);
        let largest = _mm_max_ps(largest, _mm_movehl_ps(largest, largest));
        let largest = _mm_max_ss(largest, _mm_movehdup_ps(largest));
        let lost = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(poison, poison)) != 0;
        (_mm_cvtss_f32(largest), if lost { f32::NAN } else { 0.0 })
    }

    /// 32 signed bytes, in order.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn codes_of(values: &[__m256; BLOCK / LANES], inverse: f32) -> __m256i {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        let (round, inverse) = (_mm256_set1_ps(12_582_912.0), _mm256_set1_ps(inverse));
        let low = _mm256_set1_epi32(0xFF);
        let code = |index: usize| {
            let rounded = _mm256_fmadd_ps(values[index], inverse, round);
            _mm256_and_si256(_mm256_castps_si256(rounded), low)
        };
        let first = _mm256_packus_epi32(code(0), code(1));
        let second = _mm256_packus_epi32(code(2), code(3));
        // Packing goes by halves of registers, so quads come out of order.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn sum_of(codes: __m256i) -> i32 {
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
        let quads = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let sum = _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256::<1>(quads));
        let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
        _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn write(words: &mut [u32; QUADS], codes: __m256i) {
        // SAFETY: 8 words are written to 8 words; no alignment is asked for.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), codes) };
    }
}
