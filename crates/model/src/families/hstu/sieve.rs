//! Which items can be among the best for a user, told from a copy of the items in 8-bit integers.
//!
//! Place in the flow: [`ItemTable`](super::retrieval::ItemTable) computes exact scores only of the
//! panels that pass here.
//!
//! With u, i the vectors of a user and an item, and u', i' their quantised forms (Cauchy-Schwarz):
//!
//! ```text
//! |<u, i> - <u', i'>|  <=  |u| |i - i'|  +  |u - u'| |i'|
//! ```
//!
//! The lengths on the right are known, so a product of the copy gives the exact score up to a margin.
//! Rounding in single precision is added to the margin. Of the allowed items, the `count` best of the
//! copy score at least the worst of them less the margin. An item that cannot reach that, margin added,
//! is not among the best. The copy is about a quarter of the table, and reading the table from memory is
//! what takes the time.
//!
//! Invariant: no item of the exact answer is ever held back. So the answer does not depend on the sieve.

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::{Linear, Output, Rows, WeightFormat, quantization_error};
use beamline_compute::cpu::parallel::write;
use candle_core::{Device, Tensor};

use super::best::{Best, CHUNK};
use super::retrieval::{BLOCK, TopItems};
use crate::error::ModelError;

/// Panels of the table for each item asked for, from which on the sieve pays. Several times as many
/// items pass as are asked for, each in a panel of its own.
const PANELS_PER_ITEM: usize = 8;

/// Most scores of the copy that are kept (256 MiB). With more users than that, one pass over the table
/// serves them all.
const MOST_SCORES: usize = 64 << 20;

/// A copy of the items.
#[derive(Debug)]
pub(super) struct Sieve {
    blocks: Vec<Block>,
    width: usize,
}

/// A copy of a block of items, and the largest lengths in it.
#[derive(Debug)]
pub(super) struct Block {
    items: Linear,
    /// Of an item.
    length: f64,
    /// Of what quantising takes away from an item.
    error: f64,
}

impl Block {
    /// From rows `[items, width]`.
    ///
    /// # Errors
    ///
    /// When they cannot be packed.
    pub(super) fn new(rows: &[f32], width: usize) -> Result<Self, ModelError> {
        let largest = |of: &dyn Fn(&[f32]) -> f64| rows.chunks_exact(width).map(of).fold(0.0, f64::max);
        let (length, error) = (largest(&length), largest(&quantization_error));
        let rows = Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu)?;
        Ok(Self { items: Linear::pack(&[rows], None, WeightFormat::Q8_0)?, length, error })
    }
}

