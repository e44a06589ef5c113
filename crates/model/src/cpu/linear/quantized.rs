//! Weights and activations in 8-bit integers, with a scale for every block of 32 inputs.
//!
//! The scheme is ggml's `Q8_0` with the scale kept in single precision: a block of values is divided by (largest absolute
//! value / 127) and rounded to the nearest integer, ties to even. A product of two blocks is exact in 32-bit
//! integers; blocks are then added as `sum = fma(float(product), scale of x * scale of w, sum)`, from the first to the last. The
//! integers make the order within a block irrelevant, so every kernel gives the same bits.
//!
//! ```text
//! panel codes   [block][quad of inputs][PANEL][4]   weight + 128, unsigned: what `vpdpbusd` multiplies
//!       scales  [block][PANEL]
//! tile  words   [block][height][quad of inputs]     four signed activations a word
//!       factors [block][height]                     scale, and 128 times the sum of the block to take off again
//! ```

use crate::cpu::isa::{Isa, Level, per_isa};
use crate::cpu::tile::PANEL;
use crate::cpu::vector::{LANES, fold_lanes, larger};

/// Inputs that share a scale.
const BLOCK: usize = 32;
/// Inputs that a dot product of bytes takes at once.
const QUAD: usize = 4;
/// Quads of a block.
const QUADS: usize = BLOCK / QUAD;
/// Most rows of a tile: integer and floating-point sums must both stay in registers.
pub(super) const TALLEST: usize = 6;

/// Codes of four inputs of a panel's outputs.
pub(super) type Codes = [[u8; QUAD]; PANEL];

/// A packed matrix.
#[derive(Debug)]
pub(super) struct Panels {
    /// Blocks of an output.
    blocks: usize,
    codes: Vec<Codes>,
    scales: Vec<[f32; PANEL]>,
}

/// What belongs to a block of one row.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Factor {
    scale: f32,
    /// -128 times the sum of the quantised activations: makes up for the 128 added to every weight.
    offset: i32,
}

/// Packed rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile<'a> {
    pub(super) words: &'a [u32],
    pub(super) factors: &'a [Factor],
}

/// Packed weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel<'a> {
    pub(super) codes: &'a [Codes],
    scales: &'a [[f32; PANEL]],
}

impl Panels {
    pub(super) fn pack(rows: &[Option<&[f32]>], inputs: usize) -> Self {
        let blocks = blocks(inputs);
        let panels = rows.len() / PANEL;
        let mut codes = vec![[[128; QUAD]; PANEL]; panels * blocks * QUADS];
        let mut scales = vec![[0.0; PANEL]; panels * blocks];
        let mut quantised = [0i8; BLOCK];
        for (place, row) in rows.iter().enumerate() {
            let (panel, column) = (place / PANEL, place % PANEL);
            for (block, weights) in row.unwrap_or_default().chunks(BLOCK).enumerate() {
                let block = panel * blocks + block;
                scales[block][column] = quantise(weights, &mut quantised);
                for (quad, values) in quantised.as_chunks::<QUAD>().0.iter().enumerate() {
                    codes[block * QUADS + quad][column] = values.map(|value| (i16::from(value) + 128) as u8);
                }
            }
        }
        Self { blocks, codes, scales }
    }

    pub(super) fn count(&self) -> usize {
        self.scales.len() / self.blocks
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.codes[..]) + size_of_val(&self.scales[..])
    }

    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        Panel {
            codes: &self.codes[index * self.blocks * QUADS..][..self.blocks * QUADS],
            scales: &self.scales[index * self.blocks..][..self.blocks],
        }
    }
}

/// Blocks of a row.
pub(super) fn blocks(inputs: usize) -> usize {
    inputs.div_ceil(BLOCK)
}

/// Words that a row of a tile takes.
pub(super) fn words_per_row(inputs: usize) -> usize {
    blocks(inputs) * QUADS
}

