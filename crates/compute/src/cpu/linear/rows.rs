//! Activations of one call, packed as the kernels of a weight format read them.
//!
//! Rows are cut into tiles of equal height, at most as many rows as the registers allow; the last may be
//! lower. Tiles are laid out block of inputs by block of inputs, so that a kernel reads one contiguous
//! stream whatever the width of the row. Packing also rounds or quantises activations, as the format
//! asks. It may normalise on the way.

use std::ops::Range;

use super::format::WeightFormat;
use super::{MAX_HEIGHT, bfloat16, quantized, single};
use crate::cpu::Cpu;
use crate::cpu::isa::{Isa, Level};
use crate::cpu::parallel::{read, write};
use crate::cpu::vector::rms_norm;

/// Under this many values packing runs on the calling thread.
const PARALLEL_FROM: usize = 16 << 10;

/// Packed rows; the memory is reused from call to call.
#[derive(Debug, Default)]
pub struct Rows {
    format: WeightFormat,
    count: usize,
    inputs: usize,
    height: usize,
    /// Words of a row in `words`.
    stride: usize,
    /// Tiles: f32 values, bfloat16 pairs, or four quantised values each, by format.
    words: Vec<u32>,
    /// Per tile, block and row of quantised activations.
    factors: Vec<quantized::Factor>,
}

impl Rows {
    /// Packs rows `[count, inputs]`.
    pub fn pack(&mut self, cpu: &Cpu, x: &[f32], inputs: usize, format: WeightFormat) {
        self.pack_with(cpu, x, inputs, format, &|x, _| x);
    }

    /// Packs rows after a root-mean-square norm with these weights (`vector::rms_norm`).
    pub fn pack_normed(&mut self, cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, format: WeightFormat) {
        let isa = cpu.isa();
        self.pack_with(cpu, x, weight.len(), format, &|x, scratch| {
            scratch.resize(x.len(), 0.0);
            for (x, out) in x.chunks_exact(weight.len()).zip(scratch.chunks_exact_mut(weight.len())) {
                rms_norm(isa, x, weight, eps, out);
            }
            scratch
        });
    }

    fn pack_with(
        &mut self,
        cpu: &Cpu,
        x: &[f32],
        inputs: usize,
        format: WeightFormat,
        prepare: &Prepare<'_>,
    ) {
        assert_eq!(x.len() % inputs, 0, "whole rows");
        let count = x.len() / inputs;
        (self.format, self.count, self.inputs) = (format, count, inputs);
        self.height = height(count, cpu.isa(), format);
        self.stride = match format {
            WeightFormat::F32 => single::words_per_row(inputs),
            WeightFormat::Bf16 => bfloat16::words_per_row(cpu.bf16_kernel(), inputs),
            WeightFormat::Q8_0 => quantized::words_per_row(cpu.isa(), inputs),
        };
        let blocks = if format == WeightFormat::Q8_0 { quantized::blocks(inputs) } else { 0 };
        // They only grow: what lies behind the rows of this call is not read.
        let (words, factors) = (count * self.stride, count * blocks);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        if self.factors.len() < factors {
            self.factors.resize(factors, quantized::Factor::default());
        }
        let (words, factors) = (&mut self.words[..words], &mut self.factors[..factors]);

        let (kernel, isa) = (cpu.bf16_kernel(), cpu.isa());
        let pack = |(x, words, factors): (&[f32], &mut [u32], &mut [quantized::Factor])| {
            SCRATCH.with_borrow_mut(|scratch| {
                let x = prepare(x, scratch);
                match format {
                    WeightFormat::F32 => single::pack_tile(x, inputs, as_floats_mut(words), |value| value),
                    WeightFormat::Bf16 => bfloat16::pack_tile(kernel, isa, x, inputs, words),
                    WeightFormat::Q8_0 => quantized::pack_tile(isa, x, inputs, words, factors),
                }
            });
        };
        let (x_size, word_size) = (self.height * inputs, self.height * self.stride);
        let one = cpu.alone();
        let cpu = if count * inputs < PARALLEL_FROM { &one } else { cpu };
        let tiles = (read(x, x_size), write(words, word_size));
        if blocks == 0 {
            cpu.each_part(tiles, |_, (x, words)| pack((x, words, &mut [])));
        } else {
            let tiles = (tiles, write(factors, self.height * blocks));
            cpu.each_part(tiles, |_, ((x, words), factors)| pack((x, words, factors)));
        }
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Width of a row before packing.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The format they are packed for.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    pub(super) fn height(&self) -> usize {
        self.height
    }

    pub(super) fn tiles(&self) -> usize {
        self.count.div_ceil(self.height)
    }

    pub(super) fn tile_rows(&self, tile: usize) -> Range<usize> {
        tile * self.height..self.count.min((tile + 1) * self.height)
    }

    pub(super) fn words(&self, tile: usize) -> &[u32] {
        let rows = self.tile_rows(tile);
        &self.words[rows.start * self.stride..rows.end * self.stride]
    }

    pub(super) fn single(&self, tile: usize) -> &[f32] {
        as_floats(self.words(tile))
    }

    pub(super) fn quantized(&self, tile: usize) -> quantized::Tile<'_> {
        let (rows, blocks) = (self.tile_rows(tile), quantized::blocks(self.inputs));
        quantized::Tile {
            words: self.words(tile),
            factors: &self.factors[rows.start * blocks..rows.end * blocks],
        }
    }
}

/// What is done to the rows of a tile first; the vector is scratch.
type Prepare<'p> = dyn for<'a> Fn(&'a [f32], &'a mut Vec<f32>) -> &'a [f32] + Sync + 'p;

thread_local! {
    /// Normed rows of the tile at hand.
    static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Rows of every tile but the last.
fn height(count: usize, isa: Isa, format: WeightFormat) -> usize {
    let tallest = tallest(isa, format);
    // In this format, three rows take as long as six, row by row, and two are faster than four: so tiles
    // are full. One row is slow.
    if isa.level() == Level::Avx2 && format == WeightFormat::F32 && count % tallest != 1 {
        return count.clamp(1, tallest);
    }
    count.div_ceil(count.div_ceil(tallest).max(1)).max(1)
}

/// Rows that fit into the registers beside a panel's weights.
fn tallest(isa: Isa, format: WeightFormat) -> usize {
    match (isa.level(), format) {
        (_, WeightFormat::Q8_0) => quantized::tallest(isa),
        (Level::Portable, _) => 2,
        (Level::Avx2, WeightFormat::F32) => 6,
        (Level::Avx2, WeightFormat::Bf16) => 5,
        (_, _) => MAX_HEIGHT,
    }
}

pub(super) fn as_floats(words: &[u32]) -> &[f32] {
    bytemuck::cast_slice(words)
}

pub(super) fn as_floats_mut(words: &mut [u32]) -> &mut [f32] {
    bytemuck::cast_slice_mut(words)
}
