//! Weights and activations in 8-bit integers, with a scale for every block of 32 inputs.
//!
//! The scheme is ggml's `Q8_0` with the scale kept in single precision. A block of values is divided by
//! (largest absolute value / 127) and rounded to the nearest integer, ties to even. A product of two
//! blocks is exact in 32-bit integers. Blocks are then added as
//! `sum = fma(float(product), scale of x * scale of w, sum)`, from the first to the last. The integers
//! make the order within a block irrelevant, so every kernel gives the same bits.
//!
//! ```text
//! panel codes   [block][quad of inputs][PANEL][4]   weight + 128, unsigned: what `vpdpbusd` multiplies
//!       scales  [block][PANEL]
//! tile  words   [block][height][quad of inputs]     `Layout::Bytes`: four signed activations a word
//!               [block][height][2][quad of inputs]  `Layout::Pairs`: two of 16 bits a word, even ones first
//!       factors [block][height]                     scale, and 128 times the sum of the block to subtract
//! ```
//!
//! Without dot products of bytes, codes and activations are multiplied as numbers of 16 bits. Products
//! of bytes that must not overflow 16 bits take as many instructions, and need care with signs.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod packing;

use crate::cpu::isa::{Isa, Level};
use crate::cpu::tile::PANEL;
use crate::cpu::vector::{LANES, fold_lanes, larger};
pub(super) use packing::{pack_tile, words_per_row};

/// Inputs that share a scale.
const BLOCK: usize = 32;
/// Inputs that a dot product of bytes takes at once.
const QUAD: usize = 4;
/// Quads of a block.
const QUADS: usize = BLOCK / QUAD;
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

impl Factor {
    fn new(scale: f32, sum: i32) -> Self {
        Self { scale, offset: -128 * sum }
    }
}

/// Packed rows of activations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile<'a> {
    pub(super) words: &'a [u32],
    pub(super) factors: &'a [Factor],
}

/// Packed weights of one panel.
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

/// Rows that fit into the registers beside the codes of a panel.
pub(super) fn tallest(isa: Isa) -> usize {
    match isa.level() {
        Level::Portable => 2,
        Level::Avx2 => 4,
        // Integer and floating-point sums must both stay in registers.
        _ => 6,
    }
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
pub fn error_of(x: &[f32]) -> f64 {
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

/// Products of a tile and a panel. `ahead` are codes that are needed soon. A kernel that can fetches
/// them meanwhile.
pub(super) fn multiply(
    isa: Isa,
    tile: Tile<'_>,
    panel: Panel<'_>,
    ahead: &[Codes],
    sums: &mut [[f32; PANEL]],
) {
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Portable => {}
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        Level::Avx2 => return unsafe { avx2::multiply(tile, panel, ahead, sums) },
        // SAFETY: as above.
        Level::Avx512 => return unsafe { avx512::multiply_pairs(tile, panel, ahead, sums) },
        // SAFETY: as above.
        _ => return unsafe { avx512::multiply_bytes(tile, panel, ahead, sums) },
    }
    let _ = (isa, ahead);
    multiply_portable(tile, panel, sums);
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