/// Quantises at most a block; what is missing is zero. Returns the scale.
#[inline(always)]
fn quantise(values: &[f32], out: &mut [i8; BLOCK]) -> f32 {
    let mut block = [0.0f32; BLOCK];
    block[..values.len()].copy_from_slice(values);
    let mut largest = [0.0f32; LANES];
    let mut poison = [0.0f32; LANES];
    for half in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            largest[lane] = larger(half[lane].abs(), largest[lane]);
            poison[lane] = half[lane].mul_add(0.0, poison[lane]);
        }
    }
    let largest = fold_lanes(largest, larger);
    let poison = fold_lanes(poison, |a, b| a + b);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (out, value) in out.iter_mut().zip(block) {
        // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
        *out = value.mul_add(inverse, 12_582_912.0).to_bits() as i8;
    }
    // Not a number if a value was not finite: it must not vanish in a conversion.
    largest / 127.0 + poison
}

/// Euclidean length of what quantising a row takes away from it. Not a number if a value is not finite.
pub(crate) fn error_of(x: &[f32]) -> f64 {
    let mut quantised = [0i8; BLOCK];
    let mut squares = 0.0;
    for x in x.chunks(BLOCK) {
        let scale = f64::from(quantise(x, &mut quantised));
        for (&x, &code) in x.iter().zip(&quantised) {
            squares += (f64::from(x) - scale * f64::from(code)).powi(2);
        }
    }
    squares.sqrt()
}

per_isa! {
    /// Quantises rows `[height, inputs]` into a tile.
    pub(super) fn pack_tile(x: &[f32], inputs: usize, words: &mut [u32], factors: &mut [Factor]) = pack_tile_body
}

#[inline(always)]
fn pack_tile_body<const R: usize>(x: &[f32], inputs: usize, words: &mut [u32], factors: &mut [Factor]) {
    let height = x.len() / inputs;
    let words = words.as_chunks_mut::<QUADS>().0;
    let mut quantised = [0i8; BLOCK];
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let scale = quantise(x, &mut quantised);
            let sum: i32 = quantised.iter().map(|&value| i32::from(value)).sum();
            factors[block * height + row] = Factor { scale, offset: -128 * sum };
            let quads = quantised.as_chunks::<QUAD>().0;
            words[block * height + row] =
                std::array::from_fn(|quad| u32::from_le_bytes(quads[quad].map(i8::cast_unsigned)));
        }
    }
}