/// Euclidean length of a vector.
fn length(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// Scores of the copy, and what passes of them.
pub(super) struct Passed {
    /// Block by block `[users, items of the block]`: scores of the copy.
    scores: Vec<f32>,
    /// `[block][user]`: the least score of the copy that passes.
    least: Vec<f32>,
    users: usize,
}

impl Passed {
    /// Places within a block, ascending, that pass for some user. `items` are those of the block.
    pub(super) fn places(&self, block: usize, items: usize) -> impl Iterator<Item = usize> {
        let scores = &self.scores[block * BLOCK * self.users..][..items * self.users];
        let least = &self.least[block * self.users..][..self.users];
        let any = move |places: std::ops::Range<usize>| {
            scores.chunks_exact(items).zip(least).any(|(scores, &least)| {
                scores[places.clone()].iter().fold(false, |any, &score| any | (score >= least))
            })
        };
        // Most chunks hold none.
        let chunks = (0..items).step_by(CHUNK).map(move |first| first..items.min(first + CHUNK));
        let chunks = chunks.filter(move |chunk| any(chunk.clone()));
        chunks.flatten().filter(move |&place| any(place..place + 1))
    }
}

impl Sieve {
    pub(super) fn new(blocks: Vec<Block>, width: usize) -> Self {
        Self { blocks, width }
    }

    pub(super) fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.items.bytes()).sum()
    }

    /// Whether so few items are asked for that the sieve saves more than it takes.
    pub(super) fn pays(&self, asked: &[TopItems<'_>]) -> bool {
        let items: usize = self.blocks.iter().map(|block| block.items.outputs()).sum();
        let wanted = asked.iter().fold(0usize, |sum, asked| sum.saturating_add(asked.count));
        let kept = items.saturating_mul(asked.len());
        wanted.saturating_mul(PANELS_PER_ITEM) <= items / CHUNK && kept <= MOST_SCORES
    }

    /// Lets pass what can be among the best for users `[users, width]`. `first` is the item that the
    /// table begins with. `None` if a user's vector is not finite.
    pub(super) fn pass(
        &self,
        cpu: &Cpu,
        users: &[f32],
        first: usize,
        asked: &[TopItems<'_>],
    ) -> Option<Passed> {
        let margins = self.margins(users)?;
        let count = asked.len();
        let mut rows = Rows::default();
        rows.pack(cpu, users, self.width, WeightFormat::Q8_0);
        let items = self.blocks.iter().map(|block| block.items.outputs()).sum::<usize>();
        let mut scores = vec![0.0; items * count];
        let alone = cpu.alone();
        // The best, by what they score at least.
        let best = Best::new(asked);
        cpu.each_part(write(&mut scores, BLOCK * count), |index, scores| {
            let block = &self.blocks[index].items;
            block.forward(&alone, &rows, Output::Replace, scores);
            for (user, scores) in scores.chunks_exact(block.outputs()).enumerate() {
                best.offer(user, first + index * BLOCK, scores, margins[index * count + user]);
            }
        });
        let worst: Vec<f32> = (0..count).map(|user| best.worst(user)).collect();
        let least = margins
            .chunks_exact(count)
            .flat_map(|margins| worst.iter().zip(margins).map(|(worst, margin)| worst - margin));
        Some(Passed { least: least.collect(), scores, users: count })
    }

    /// `[block][user]`: most by which a score of the copy is wrong, rounding included. `None` if that is
    /// not finite.
    fn margins(&self, users: &[f32]) -> Option<Vec<f32>> {
        let users: Vec<_> =
            users.chunks_exact(self.width).map(|u| (length(u), quantization_error(u))).collect();
        // Each of both sums has a rounding error of at most (terms + a few) * 2^-24 times the sum of
        // magnitudes, which is at most the product of the lengths. The arithmetic with the margin has
        // the same. Twice that, to be safe.
        let rounding = (self.width + 16) as f64 * 2f64.powi(-22);
        let margin = |block: &Block, &(length, error): &(f64, f64)| {
            let (most, errors) = (block.length + block.error, length + error);
            let margin = length * block.error + error * most + rounding * errors * most;
            margin as f32 + f32::MIN_POSITIVE
        };
        let margins: Vec<f32> =
            self.blocks.iter().flat_map(|block| users.iter().map(move |user| margin(block, user))).collect();
        margins.iter().all(|margin| margin.is_finite()).then_some(margins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers with a few large ones among them.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next() * if next() > 0.9 { 30.0 } else { 0.1 }).collect()
    }

    #[test]
    fn a_score_of_the_copy_is_within_the_margin_and_few_items_pass() {
        let (width, items) = (96, 3000);
        let rows = numbers(items * width, 1);
        let blocks = rows.chunks(BLOCK * width).map(|rows| Block::new(rows, width).unwrap());
        let sieve = Sieve::new(blocks.collect(), width);
        let users = numbers(2 * width, 7);
        let asked = [TopItems { count: 5, allowed: &|_| true }; 2];
        assert!(sieve.pays(&asked));
        let passed = sieve.pass(&Cpu::new(2).unwrap(), &users, 0, &asked).unwrap();
        let margins = sieve.margins(&users).unwrap();
        for (index, rows) in rows.chunks(BLOCK * width).enumerate() {
            let count = rows.len() / width;
            for (user, vector) in users.chunks_exact(width).enumerate() {
                for (place, row) in rows.chunks_exact(width).enumerate() {
                    let exact: f64 = row.iter().zip(vector).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let score = f64::from(passed.scores[index * BLOCK * 2 + user * count + place]);
                    assert!((exact - score).abs() <= f64::from(margins[index * 2 + user]));
                }
            }
        }
        let through: usize =
            (0..sieve.blocks.len()).map(|b| passed.places(b, sieve.blocks[b].items.outputs()).count()).sum();
        assert!((10..items / 4).contains(&through), "{through} of {items}");
    }

    #[test]
    fn of_a_vector_that_is_not_finite_nothing_is_said() {
        let sieve = Sieve::new(vec![Block::new(&[1.0, 0.0], 2).unwrap()], 2);
        let asked = [TopItems { count: 1, allowed: &|_| true }];
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(sieve.pass(&Cpu::new(1).unwrap(), &[1.0, bad], 0, &asked).is_none());
        }
        assert!(sieve.pass(&Cpu::new(1).unwrap(), &[1.0, 2.0], 0, &asked).is_some());
    }
}
