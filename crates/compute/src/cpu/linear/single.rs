//! Weights in single precision.
//!
//! An output is one chain of fused multiply-adds from the first to the last input. This order is the
//! format's contract.
//!
//! ```text
//! panel  [input][PANEL]
//! tile   [input / 4][height][4]   rows are copied four values at a time, which is cheap,
//!                                 and read as one stream
//! ```
//!
//! Inputs are padded with zeros to a multiple of four.

use crate::cpu::fused::add_scaled;
use crate::cpu::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::Level;
use crate::cpu::tile::PANEL;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Consecutive inputs of a row in a tile.
const QUAD: usize = 4;

/// A packed matrix.
#[derive(Debug)]
pub(super) struct Panels {
    /// Inputs of a row, padded.
    inputs: usize,
    values: Vec<f32>,
}

impl Panels {
    pub(super) fn pack(rows: &[Option<&[f32]>], inputs: usize) -> Self {
        let inputs = words_per_row(inputs);
        let mut values = vec![0.0; rows.len() * inputs];
        for (panel, rows) in values.chunks_exact_mut(inputs * PANEL).zip(rows.chunks_exact(PANEL)) {
            for (column, row) in rows.iter().enumerate() {
                for (place, weight) in panel[column..].iter_mut().step_by(PANEL).zip(row.unwrap_or_default())
                {
                    *place = *weight;
                }
            }
        }
        Self { inputs, values }
    }

    pub(super) fn count(&self) -> usize {
        self.values.len() / (self.inputs * PANEL)
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.values.len()
    }

    pub(super) fn panel(&self, index: usize) -> &[f32] {
        &self.values[index * self.inputs * PANEL..][..self.inputs * PANEL]
    }
}

/// Words that a row of a tile takes.
pub(super) fn words_per_row(inputs: usize) -> usize {
    inputs.next_multiple_of(QUAD)
}

/// Writes rows `[height, inputs]` as a tile, each value after `change`.
#[inline(always)]
pub(super) fn pack_tile(x: &[f32], inputs: usize, tile: &mut [f32], change: impl Fn(f32) -> f32) {
    let height = x.len() / inputs;
    let tile = tile.as_chunks_mut::<QUAD>().0;
    for (row, x) in x.chunks_exact(inputs).enumerate() {
        let (full, rest) = x.as_chunks::<QUAD>();
        let mut places = tile[row..].iter_mut().step_by(height);
        // In this order, so that no place is taken when there are no more quads.
        for (quad, place) in full.iter().zip(places.by_ref()) {
            *place = quad.map(&change);
        }
        if let (Some(place), false) = (places.next(), rest.is_empty()) {
            *place = std::array::from_fn(|index| rest.get(index).map_or(0.0, |&value| change(value)));
        }
    }
}

/// Products of a tile and a panel. `ahead` are weights that are needed soon. A kernel that can fetches
/// them meanwhile.
pub(super) fn multiply(isa: Isa, tile: &[f32], panel: &[f32], ahead: &[f32], sums: &mut [[f32; PANEL]]) {
    #[cfg(target_arch = "x86_64")]
    match isa.level() {
        Level::Portable => {}
        // SAFETY: an `Isa` of this level exists only if the machine was found to have its features.
        Level::Avx2 => return unsafe { avx2::multiply(tile, panel, ahead, sums) },
        // SAFETY: as above.
        _ => return unsafe { avx512::multiply(tile, panel, ahead, sums) },
    }
    let _ = (isa, ahead);
    multiply_portable(tile, panel, sums);
}

fn multiply_portable(tile: &[f32], panel: &[f32], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        1 => run::<1>(tile, panel, sums),
        2 => run::<2>(tile, panel, sums),
        height => unreachable!("a tile of {height} rows"),
    }
}

fn run<const H: usize>(tile: &[f32], panel: &[f32], sums: &mut [[f32; PANEL]]) {
    // A local array stays in registers during the loop; what others can point at would be stored every time.
    let mut registers = [[0.0f32; PANEL]; H];
    let tile = tile.as_chunks::<QUAD>().0.as_chunks::<H>().0;
    for (x, weights) in tile.iter().zip(panel.as_chunks::<PANEL>().0.as_chunks::<QUAD>().0) {
        for input in 0..QUAD {
            for row in 0..H {
                add_scaled(x[row][input], &weights[input], &mut registers[row]);
            }
        }
    }
    sums[..H].copy_from_slice(&registers);
}