/// Products of a tile and a panel. `ahead` are codes that are needed soon: they are fetched on the way, where the kernel knows how.
pub(super) fn multiply(
    isa: Isa,
    tile: Tile<'_>,
    panel: Panel<'_>,
    ahead: &[Codes],
    sums: &mut [[f32; PANEL]],
) {
    let _ = ahead;
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        #[cfg(target_arch = "x86_64")]
        level if level >= Level::Avx512Vnni => unsafe { x86::multiply_vnni(tile, panel, ahead, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        level if level >= Level::Avx2 => unsafe { x86::multiply_avx2(tile, panel, sums) },
        _ => multiply_portable(tile, panel, sums),
    }
}

fn multiply_portable(tile: Tile<'_>, panel: Panel<'_>, sums: &mut [[f32; PANEL]]) {
    let height = sums.len();
    sums.fill([0.0; PANEL]);
    let blocks = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
    for (block, (codes, scales)) in blocks.enumerate() {
        for (row, sums) in sums.iter_mut().enumerate() {
            let factor = tile.factors[block * height + row];
            let mut products = [factor.offset; PANEL];
            for (quad, codes) in codes.iter().enumerate() {
                let x = tile.words[(block * height + row) * QUADS + quad].to_le_bytes();
                for (product, codes) in products.iter_mut().zip(codes) {
                    for (x, code) in x.iter().zip(codes) {
                        *product += i32::from(x.cast_signed()) * i32::from(*code);
                    }
                }
            }
            add_block(sums, &products, factor.scale, scales);
        }
    }
}

#[inline(always)]
fn add_block(sums: &mut [f32; PANEL], products: &[i32; PANEL], scale: f32, scales: &[f32; PANEL]) {
    for column in 0..PANEL {
        sums[column] = (products[column] as f32).mul_add(scale * scales[column], sums[column]);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Kernels with x86 instructions.

    use std::arch::x86_64::*;

    use super::{Codes, PANEL, Panel, QUADS, Tile, add_block};
    use crate::cpu::linear::for_height;
    use crate::cpu::linear::registers::{load, store, zero};

    /// Quads of a cache line.
    const LINE: usize = 16;

    /// With `vpdpbusd`: four products of bytes and their sum per lane.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    pub(super) fn multiply_vnni(
        tile: Tile<'_>,
        panel: Panel<'_>,
        ahead: &[Codes],
        sums: &mut [[f32; PANEL]],
    ) {
        for_height!(sums.len(), run_vnni, tile, panel, ahead, sums)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    #[inline]
    fn run_vnni<const H: usize>(
        tile: Tile<'_>,
        panel: Panel<'_>,
        ahead: &[Codes],
        sums: &mut [[f32; PANEL]],
    ) {
        let mut totals = [zero(); H];
        let codes = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
        let words = tile.words.as_chunks::<QUADS>().0.as_chunks::<H>().0;
        let rows = words.iter().zip(tile.factors.as_chunks::<H>().0);
        // Fetched evenly, so that the requests do not queue up.
        let mut ahead = ahead.chunks(ahead.len().div_ceil(panel.scales.len().max(1)).max(1));
        for ((codes, scales), (words, factors)) in codes.zip(rows) {
            for line in ahead.next().unwrap_or_default().as_flattened().chunks(LINE) {
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
            }
            let mut products = [[_mm512_setzero_si512(); 2]; H];
            for row in 0..H {
                products[row] = [_mm512_set1_epi32(factors[row].offset); 2];
            }
            for (quad, codes) in codes.iter().enumerate() {
                let weights = load_codes(codes);
                for row in 0..H {
                    let x = _mm512_set1_epi32(words[row][quad].cast_signed());
                    for half in 0..2 {
                        products[row][half] = _mm512_dpbusd_epi32(products[row][half], weights[half], x);
                    }
                }
            }
            let scales = load(scales);
            for row in 0..H {
                let scale = _mm512_set1_ps(factors[row].scale);
                for half in 0..2 {
                    let product = _mm512_cvtepi32_ps(products[row][half]);
                    let scale = _mm512_mul_ps(scale, scales[half]);
                    totals[row][half] = _mm512_fmadd_ps(product, scale, totals[row][half]);
                }
            }
        }
        store(&totals, sums);
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load_codes(codes: &Codes) -> [__m512i; 2] {
        let halves = codes.as_chunks::<16>().0;
        // SAFETY: each half is 16 * 4 bytes long, what a register holds; no alignment is asked for.
        [0, 1].map(|half| unsafe { _mm512_loadu_si512(halves[half].as_ptr().cast()) })
    }

    /// Without: products of bytes are added in pairs of 16 bits, which two factors of at most 127 cannot overflow.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn multiply_avx2(tile: Tile<'_>, panel: Panel<'_>, sums: &mut [[f32; PANEL]]) {
        let height = sums.len();
        sums.fill([0.0; PANEL]);
        let (ones, bias) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
        let blocks = panel.codes.as_chunks::<QUADS>().0.iter().zip(panel.scales);
        for (block, (codes, scales)) in blocks.enumerate() {
            for (row, sums) in sums.iter_mut().enumerate() {
                let mut products = [_mm256_setzero_si256(); PANEL / 8];
                for (quad, codes) in codes.iter().enumerate() {
                    let x =
                        _mm256_set1_epi32(tile.words[(block * height + row) * QUADS + quad].cast_signed());
                    for (product, codes) in products.iter_mut().zip(codes.as_chunks::<8>().0) {
                        // SAFETY: 8 * 4 bytes are read from 8 * 4 bytes; no alignment is asked for.
                        let codes = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
                        // Taking 128 off turns the top bit around; then |w| * (x with the sign of w) = w * x.
                        let weights = _mm256_xor_si256(codes, bias);
                        let pairs =
                            _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
                        *product = _mm256_add_epi32(*product, _mm256_madd_epi16(pairs, ones));
                    }
                }
                let mut integers = [0i32; PANEL];
                for (integers, product) in integers.as_chunks_mut::<8>().0.iter_mut().zip(products) {
                    // SAFETY: 8 integers are written to 8 integers; no alignment is asked for.
                    unsafe { _mm256_storeu_si256(integers.as_mut_ptr().cast(), product) };
                }
                add_block(sums, &integers, tile.factors[block * height + row].scale, scales);
            }
        }
    }
}
