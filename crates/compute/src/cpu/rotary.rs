//! Rotary position embedding (Su et al. 2021) on half pairs: element `i` turns with element
//! `i + head_dim / 2`.

use super::isa::per_isa;
use super::vector::{LANES, rms_scale};

/// Cosines and sines for every position up to a limit.
#[derive(Debug)]
pub struct Rotary {
    half: usize,
    /// `[position][cos of half | sin of half]`.
    table: Vec<f32>,
}

impl Rotary {
    /// Tables for `positions` positions. `inverse_frequencies` has one entry per pair. `scale`
    /// multiplies both cosine and sine: it is the attention factor of YaRN, otherwise 1.
    pub fn new(inverse_frequencies: &[f64], scale: f64, positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut table = Vec::with_capacity(positions * 2 * half);
        for position in 0..positions {
            // Double precision, so that far positions are as exact as near ones.
            let angles = || inverse_frequencies.iter().map(|frequency| position as f64 * frequency);
            table.extend(angles().map(|angle| (angle.cos() * scale) as f32));
            table.extend(angles().map(|angle| (angle.sin() * scale) as f32));
        }
        Self { half, table }
    }

    /// `[position][cos of half | sin of half]`.
    pub fn table(&self) -> &[f32] {
        &self.table
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.table.len() / (2 * self.half).max(1)
    }

    /// Turns one head in place.
    #[inline(always)]
    pub fn turn(&self, position: usize, head: &mut [f32]) {
        let row = &self.table[position * 2 * self.half..][..2 * self.half];
        let (cos, sin) = row.split_at(self.half);
        let (low, high) = head.split_at_mut(self.half);
        // Whole vectors first: halves are too short for the compiler to find it worth its while by itself.
        let (cos_full, cos_rest) = cos.as_chunks::<LANES>();
        let (sin_full, sin_rest) = sin.as_chunks::<LANES>();
        let (low_full, low_rest) = low.as_chunks_mut::<LANES>();
        let (high_full, high_rest) = high.as_chunks_mut::<LANES>();
        for (((low, high), cos), sin) in low_full.iter_mut().zip(high_full).zip(cos_full).zip(sin_full) {
            // Through local arrays: they lie in registers, and nothing else points at them.
            let (a, b, cos, sin) = (*low, *high, *cos, *sin);
            let (mut turned_low, mut turned_high) = ([0.0; LANES], [0.0; LANES]);
            for lane in 0..LANES {
                turned_low[lane] = a[lane] * cos[lane] - b[lane] * sin[lane];
                turned_high[lane] = b[lane] * cos[lane] + a[lane] * sin[lane];
            }
            (*low, *high) = (turned_low, turned_high);
        }
        for (((low, high), cos), sin) in low_rest.iter_mut().zip(high_rest).zip(cos_rest).zip(sin_rest) {
            let (a, b) = (*low, *high);
            *low = a * cos - b * sin;
            *high = b * cos + a * sin;
        }
    }
}

per_isa! {
    /// Normalises the heads of one row, if a norm is given, then turns them to `position`.
    pub fn turn_heads(heads: &mut [f32], dim: usize, norm: Option<&[f32]>, eps: f32, rotary: &Rotary,
        position: usize) = turn_heads_body
}

#[inline(always)]
fn turn_heads_body<const R: usize>(
    heads: &mut [f32],
    dim: usize,
    norm: Option<&[f32]>,
    eps: f32,
    rotary: &Rotary,
    position: usize,
) {
    for head in heads.chunks_exact_mut(dim) {
        if let Some(weights) = norm {
            let scale = rms_scale(head, eps);
            let (full, rest) = head.as_chunks_mut::<LANES>();
            let (full_weights, rest_weights) = weights.as_chunks::<LANES>();
            for (x, weights) in full.iter_mut().zip(full_weights) {
                let (values, weights) = (*x, *weights);
                let mut normed = [0.0; LANES];
                for lane in 0..LANES {
                    normed[lane] = values[lane] * scale * weights[lane];
                }
                *x = normed;
            }
            for (x, weight) in rest.iter_mut().zip(rest_weights) {
                *x = *x * scale * weight;
            }
        }
        rotary.turn(position, head);
    }
}
